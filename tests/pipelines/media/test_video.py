"""Round trips of encoded videos."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipelines.data.clips.clip_decoding import decode_video, first_frame
from pipelines.data.clips.transcoding import shrink_video
from pipelines.media.video import (
    encode_for_players,
    encode_mp4,
    write_gif,
)
from pipelines.shapes import FPS, ClipSplit, render_batch
from sgmd_core.errors import DataError, ShapeError


def rendered_clip() -> np.ndarray:
    pixels, _ = render_batch(0, [3], ClipSplit.TRAIN)
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


def test_players_get_even_sizes_and_small_clips_enlarged() -> None:
    assert decode_video(encode_for_players(rendered_clip(), FPS)).shape == (13, 256, 256, 3)
    odd = np.zeros((2, 301, 333, 3), np.uint8)
    assert decode_video(encode_for_players(odd, FPS)).shape == (2, 300, 332, 3)


def test_a_shrunk_video_keeps_its_frames_its_rate_and_its_shape() -> None:
    wide = np.repeat(rendered_clip(), 2, axis=2)
    large = encode_for_players(wide, 12)
    small = shrink_video(large, 100, crf=20)
    assert decode_video(small).shape == (13, 50, 100, 3)
    with av.open(io.BytesIO(small)) as container:
        assert container.streams.video[0].average_rate == 12
    assert decode_video(shrink_video(large, 4000, crf=20)).shape == (13, 256, 512, 3)


def test_the_first_frame_is_the_first_one() -> None:
    data = encode_mp4(rendered_clip(), FPS)
    assert np.array_equal(first_frame(data), decode_video(data)[0])
    with pytest.raises(DataError, match="decoding a video"):
        first_frame(data[:300])


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
