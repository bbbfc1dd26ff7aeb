"""Clips side by side: one row a prompt, one group of columns a way of sampling.

                     teacher, 30 steps      teacher, 4 steps      generator, 4 steps
    "a red circle"   [] [] [] [] []         [] [] [] [] []        [] [] [] [] []

As PNG with several frames of each clip, as a looping GIF with one cell per clip, and as one mp4 per
clip in a folder beside them, for pages that lay them out again. Small clips are enlarged by whole
pixels, so that nothing is invented; large ones are scaled down on the sheets.
"""

import io
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cluster.files import write_whole
from cluster.storage_errors import full_disk_errors
from pipelines.media.clip_files import SheetGroup, clips_folder, write_clip_files
from pipelines.media.video import Pixels
from sgmd_core.errors import ShapeError

PNG_CELL_PX = 96
GIF_CELL_PX = 128
_NUM_FRAMES = 5
_GAP_PX = 3
_GROUP_GAP_PX = 18
_MARGIN_PX = 14
_TITLE_PX = 40
_PROMPT_PX = 24
_FONT_PX = 14
_NOTE_FONT_PX = 12
_BACKGROUND = (23, 25, 30)
_INK = (236, 237, 240)
_FAINT_INK = (158, 163, 173)


def write_contact_sheet(
    png: Path, gif: Path, groups: Sequence[SheetGroup], prompts: Sequence[str], fps: int
) -> None:
    """Writes the same clips as a still, as a looping sheet and as files of their own.

    Args:
        png: File of the still; the folder of the same name gets the clips.
        gif: File of the loop.
        groups: Ways of sampling, left to right; all clips of one size.
        prompts: One a row.
        fps: Frames a second of the loop.

    Raises:
        ShapeError: A group has another number of clips than there are prompts, or clips differ
            in size.
        StoreRefusedError: The disk is full.
    """
    _require_matching(groups, prompts)
    still = io.BytesIO()
    still_picture(groups, prompts).save(still, "PNG")
    frames = loop_pictures(groups, prompts)
    # One palette for all frames: a palette of its own for each makes the background flicker.
    palette = _stacked(frames).quantize(256)
    first, *rest = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    loop = io.BytesIO()
    duration_ms = round(1000 / fps)
    first.save(
        *(loop, "GIF"),
        save_all=True,
        append_images=rest,
        duration=duration_ms,
        loop=0,
        optimize=False,
    )
    with full_disk_errors(f"writing {png}"):
        write_whole(png, still.getvalue())
        write_whole(gif, loop.getvalue())
        write_clip_files(clips_folder(png), groups, prompts, fps)


def still_picture(
    groups: Sequence[SheetGroup], prompts: Sequence[str], num_frames: int = _NUM_FRAMES
) -> Image.Image:
    """A sheet with evenly spaced frames of every clip."""
    length = len(groups[0].clips[0])
    chosen = np.linspace(0, length - 1, min(num_frames, length)).round().astype(int).tolist()
    return _draw(groups, prompts, chosen, PNG_CELL_PX)


def loop_pictures(groups: Sequence[SheetGroup], prompts: Sequence[str]) -> list[Image.Image]:
    """A sheet with one cell per clip, once for every frame."""
    length = len(groups[0].clips[0])
    return [_draw(groups, prompts, [frame], GIF_CELL_PX) for frame in range(length)]


def enlarge(frame: Pixels, height_px: int) -> Image.Image:
    """A frame of about this height: whole pixels when it grows, averaged when it shrinks."""
    image = Image.fromarray(frame)
    zoom = height_px // image.height
    if zoom >= 1:
        return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    width_px = max(1, round(image.width * height_px / image.height))
    return image.resize((width_px, height_px), Image.Resampling.LANCZOS)


def _draw(
    groups: Sequence[SheetGroup], prompts: Sequence[str], frames: Sequence[int], cell_px: int
) -> Image.Image:
    cell = enlarge(groups[0].clips[0][0], cell_px)
    group_w = len(frames) * cell.width + (len(frames) - 1) * _GAP_PX
    width = 2 * _MARGIN_PX + len(groups) * group_w + (len(groups) - 1) * _GROUP_GAP_PX
    row_h = _PROMPT_PX + cell.height
    sheet = Image.new("RGB", (width, _TITLE_PX + len(prompts) * row_h + _MARGIN_PX), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font, note_font = ImageFont.load_default(_FONT_PX), ImageFont.load_default(_NOTE_FONT_PX)
    for index, group in enumerate(groups):
        left = _MARGIN_PX + index * (group_w + _GROUP_GAP_PX)
        draw.text((left, 6), _fit(group.label, font, group_w), fill=_INK, font=font)
        draw.text((left, 23), _fit(group.note, note_font, group_w), fill=_FAINT_INK, font=note_font)
        for row, clip in enumerate(group.clips):
            top = _TITLE_PX + row * row_h + _PROMPT_PX
            for place, frame in enumerate(frames):
                picture = enlarge(clip[frame], cell_px)
                sheet.paste(picture, (left + place * (cell.width + _GAP_PX), top))
    for row, prompt in enumerate(prompts):
        text = _fit(prompt, note_font, width - 2 * _MARGIN_PX)
        top = _TITLE_PX + row * row_h + _PROMPT_PX - 17
        draw.text((_MARGIN_PX, top), text, fill=_FAINT_INK, font=note_font)
    return sheet


def _stacked(frames: Sequence[Image.Image]) -> Image.Image:
    """Every frame at half its size, below each other."""
    width, height = frames[0].width // 2, frames[0].height // 2
    stack = Image.new("RGB", (width, height * len(frames)))
    for index, frame in enumerate(frames):
        stack.paste(frame.resize((width, height), Image.Resampling.NEAREST), (0, index * height))
    return stack


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: float) -> str:
    """The text, cut with an ellipsis where it is wider than its place."""
    if font.getlength(text) <= width_px:
        return text
    lengths = range(len(text))
    num_fitting = bisect_right(lengths, width_px, key=lambda n: font.getlength(text[:n] + "..."))
    return text[: max(0, num_fitting - 1)].rstrip() + "..."


def _require_matching(groups: Sequence[SheetGroup], prompts: Sequence[str]) -> None:
    shapes = {clip.shape for group in groups for clip in group.clips}
    counts = [len(group.clips) for group in groups]
    if len(shapes) != 1 or set(counts) != {len(prompts)}:
        raise ShapeError(
            "drawing a contact sheet",
            f"groups of {counts} clips with the shapes {sorted(shapes)} for {len(prompts)} prompts",
            "one clip a prompt in every group, all of one size",
        )
