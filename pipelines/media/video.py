"""Encoded video files and pixels: mp4 bytes and GIF files.

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
from sgmd_core.errors import DataError, ShapeError

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


def decode_video(data: bytes) -> Pixels:
    """Decode every frame of an encoded video file.

    Returns:
        Pixels (frames, height, width, 3).

    Raises:
        DataError: the bytes are no video that PyAV can read, or hold no frame.
    """
    try:
        with av.open(io.BytesIO(data), "r") as container:
            frames = [_rgb(frame) for frame in container.decode(container.streams.video[0])]
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise DataError(
            "decoding a video", f"{len(data)} bytes that are not a readable video ({error})"
        ) from error
    if not frames:
        raise DataError("decoding a video", f"{len(data)} bytes without a single frame")
    return np.stack(frames)


def shrink_video(data: bytes, width_px: int, crf: int) -> bytes:
    """Encode a video file anew, smaller, for players as `encode_for_players` does.

    Args:
        data: The bytes of a video file.
        width_px: Width to shrink to; a narrower video keeps its size.
        crf: Constant rate factor of x264; the larger, the smaller the file.

    Raises:
        DataError: the bytes are no video that PyAV can read.
    """
    frames, fps = decode_video(data), _rate(data)
    height, width = frames.shape[1:3]
    width_px = min(width, width_px) // 2 * 2
    size = (width_px, max(2, round(height * width_px / width / 2) * 2))
    images = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames]
    small = np.stack([np.asarray(image) for image in images])
    return encode_mp4(small, fps, crf=crf, pix_fmt="yuv420p")


def first_frame(data: bytes) -> NDArray[np.uint8]:
    """The first picture (height, width, 3) of a video file; the others are not decoded.

    Raises:
        DataError: the bytes are no video that PyAV can read, or hold no frame.
    """
    try:
        with av.open(io.BytesIO(data), "r") as container:
            return _rgb(next(container.decode(container.streams.video[0])))
    except (av.FFmpegError, IndexError, ValueError, StopIteration) as error:
        raise DataError(
            "decoding a video", f"{len(data)} bytes that are not a readable video ({error})"
        ) from error


def _rate(data: bytes) -> int:
    """Frames per second of a video file that can be decoded, as a whole number."""
    with av.open(io.BytesIO(data), "r") as container:
        rate = container.streams.video[0].average_rate
    return max(1, round(rate)) if rate else 1


def _rgb(frame: av.VideoFrame) -> Pixels:
    return frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)


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
