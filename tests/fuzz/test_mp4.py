"""A damaged video is decoded to the wanted clip or refused; it never ends or blocks the process."""

import math
import signal
from dataclasses import dataclass

import numpy as np
import pytest

from pipelines.data.clips.clip_decoding import decode_clip, read_facts
from pipelines.data.clips.clip_errors import ClipError
from pipelines.data.clips.clip_format import ClipFormat
from pipelines.data.clips.transcoding import transcode
from pipelines.data.making.ordered_pool import map_in_order
from tests.fuzz.mutations import CASE_LIMIT_S, NUM_CASES, mutate_bytes
from tests.helpers.video_files import grey_frames, video_file

WANTED = ClipFormat(num_frames=12, height=16, width=24, fps=8)
LEVELS = range(10, 250, 16)


@dataclass(frozen=True)
class Case:
    """A video to be damaged by seed."""

    data: bytes
    seed: int


def outcomes(case: Case) -> list[str]:
    """What every way of decoding makes of a damaged video: "clip", or the fault's name."""
    # The signal ends the process, since a loop in FFmpeg runs no handler of Python's.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, CASE_LIMIT_S)
    found = []
    data = mutate_bytes(case.data, case.seed)
    for decode in (_decode, _read, _transcode):
        try:
            decode(data)
            found.append("clip")
        except ClipError as error:
            found.append(str(error.fault))
    signal.setitimer(signal.ITIMER_REAL, 0)
    return found


def _decode(data: bytes) -> None:
    clip = decode_clip(data, WANTED)
    assert clip.shape == (12, 16, 24, 3)
    assert clip.dtype == np.uint8


def _read(data: bytes) -> None:
    facts = read_facts(data)
    assert min(facts.num_frames, facts.height, facts.width) > 0
    assert min(facts.duration_s, facts.fps) > 0
    assert max(facts.duration_s, facts.fps) < math.inf


def _transcode(data: bytes) -> None:
    video, fps = transcode(data, WANTED)
    assert fps == 8
    assert read_facts(video).num_frames == 12


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mp4", pytest.param("webm", marks=pytest.mark.slow)])
def test_a_damaged_video_gives_the_wanted_clip_or_a_fault(kind):
    codec = "libx264" if kind == "mp4" else "libvpx-vp9"
    pix_fmt = "yuv444p" if kind == "mp4" else "yuv420p"
    data = video_file(
        grey_frames(list(LEVELS)), container_format=kind, codec=codec, pix_fmt=pix_fmt
    )
    decode_clip(data, WANTED)
    cases = [Case(data, seed) for seed in range(NUM_CASES)]
    found = list(map_in_order(outcomes, cases, 1, max_hang_s=0))
    assert all(isinstance(each, list) for each in found), found
    assert any(each != ["clip"] * 3 for each in found)
