"""Round trips of encoded videos, and the pictures made of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.shapes import FPS, Split, render_batch
from pipelines.video import (
    contact_sheet,
    decode_video,
    encode_mp4,
    film_strip,
    write_gif,
    write_png,
)
from sgmd_core.errors import DataError, ShapeError


def rendered_clip() -> np.ndarray:
    pixels, _ = render_batch(0, [3], Split.TRAIN)
    return pixels[0]


def test_mp4_keeps_frames_and_colours() -> None:
    clip = rendered_clip()
    data = encode_mp4(clip, FPS)
    assert data[4:8] == b"ftyp"
    decoded = decode_video(data)
    assert decoded.shape == clip.shape
    error = np.mean((decoded.astype(float) - clip.astype(float)) ** 2)
    assert 10 * np.log10(255**2 / error) > 40


def test_the_same_clip_gives_the_same_file() -> None:
    assert encode_mp4(rendered_clip(), FPS) == encode_mp4(rendered_clip(), FPS)


@pytest.mark.parametrize("data", [b"", b"no video at all", encode_mp4(rendered_clip(), FPS)[:300]])
def test_bytes_that_are_no_video_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="decoding a video"):
        decode_video(data)


def test_wrong_pixels_are_refused() -> None:
    with pytest.raises(ShapeError, match="uint8 pixels"):
        encode_mp4(np.zeros((13, 32, 32), np.uint8), FPS)


def test_gif_holds_every_frame_zoomed(tmp_path: Path) -> None:
    write_gif(tmp_path / "clip.gif", rendered_clip(), FPS, zoom=3)
    with Image.open(tmp_path / "clip.gif") as image:
        assert (image.n_frames, image.size) == (13, (96, 96))


def test_contact_sheet_stacks_rows_of_film_strips(tmp_path: Path) -> None:
    strip = film_strip(rendered_clip(), 4, zoom=2)
    assert strip.shape == (64, 4 * 64 + 3 * 2, 3)
    sheet = contact_sheet([[strip], [strip]], ["first", "second"])
    assert sheet.shape[0] > 2 * strip.shape[0]
    write_png(tmp_path / "sheet.png", sheet)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (sheet.shape[1], sheet.shape[0])
