"""Pixels written down: mp4 bytes and GIF files.

Pixels are uint8 arrays (frames, height, width, 3) in RGB.
"""

import io
from pathlib import Path
from typing import Literal

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cluster.files import write_whole
from sgmd_core.errors import ShapeError

Pixels = NDArray[np.uint8]


REPEATABLE_X264 = {"threads": "1", "x264-params": "mbtree=0"}
"""Options of x264 that make the same bytes of the same frames.

Its macroblock tree gives small clips other bytes now and then, also on one thread.
"""


def encode_mp4(
    frames: Pixels, fps: int, *, crf: int = 8, pix_fmt: Literal["yuv444p", "yuv420p"] = "yuv444p"
) -> bytes:
    """Encode frames as an H.264 mp4 file.

    Args:
        frames: Pixels (frames, height, width, 3).
        fps: Frames per second.
        crf: Constant rate factor of x264; 0 is lossless, 8 hardly visible, 23 its default.
        pix_fmt: `yuv444p` keeps chroma at full resolution, since small clips lose their colours
            otherwise; `yuv420p` is what browsers and phones play, and needs even sizes.

    Returns:
        The bytes of the file.

    Raises:
        ShapeError: not an RGB uint8 clip.
    """
    _require_pixels(frames, "encoding a video")
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        options = REPEATABLE_X264 | {"preset": "veryfast", "crf": str(crf)}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def encode_for_players(frames: Pixels, fps: int, *, smallest_side_px: int = 256) -> bytes:
    """Encode frames as an mp4 that browsers, phones and desktop players show alike.

    H.264 with halved chroma is the one format that all of them decode. Small clips are enlarged
    by whole pixels first: players show 32 px as a dot, and halved chroma would smear its colours.

    Args:
        frames: Pixels (frames, height, width, 3); an odd last row or column is cut off, because
            halved chroma needs even sizes.
        fps: Frames per second.
        smallest_side_px: The shorter side grows to at least this size; 32 px become 256.

    Raises:
        ShapeError: not an RGB uint8 clip.
    """
    _require_pixels(frames, "encoding a video")
    repeats = max(1, -(-smallest_side_px // min(frames.shape[1:3])))
    large = frames.repeat(repeats, axis=1).repeat(repeats, axis=2)
    height, width = (size - size % 2 for size in large.shape[1:3])
    return encode_mp4(large[:, :height, :width], fps, crf=16, pix_fmt="yuv420p")


def write_gif(path: Path, frames: Pixels, fps: int, *, zoom: int = 1) -> None:
    """Write frames as a looping GIF, each pixel repeated `zoom` times."""
    _require_pixels(frames, "writing a GIF")
    images = [_image(frame, zoom) for frame in frames]
    file = io.BytesIO()
    images[0].save(
        file, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0
    )
    write_whole(path, file.getvalue())


def _image(frame: Pixels, zoom: int) -> Image.Image:
    image = Image.fromarray(frame)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def _require_pixels(frames: Pixels, attempted: str) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ShapeError(
            attempted,
            f"an array of shape {frames.shape} and type {frames.dtype}",
            "uint8 pixels (frames >= 1, height, width, 3)",
        )
