"""Contact sheets: the right frame in the right place, in files that open."""

import numpy as np
import pytest
from PIL import Image

from pipelines.data.clips.clip_decoding import decode_video
from pipelines.media.clip_files import SheetGroup, clips_folder, read_clip_files
from pipelines.media.contact_sheet import enlarge, still_picture, write_contact_sheet
from sgmd_core.errors import DataError, ShapeError

PROMPTS = ("a red circle moves left", "a blue bar moves up quickly")
NUM_FRAMES = 6


def clip(colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> np.ndarray:
    """A clip whose frames get brighter."""
    frames = np.ones((NUM_FRAMES, *size, 3)) * np.array(colour)
    gain = np.linspace(0.5, 1, NUM_FRAMES)[:, None, None, None]
    return (frames * gain).astype(np.uint8)


def groups(size: tuple[int, int] = (8, 8)) -> list[SheetGroup]:
    return [
        SheetGroup("teacher, 30 steps", "guidance 2", [clip((200, 0, 0), size)] * 2),
        SheetGroup("generator, 4 steps", "unguided", [clip((0, 200, 0), size)] * 2),
    ]


def test_both_files_open_and_the_loop_has_every_frame(tmp_path):
    png, gif = tmp_path / "sheet.png", tmp_path / "sheet.gif"
    write_contact_sheet(png, gif, groups(), PROMPTS, fps=8)
    with Image.open(png) as still:
        assert still.format == "PNG"
    with Image.open(gif) as loop:
        assert loop.n_frames == NUM_FRAMES
        assert loop.info["loop"] == 0
        # GIF counts in hundredths of a second.
        assert loop.info["duration"] == pytest.approx(125, abs=5)


def test_every_clip_lies_beside_the_sheet_as_a_video_that_players_show(tmp_path):
    png, gif = tmp_path / "sheet.png", tmp_path / "sheet.gif"
    write_contact_sheet(png, gif, groups(), PROMPTS, fps=8)
    files = read_clip_files(clips_folder(png))
    assert files.prompts == PROMPTS
    assert [column.label for column in files.columns] == ["teacher, 30 steps", "generator, 4 steps"]
    for column, colour in zip(files.columns, (0, 1), strict=True):
        frames = decode_video((files.folder / column.files[1]).read_bytes())
        # Enlarged by whole pixels, because 8 pixels are a dot on a screen.
        assert frames.shape == (NUM_FRAMES, 256, 256, 3)
        last = frames[-1].mean(axis=(0, 1))
        assert last[colour] == pytest.approx(200, abs=8)
        assert last[1 - colour] == pytest.approx(0, abs=8)


def test_a_sheet_without_clip_files_has_none(tmp_path):
    assert read_clip_files(tmp_path / "sheet") is None


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"prompts": ["a"]}',
        '{"prompts": ["a"], "columns": [{"label": "", "note": "", "files": []}]}',
    ],
)
def test_a_wrong_list_of_clips_is_refused(tmp_path, text):
    (tmp_path / "clips.json").write_text(text)
    with pytest.raises(DataError, match=r"clips\.json"):
        read_clip_files(tmp_path)


@pytest.mark.slow
def test_a_still_shows_the_first_and_the_last_frame_of_every_group():
    still = np.asarray(still_picture(groups(), PROMPTS, num_frames=2))
    colours = {tuple(int(v) for v in pixel) for pixel in still.reshape(-1, 3)}
    assert {(100, 0, 0), (200, 0, 0), (0, 100, 0), (0, 200, 0)} <= colours


def test_groups_stand_left_to_right():
    still = np.asarray(still_picture(groups(), PROMPTS)).astype(int)
    red = np.argwhere((still[..., 0] >= 100) & (still[..., 1:].max(axis=-1) == 0))
    green = np.argwhere((still[..., 1] >= 100) & (still[..., [0, 2]].max(axis=-1) == 0))
    assert red[:, 1].max() < green[:, 1].min()


def test_small_clips_grow_by_whole_pixels_and_large_ones_shrink():
    assert enlarge(clip((1, 2, 3))[0], 96).size == (96, 96)
    assert enlarge(np.zeros((480, 832, 3), np.uint8), 96).size == (166, 96)


def test_a_prompt_that_is_too_long_is_cut_rather_than_widening_the_sheet():
    short = still_picture(groups(), PROMPTS)
    long = still_picture(groups(), ("word " * 500, "b"))
    assert long.size == short.size


@pytest.mark.parametrize(
    "broken",
    [
        [SheetGroup("a", "", [clip((1, 1, 1))])],
        [SheetGroup("a", "", [clip((1, 1, 1)), clip((1, 1, 1), (8, 16))])],
    ],
    ids=["a clip too few", "two sizes"],
)
def test_groups_that_do_not_match_are_refused(broken, tmp_path):
    with pytest.raises(ShapeError, match="contact sheet"):
        write_contact_sheet(tmp_path / "a.png", tmp_path / "a.gif", broken, PROMPTS, fps=8)
