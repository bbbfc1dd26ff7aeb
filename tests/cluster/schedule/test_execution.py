"""A schedule is worked through in its order; failures stop it, futures do not pile up."""

import gc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.local import LocalWorkerGroup
from cluster.schedule.execution import IterationResult, execute_schedule
from cluster.schedule.program import Pass, Program, Stage, Team, Update, WeightTransfer
from cluster.schedule.schedule import REPORT, STEP, Call, order_calls
from cluster.spans import Label
from cluster.worker_group import Future
from tests.cluster.toys import WAIT_S, Letters

PROGRAM: Program = (
    Pass(
        (
            Stage("make", "maker", keeps_until="learn"),
            Stage("look", "judge", ("make",)),
            Stage("learn", "maker", ("look",), accumulates=True),
        )
    ),
    Update(("maker",)),
    WeightTransfer(("maker", "show"), ("judge", "copy")),
)
TEAMS = {"maker": Team(ranks=2), "judge": Team(replicas=3)}


@dataclass
class Hand:
    """Says what was done in which order."""

    done: list[str] = field(default_factory=list)

    def make(self, name: str) -> Letters:
        self.done.append(f"make {name}")
        return Letters(name)

    def look(self, seen: Letters) -> Letters:
        self.done.append(f"look {seen.text}")
        if "?" in seen.text:
            raise ValueError(f"cannot read {seen.text}")
        return Letters(seen.text.upper())

    def learn(self, seen: Letters) -> str:
        self.done.append(f"learn {seen.text}")
        return seen.text

    def note(self, name: str) -> str:
        self.done.append(name)
        return name

    def copy(self, shown: str) -> str:
        return f"copied {shown}"


class Tracked(Letters):
    """Letters that weak references can point to."""


class Stand:
    """Two roles in this process, and a record of the futures that are alive."""

    def __init__(self, text: str = "abcdefgh") -> None:
        self.text = text
        self.groups = {
            role: LocalWorkerGroup(role, [Hand() for _ in range(team.size)])
            for role, team in TEAMS.items()
        }
        self.refused = ""

    def ask(self, call: Call, given: Mapping[str, Future[Any]]) -> Future[Any]:
        group, rank = self.groups[call.role], call.rank
        if call.stage == "make":
            first = 4 * (call.micro_batch or 0)
            part = self.text[first + call.samples[0] : first + call.samples[1]]
            return group.call_rank(rank, Hand.make, part)
        if call.stage in ("look", "learn", "copy"):
            (value,) = given.values()
            return group.call_rank(rank, getattr(Hand, call.stage), value)
        return group.call_rank(rank, Hand.note, call.stage)

    def on_report(self, call: Call, report: Any) -> None:
        if report == self.refused:
            raise ArithmeticError(f"{call.role}: {report}")

    def run(
        self, depth: int = 2, num_iterations: int = 1, max_staleness: int = 0
    ) -> list[IterationResult]:
        calls = order_calls(
            PROGRAM,
            TEAMS,
            2,
            depth,
            samples_per_micro_batch=4,
            iterations=range(num_iterations),
            max_staleness=max_staleness,
        )
        return list(execute_schedule(calls, self.groups, self.ask, self.on_report, WAIT_S))


def test_reports_are_the_results_that_nobody_takes():
    (result,) = Stand().run()
    assert [(call.rank, report) for call, report in result.of("learn")] == [
        (0, "AB"),
        (1, "CD"),
        (0, "EF"),
        (1, "GH"),
    ]
    assert [report for _, report in result.of("copy")] == ["copied show"] * 3
    assert [report for _, report in result.of(STEP)] == [STEP] * 2
    assert not result.of("make")


@pytest.mark.parametrize("depth", [1, 2])
def test_samples_are_cut_and_joined_on_the_way_whatever_the_depth(depth: int):
    stand = Stand()
    stand.run(depth)
    looked = [
        [word for word in hand.done if word.startswith("look")]
        for hand in stand.groups["judge"]._workers
    ]
    # Four samples over three judges: one of them gets two, each time another one.
    assert looked == [["look ab", "look h"], ["look c", "look ef"], ["look d", "look g"]]


def test_a_failure_is_told_as_itself_and_nothing_is_updated():
    stand = Stand("abc?efgh")
    with pytest.raises(ValueError, match="cannot read"):
        stand.run()
    assert not any(STEP in hand.done for hand in stand.groups["maker"]._workers)


def test_a_report_that_is_refused_stops_before_the_update():
    stand = Stand()
    stand.refused = REPORT
    with pytest.raises(ArithmeticError, match="maker"):
        stand.run()
    assert not any(STEP in hand.done for hand in stand.groups["maker"]._workers)


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_every_iteration_comes_once_with_all_of_its_calls(max_staleness: int):
    stand = Stand("abcdefgh")
    found = stand.run(num_iterations=3, max_staleness=max_staleness)
    assert [result.iteration for result in found] == [0, 1, 2]
    assert len({len(result.issued) for result in found}) == 1
    assert all(one.call.iteration == w.iteration for w in found for one in w.issued)


def test_calls_are_labelled_with_what_they_are_part_of():
    stand = Stand()
    stand.run()
    group = stand.groups["judge"]
    (works,) = group.fetch(group.ask_work(), WAIT_S, "reading times")
    assert {work.label for work in works if work.method == "look"} == {
        Label(0, 0, 0),
        Label(0, 0, 1),
    }
    assert all(work.arrived_s <= work.began_s <= work.ended_s <= work.left_s for work in works)


def test_a_claim_is_let_go_after_its_last_use():
    alive: list[weakref.ref[Letters]] = []
    most = 0

    class Counting(Stand):
        def ask(self, call: Call, given: Mapping[str, Future[Any]]) -> Future[Any]:
            nonlocal most
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
            return super().ask(call, given)

    stand = Counting()
    for hand in stand.groups["maker"]._workers:
        plain = hand.make

        def make(name: str, plain: Any = plain) -> Letters:
            made = Tracked(plain(name).text)
            alive.append(weakref.ref(made))
            return made

        hand.make = make
    # Nothing but what the run makes is searched for cycles: other tests leave millions of objects.
    gc.freeze()
    try:
        stand.run(depth=1, num_iterations=3)
    finally:
        gc.unfreeze()
    assert len(alive) == 12
    assert most <= 4


def test_what_a_rank_makes_that_stands_in_is_no_report_where_others_are_handed_on():
    teams = {"maker": Team(ranks=3), "judge": Team(ranks=3)}
    calls = order_calls(PROGRAM, teams, 2, 2, samples_per_micro_batch=[3, 2])
    assert any(call.stands_in and call.stage == "look" for call in calls)
    stand = Stand()
    stand.groups = {
        role: LocalWorkerGroup(role, [Hand() for _ in range(team.size)])
        for role, team in teams.items()
    }
    (result,) = execute_schedule(calls, stand.groups, stand.ask, stand.on_report, WAIT_S)
    assert {call.stage for call, _ in result.reports} == {"learn", REPORT, STEP, "copy", "show"}
    # It has worked all the same, for the collectives of the others.
    standing = [(call.stage, call.rank) for call in calls if call.stands_in]
    assert sorted(standing) == [("learn", 2), ("look", 2), ("make", 2)]
    done = [hand.done for hand in stand.groups["judge"]._workers]
    assert done[2][-1].startswith("look")
    assert len(done[2]) == 2


class Hung(Hand):
    def look(self, seen: Letters) -> Letters:
        raise TimeoutError("waited for the other ranks")


class Broken(Hand):
    def look(self, seen: Letters) -> Letters:
        raise ValueError("out of memory")


def test_the_failure_of_a_rank_that_stands_in_is_told_before_those_that_wait_for_it():
    teams = {"maker": Team(ranks=3), "judge": Team(ranks=3)}
    calls = order_calls(PROGRAM, teams, 1, 1, samples_per_micro_batch=[2])
    stand = Stand()
    stand.groups = {
        "maker": LocalWorkerGroup("maker", [Hand() for _ in range(3)]),
        "judge": LocalWorkerGroup("judge", [Hung(), Hung(), Broken()]),
    }
    with pytest.raises(ValueError, match="out of memory"):
        list(execute_schedule(calls, stand.groups, stand.ask, stand.on_report, WAIT_S))
