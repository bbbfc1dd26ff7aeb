"""Who is accused and who is not: the rules of the watch, and the words for deaths, without Ray."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from cluster.ray.deaths import cause_of
from cluster.ray.partners import SignsOfLife
from cluster.ray.processes import ProcessLook, last_lines
from cluster.ray.progress import ProgressReport
from cluster.ray.watch_rules import (
    StoppedRaylets,
    WatchedProcess,
    WatchLimits,
    cause_of_delay,
    cause_of_silence,
    has_gone_on,
    silent,
    stuck,
)

LIMITS = WatchLimits(
    20.0, 600.0, 300.0, unmeasured=frozenset({"feed"}), first_call_of={"validator": 7200.0}
)
IDLE = ProgressReport(
    1, 7, 9, "node", "host", "", "", 3, "S", 0, 2**30, {"generator": 0, "teacher": 1}
)
BUSY = replace(
    IDLE, group="generator", method="learn", iteration=4, label="part 0", num_earlier=8, usual_s=1
)


def process(report: ProgressReport, silent_s: float = 0.5, partners: str = "own") -> WatchedProcess:
    return WatchedProcess(object(), partners, report, silent_s)


@pytest.mark.parametrize(
    ("changes", "limit_s"),
    [
        ({"usual_s": 1.0}, 20.0),
        ({"usual_s": 30.0}, 150.0),
        ({"usual_s": 1.0, "longest_s": 40.0}, 80.0),
        ({"usual_s": 200.0, "longest_s": 400.0}, 600.0),
        ({"num_earlier": 0}, 600.0),
        ({"iteration": None}, 600.0),
        ({"group": "feed"}, 600.0),
        ({"group": "validator", "iteration": None}, 7200.0),
        ({"method": "build"}, 300.0),
    ],
)
def test_the_limit_of_a_call_comes_from_earlier_ones_like_it(
    changes: dict[str, Any], limit_s: float
):
    report = replace(BUSY, **changes)
    assert LIMITS.of(report) == limit_s
    assert stuck([process(replace(report, seconds=limit_s - 0.1))], LIMITS) == []
    assert len(stuck([process(replace(report, seconds=limit_s + 0.1))], LIMITS)) == 1


def test_a_process_between_two_calls_is_never_stuck_but_may_be_silent():
    assert stuck([process(IDLE)], LIMITS) == []
    assert silent([process(IDLE, 19.0), process(BUSY, 19.0)], LIMITS) == []
    accused = process(IDLE, 21.0)
    assert silent([process(BUSY), accused], LIMITS) == [accused]
    assert accused.name == "generator rank 0"


def test_nobody_is_stuck_while_another_process_is_silent():
    late = process(replace(BUSY, seconds=99.0))
    assert stuck([late, process(IDLE, 4.0)], LIMITS) == [late]
    assert stuck([late, process(IDLE, 6.0)], LIMITS) == []


def test_a_rank_that_waits_in_a_collective_is_not_accused():
    first = process(replace(BUSY, seconds=99.0, collectives=5), partners="world")
    late = process(replace(BUSY, seconds=98.0, collectives=4), partners="world")
    assert stuck([first, late], LIMITS) == [late]
    # Its partner's arguments have not arrived: neither of them is late.
    waiting = process(replace(IDLE, collectives=4), partners="world")
    assert stuck([first, waiting], LIMITS) == []
    # It has left the collectives that its partner has not come to, so it is not waited for.
    done = process(replace(IDLE, collectives=6), partners="world")
    assert stuck([first, done], LIMITS) == [first]
    # Of another world.
    assert stuck([first, replace(late, partners="other")], LIMITS) == [
        first,
        replace(late, partners="other"),
    ]


def test_of_ranks_that_hang_in_the_same_collective_the_cause_says_so():
    first, second = (
        process(replace(BUSY, seconds=99.0, collectives=5, workers={"generator": rank}), 0.5, "one")
        for rank in (0, 1)
    )
    other = process(replace(BUSY, seconds=99.0, collectives=5, workers={"teacher": 0}), 0.5, "two")
    accused = stuck([first, second, other], LIMITS)
    assert accused == [first, second, other]
    cause = cause_of_delay(first, accused, LIMITS)
    assert cause.endswith("longer than the limit of 20 s; so was generator rank 1, as far as it")
    assert cause_of_delay(other, accused, LIMITS).endswith("longer than the limit of 20 s")


@pytest.mark.parametrize(
    ("seen", "cause"),
    [
        (ProcessLook("S", False, (), 0), "it was frozen: no sign of life for 21 s"),
        (ProcessLook("T", False, (), 0), "it was frozen (stopped): no sign of life for 21 s"),
        (ProcessLook("R", True, (), 0), ""),
        (ProcessLook("D", False, (), 0), ""),
        (ProcessLook("t", False, (), 0), ""),
        (None, ""),
    ],
)
def test_a_silent_process_is_accused_only_of_what_is_known(seen: ProcessLook | None, cause: str):
    assert cause_of_silence(process(BUSY, 21.0), seen, LIMITS).startswith(cause)
    assert bool(cause_of_silence(process(BUSY, 21.0), seen, LIMITS)) == bool(cause)


@pytest.mark.parametrize(
    ("seen", "excuse"),
    [
        (None, "its machine does not answer"),
        (ProcessLook("D", False, (), 0), "it waits in the kernel (state D)"),
        (ProcessLook("R", True, (), 0), "it uses a processor all the while"),
    ],
)
def test_what_is_not_known_excuses_as_long_as_a_first_call_may_take(
    seen: ProcessLook | None, excuse: str
):
    assert not cause_of_silence(process(BUSY, 599.0), seen, LIMITS)
    cause = cause_of_silence(process(BUSY, 601.0), seen, LIMITS)
    assert cause.startswith("it was frozen: no sign of life for 601 s, in learn()")
    assert cause.endswith(f"; {excuse}")


def test_who_reports_or_leaves_its_call_after_the_accusation_is_let_off():
    late = process(replace(BUSY, count=30, seconds=9.0), 21.0)
    assert not has_gone_on(late, late.report, LIMITS)
    assert has_gone_on(late, replace(late.report, count=31, seconds=31.0), LIMITS)
    # A process that is stuck reports all the while.
    hung = process(replace(BUSY, count=30, seconds=99.0))
    assert not has_gone_on(hung, replace(hung.report, count=42, seconds=111.0), LIMITS)
    assert has_gone_on(hung, replace(hung.report, count=42, seconds=8.0), LIMITS)
    assert has_gone_on(hung, replace(IDLE, count=42), LIMITS)
    # Its group has been closed.
    assert has_gone_on(late, None, LIMITS)
    assert has_gone_on(hung, None, LIMITS)


def test_a_report_that_could_not_be_read_at_first_is_no_sign_of_life():
    signs = SignsOfLife()
    assert not signs.goes_on("dead", None)
    assert not signs.goes_on("dead", 500)
    assert not signs.goes_on("dead", None)
    # The last one was under way when its process ended.
    assert not signs.goes_on("dead", 501)
    assert not signs.goes_on("alive", 7)
    assert not signs.goes_on("alive", 8)
    assert signs.goes_on("alive", 9)


def test_a_stopped_raylet_is_known_by_its_machine():
    raylets = StoppedRaylets()
    assert raylets.stopped_s("left", "T", 100.0) == 0.0
    # Another machine may have a raylet of the same process id.
    assert raylets.stopped_s("right", "S", 105.0) == 0.0
    assert raylets.stopped_s("left", "T", 110.0) == 10.0
    raylets.forgive(8.0)
    assert raylets.stopped_s("left", "T", 120.0) == 12.0
    assert raylets.stopped_s("left", "R", 121.0) == 0.0
    assert raylets.stopped_s("left", "T", 122.0) == 0.0


RAYS = "The actor is dead because its worker process has died. Worker exit type: {}"


@pytest.mark.parametrize(
    ("words", "lines", "more_kills", "cause"),
    [
        ("SYSTEM_ERROR code 2. End of file.", (), 0, "it ended without a word, as after SIGKILL"),
        (
            "SYSTEM_ERROR code 2. End of file.",
            (),
            1,
            "the system ended it because main memory ran out",
        ),
        ("NODE_OUT_OF_MEMORY", (), 0, "Ray ended it because its machine ran low on memory"),
        ("SYSTEM_ERROR exits with an exit code 3.", (), 0, "it ended itself with exit code 3"),
        (
            "SYSTEM_ERROR exits with an exit code 1. The process receives a SIGTERM.",
            (),
            0,
            "it was ended by SIGTERM",
        ),
        (
            "SYSTEM_ERROR code 2. End of file.",
            ("Fatal Python error: Bus error",),
            0,
            "it crashed with a bus error",
        ),
        ("because it was killed by `ray.kill`.", (), 0, "it was ended by its own run"),
    ],
)
def test_the_cause_of_a_death_is_one_sentence(
    words: str, lines: tuple[str, ...], more_kills: int, cause: str
):
    found = cause_of(RAYS.format(words), lines, BUSY, more_kills)
    assert found.startswith(cause)
    assert "in learn() of iteration 4, part 0" in found
    assert "." not in found.replace("1 GiB", "")


def test_the_log_of_a_crash_is_told_from_what_happened_on(tmp_path: Path):
    calls = [f'  File "model.py", line {n} in forward' for n in range(60)]
    fatal = "Fatal Python error: Segmentation fault"
    log = tmp_path / "worker.log"
    log.write_text("\n".join(["loading", fatal, "", *calls, "Extension modules: torch._C"]))
    lines = last_lines(str(log), 20)
    assert lines == (fatal, *calls[:19])
    log.write_text("\n".join(["loading", fatal, *calls[:3]]))
    assert last_lines(str(log), 20) == ("loading", fatal, *calls[:3])


def test_a_process_that_has_not_reported_its_workers_is_named_by_its_group():
    report = replace(IDLE, workers={}, group="")
    assert WatchedProcess(object(), "x", report, 7.0, ("teacher", 1)).name == "teacher rank 1"
    assert WatchedProcess(object(), "x", IDLE, 7.0, ("other", 1)).name == "generator rank 0"
