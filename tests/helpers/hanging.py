"""A decoder that hangs, ends its process or fails on files that ask for it."""

import ctypes
import os

import numpy as np

from pipelines.data.clips.clip_decoding import ClipDecoder
from pipelines.data.clips.hang_guard import guarded
from pipelines.media.video import Pixels

HANG, CRASH = b"hang", b"crash"


class OddDecoder(ClipDecoder):
    """`ClipDecoder`, except for the files `HANG` and `CRASH`."""

    def __call__(self, data: bytes, fps: float = 0.0) -> Pixels:
        """Pixels of one file."""
        if data == CRASH:
            os._exit(7)
        if data == HANG:
            with guarded():
                # Called so, a function of C keeps the interpreter's lock: no thread could act.
                ctypes.PyDLL(None).sleep(600)
        return ClipDecoder.__call__(self, data, fps)


def grey_clip(value: int) -> Pixels:
    """A clip (5, 32, 32, 3) of one grey."""
    return np.full((5, 32, 32, 3), value, np.uint8)


class HangingBound(int):
    """A bound on the pixels of a picture: whoever compares 48x48 pixels with it never returns."""

    def __lt__(self, pixels: int) -> bool:
        if pixels == 48 * 48:
            ctypes.PyDLL(None).sleep(600)
        return int(self) < pixels


def unsendable(_: object) -> object:
    """Returns what pickle does not take."""
    return lambda: None


def own_id(_: object) -> int:
    """Number of the process that calls it."""
    return os.getpid()
