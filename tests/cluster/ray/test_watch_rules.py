"""Who is accused and who is not: the rules of the watch, and the words for deaths, without Ray."""

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("ray")

from cluster.ray.deaths import cause_of
from cluster.ray.progress import ProgressReport
from cluster.ray.watch import WatchedProcess, WatchLimits, silent, stuck

LIMITS = WatchLimits(
    20.0, 600.0, 300.0, unmeasured=frozenset({"feed"}), first_call_of={"validator": 7200.0}
)
IDLE = ProgressReport(
    1, 7, 9, "node", "host", "", "", 3, "S", 0, 2**30, {"generator": 0, "teacher": 1}
)
BUSY = replace(
    IDLE, group="generator", method="learn", iteration=4, label="phase 0", num_earlier=8, usual_s=1
)


def process(report: ProgressReport, silent_s: float = 0.5, partners: str = "own") -> WatchedProcess:
    return WatchedProcess(object(), partners, report, silent_s)


@pytest.mark.parametrize(
    ("changes", "limit_s"),
    [
        ({"usual_s": 1.0}, 20.0),
        ({"usual_s": 30.0}, 150.0),
        ({"usual_s": 1.0, "longest_s": 40.0}, 80.0),
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
    # Of another world.
    assert stuck([first, replace(late, partners="other")], LIMITS) == [
        first,
        replace(late, partners="other"),
    ]


RAYS = "The actor is dead because its worker process has died. Worker exit type: {}"


@pytest.mark.parametrize(
    ("words", "lines", "more_kills", "cause"),
    [
        ("SYSTEM_ERROR code 2. End of file.", (), 0, "it ended without a word, as after SIGKILL"),
        ("SYSTEM_ERROR code 2. End of file.", (), 1, "the system ended it for want of main memory"),
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
    assert "in learn() of iteration 4, phase 0" in found
    assert "." not in found.replace("1 GiB", "")
