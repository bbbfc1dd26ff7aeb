"""Measured times become the simulator's timeline; what a rank waited for is told apart."""

import pytest

from cluster.chrome_trace import trace_events
from cluster.measured import (
    MeasuredUsage,
    key_of_call,
    key_of_work,
    measured_timeline,
    path_seconds,
)
from cluster.schedule.execution import IssuedCall
from cluster.schedule.program import Pass, Stage, Team
from cluster.schedule.schedule import order_calls
from cluster.schedule.simulate import Cause, Costs, by_stage, simulate
from cluster.spans import Label, Work

PROGRAM = (
    Pass(
        (
            Stage("make", "maker"),
            Stage("look", "judge", ("make",)),
            Stage("end", "maker", ("look",)),
        )
    ),
)
TEAMS = {"maker": Team(), "judge": Team()}
SECONDS = {("maker", "make"): 2.0, ("judge", "look"): 3.0, ("maker", "end"): 1.0}
APART = {("maker", 0): ("here", 1), ("judge", 0): ("here", 2)}
CONTROLLER = ("here", 3)


def simulated(latency_s: float = 0.0):
    """Two micro-batches as the simulator sees them, written down as the ranks would."""
    calls = order_calls(PROGRAM, TEAMS, 2, 2)
    timeline = simulate(calls, Costs(by_stage(SECONDS), latency_s=latency_s), TEAMS)
    works = [
        Work(
            span.call.role,
            span.call.rank,
            span.call.stage,
            Label(span.call.iteration, span.call.part, span.call.micro_batch),
            *(100 + at for at in (span.start_s, span.start_s, span.end_s, span.end_s)),
        )
        for span in timeline.spans
    ]
    asked = [IssuedCall(place, call, 100.0) for place, call in enumerate(calls)]
    return timeline, asked, works


@pytest.mark.parametrize("latency_s", [0.0, 0.5])
def test_times_that_follow_the_simulator_have_its_critical_path(latency_s: float):
    expected, asked, works = simulated(latency_s)
    by_key = {key_of_work(work): work for work in works}
    found = measured_timeline(asked, by_key, APART, CONTROLLER)
    assert found.duration_s == pytest.approx(expected.duration_s)
    assert found.critical_path() == expected.critical_path()
    path = path_seconds(found)
    assert sum(path.values()) == pytest.approx(expected.duration_s)
    # make, look, look, end: the judge is the bottleneck.
    assert path["judge.look"] == pytest.approx(6.0)
    assert path["between calls"] == pytest.approx(2 * latency_s)


def test_what_lies_before_the_end_of_the_iteration_before_is_left_out():
    expected, asked, works = simulated()
    found = measured_timeline(asked, {key_of_work(work): work for work in works}, APART, CONTROLLER)
    path = path_seconds(found, since_s=3.0)
    assert sum(path.values()) == pytest.approx(expected.duration_s - 3.0)
    assert "maker.make" not in path or path["maker.make"] == 0


def test_roles_of_one_process_take_turns():
    _, asked, works = simulated()
    at_s, turns = 100.0, []
    for work in works:
        end_s = at_s + work.seconds
        turns.append(Work(work.role, 0, work.method, work.label, at_s, at_s, end_s, end_s))
        at_s = end_s
    by_key = {key_of_work(work): work for work in turns}
    together = dict.fromkeys(APART, CONTROLLER)
    found = measured_timeline(asked, by_key, together, CONTROLLER)
    assert found.critical_path() == list(range(len(asked)))
    assert {span.cause for span in found.spans[1:]} == {Cause.PROCESS}


def test_a_rank_is_transferring_while_what_it_takes_is_packed_unpacked_or_on_its_way():
    used = MeasuredUsage()
    used.add(Work("judge", 0, "look", Label(), 3.0, 3.5, 7.0, 7.25), could_begin_s=2.0)
    assert used.busy_s == 3.5
    assert used.transferring_s == 1.0 + 0.5 + 0.25


def test_a_trace_names_roles_and_ranks_and_ties_makers_to_takers():
    _, asked, works = simulated(0.5)
    events = trace_events(works, [asked])
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["controller", "maker", "judge"]
    slices = [event for event in events if event["ph"] == "X"]
    assert [one["name"] for one in slices].count("make") == 2
    look = next(one for one in slices if one["name"] == "look")
    assert (look["ts"], look["dur"], look["pid"]) == (102.5e6, 3e6, 2)
    assert look["args"] == {"iteration": 0, "micro_batch": 0, "phase": 0}
    starts, ends = ([e for e in events if e["ph"] == kind] for kind in "sf")
    assert len(starts) == len(ends) == sum(len(one.call.inputs) for one in asked)
    for start, end in zip(starts, ends, strict=True):
        assert start["id"] == end["id"]
        assert start["ts"] <= end["ts"]
    assert {key_of_call(one) for one in asked} == {key_of_work(work) for work in works}
