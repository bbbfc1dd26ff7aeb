"""Calls are made as one where that delays nothing, keeps their order, and shares their process."""

from itertools import product
from math import isclose

import pytest

from cluster.schedule.chains import join_calls
from cluster.schedule.program import Home, Pass, Program, Stage, Team, Update
from cluster.schedule.schedule import REPORT, STEP, Call, order_calls
from cluster.schedule.simulate import Costs, by_stage, simulate
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, TEACHER
from tests.cluster.schedule.test_dealing import MAPS, SIZES, WORK, calls_of, each_program

APART = {role: Team() for role in (GENERATOR, FAKE_SCORE, TEACHER, DISCRIMINATOR)}
UNEVEN = {(role, stage): 1.0 + 0.37 * at for at, (role, stage) in enumerate(WORK)}


def words(calls: list[Call], teams: dict[str, Team]) -> list[str]:
    """The chains of the first ranks, by their stages."""
    names = {REPORT: "report"}
    return [
        " ".join(
            names.get(call.stage, call.stage)
            + ("" if call.micro_batch is None else str(call.micro_batch))
            for call in (calls[place] for place in places)
        )
        for places in join_calls(calls, teams)
        if calls[places[0]].rank == 0
    ]


def schedules(name: str) -> list[tuple[list[Call], dict[str, Team]]]:
    return [(calls_of(name, layout, *size), MAPS[layout]) for layout, *size in SIZES]


def test_one_process_is_asked_once_a_micro_batch_and_once_for_all_updates():
    teams = MAPS["one pool"]
    calls = calls_of("shared", "one pool", 2, 1, 0)
    assert words(calls, teams)[:3] == [
        "rollout0 denoise0 signal0 learn0 track0",
        "rollout1 denoise1 signal1 learn1 track1 report report",
        "step step",
    ]


def test_what_another_process_waits_for_is_not_kept_back():
    """The judge's look goes to the maker, who would wait for the judge's other work as well."""
    stages = (
        Stage("make", "maker", keeps_until="learn", fed=True),
        Stage("look", "judge", ("make",)),
        Stage("note", "judge", ("make",), accumulates=True),
        Stage("learn", "maker", ("look",), accumulates=True),
    )
    program: Program = (Pass(stages), Update(("maker", "judge")))
    teams = {"maker": Team(), "judge": Team()}
    found = words(order_calls(program, teams, 1, 1), teams)
    assert found == ["make0", "look0", "note0 report", "learn0 report", "step", "step"]
    # Nobody waits for the judge: what it is asked in a row goes together.
    only = (Pass((Stage("make", "maker", fed=True), *stages[1:3])), Update(("judge",)))
    found = words(order_calls(only, teams, 1, 1), teams)
    assert found == ["make0", "look0 note0 report", "step"]


def test_what_may_arrive_late_begins_a_chain_and_what_comes_with_it_does_not():
    home = {"x": Team.on(Home("a"))}
    late = (Stage("draw", "x", fed=True), Stage("paint", "x", ("draw",), fed=True))
    found = words(order_calls((Pass(late), Update(("x",))), home, 2, 2), home)
    assert found == ["draw0 paint0", "draw1 paint1 report", "step"]


@pytest.mark.slow
@each_program
def test_every_call_is_made_once_in_the_order_of_its_process_after_what_it_takes(name: str):
    joined = 0
    for calls, teams in schedules(name):
        chains = join_calls(calls, teams)
        order = [place for chain in chains for place in chain]
        assert sorted(order) == list(range(len(calls)))
        made = {place: at for at, place in enumerate(order)}
        for place, call in enumerate(calls):
            assert all(made[taken] < made[place] for taken in call.inputs + call.waits_for)
        processes = [teams[call.role].process(call.role, call.rank) for call in calls]
        for process in set(processes):
            own = [place for place in order if processes[place] == process]
            assert own == sorted(own)
        for chain in chains:
            assert len({processes[place] for place in chain}) == 1
            assert not any(calls[place].waits_for for place in chain[1:])
            assert len({calls[place].iteration for place in chain}) == 1
        joined += len(calls) - len(chains)
    assert joined


@each_program
@pytest.mark.slow
def test_no_call_starts_later_than_by_itself(name: str):
    for (calls, teams), seconds in product(schedules(name), (WORK, UNEVEN)):
        costs = Costs(by_stage(seconds))
        alone, joined = (simulate(calls, costs, teams, apart=one) for one in (True, False))
        starts = zip(joined.spans, alone.spans, strict=True)
        assert all(isclose(one.start_s, other.start_s, abs_tol=1e-12) for one, other in starts)


def test_what_a_call_costs_is_paid_once_a_chain():
    calls, teams = calls_of("shared", "one pool", 5, 1, 0), MAPS["one pool"]
    costs = Costs(by_stage(WORK), turn_s=0.1)
    alone, joined = (simulate(calls, costs, teams, apart=one).duration_s for one in (True, False))
    fewer = len(calls) - len(join_calls(calls, teams))
    ranks = teams[GENERATOR].size
    assert alone - joined == pytest.approx(0.1 * fewer / ranks)
    assert joined < alone


def test_roles_without_known_processes_are_asked_call_by_call():
    calls = order_calls((Pass((Stage("a", "x"),)), Update(("x",))), {"x": Team()}, 2, 1)
    assert [calls[place].stage for (place,) in join_calls(calls, {})] == ["a", "a", REPORT, STEP]
