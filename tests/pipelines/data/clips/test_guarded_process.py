"""A process that decodes for another one: what a crash or a hang costs, and what it does not."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.clips.clip_errors import ClipError
from pipelines.data.clips.clip_format import ClipFormat
from pipelines.data.clips.guarded_process import Died, GuardedProcess
from pipelines.media.video import encode_mp4
from tests.helpers.hanging import CRASH, HANG, OddDecoder, grey_clip, own_id, unsendable

DECODE = OddDecoder(ClipFormat(5, 32, 32, fps=8))
# Longer than any call of a healthy decoder on a busy machine.
LIMIT_S = 2.0


@pytest.mark.slow
def test_a_hang_and_a_crash_cost_one_item_each_and_the_others_keep_their_bits() -> None:
    process = GuardedProcess(LIMIT_S, tries=1)
    good = encode_mp4(grey_clip(90), 8)
    try:
        for bad, hung in ((HANG, True), (CRASH, False)):
            assert np.array_equal(process.apply(DECODE, good), DECODE(good))
            assert process.apply(DECODE, bad) == Died(bad, hung)
        with pytest.raises(ClipError, match="Invalid data") as caught:
            process.apply(DECODE, b"no video")
        assert caught.value.fault == "undecodable"
        assert np.array_equal(process.apply(DECODE, good, 8.0), DECODE(good))
    finally:
        process.close()


@pytest.mark.slow
def test_a_result_that_cannot_be_sent_is_an_error_and_no_death() -> None:
    process = GuardedProcess(LIMIT_S)
    try:
        number = process.apply(own_id, 0)
        with pytest.raises(RuntimeError, match=r"a result \(function\) that cannot be sent"):
            process.apply(unsendable, 0)
        assert process.apply(own_id, 0) == number
    finally:
        process.close()


@pytest.mark.slow
def test_what_ends_a_process_is_tried_twice() -> None:
    process = GuardedProcess(LIMIT_S)
    try:
        started = time.monotonic()
        died = process.apply(DECODE, CRASH)
        assert died == Died(CRASH)
        assert time.monotonic() - started < 60.0
        assert "twice" in died.in_words
    finally:
        process.close()


@pytest.mark.slow
def test_the_process_ends_with_the_one_it_works_for() -> None:
    code = (
        "import os\n"
        "from pipelines.data.clips.guarded_process import decoding_process\n"
        "from tests.helpers.hanging import own_id\n"
        "print(decoding_process(5.0).apply(own_id, 0), flush=True)\n"
        "os._exit(9)\n"
    )
    root = Path(__file__).parents[4]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 9, done.stderr
    deadline = time.monotonic() + 60
    while Path(f"/proc/{int(done.stdout)}").exists():
        assert time.monotonic() < deadline, "the process is still there"
        time.sleep(0.05)
