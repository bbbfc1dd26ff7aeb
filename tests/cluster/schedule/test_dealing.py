"""Roles that share pools: order, copies, hops, and the time that a simulated iteration takes."""

import math
from collections import defaultdict
from functools import cache
from itertools import product

import pytest

from cluster.schedule.dealing import deal_pass
from cluster.schedule.program import Home, Pass, Stage, Team
from cluster.schedule.schedule import REPORT, STEP, Call, order_calls
from cluster.schedule.simulate import Costs, by_stage, simulate
from cluster.schedule.staleness import staleness
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, TEACHER
from tests.cluster.schedule.test_schedule import PROGRAMS, accumulating, by_process
from tests.helpers.kept_graphs import graphs_kept

WORK = {
    (GENERATOR, "rollout"): 2.5,
    (GENERATOR, "sample"): 2.5,
    (TEACHER, "denoise"): 2.0,
    (FAKE_SCORE, "signal"): 3.0,
    (FAKE_SCORE, "track"): 3.0,
    (GENERATOR, "learn"): 3.0,
}
"""Forward passes of a sample: 13.5 in all with shared tracking."""


def teams_on(generator: Home, fake_score: Home, *teacher: Home) -> dict[str, Team]:
    return {
        GENERATOR: Team.on(generator),
        TEACHER: Team.on(*teacher),
        FAKE_SCORE: Team.on(fake_score),
        DISCRIMINATOR: Team.on(fake_score),
    }


A, B, C = Home("a", 2), Home("b", 2), Home("c", 1, speed=0.5)
MAPS = {
    "two pools": teams_on(A, B, A, B),
    "unequal pools": teams_on(Home("a", 4), B, Home("a", 4), B),
    "a slow third pool": teams_on(A, B, A, B, C),
    "learners together": teams_on(A, A, B),
    "one pool": teams_on(A, A, A),
    "each its own": teams_on(A, B, C),
}
SIZES = list(product(MAPS, (1, 2, 5), (1, 2, 3), (0, 1)))
"""(map, micro-batches, depth, staleness); tests go through all of them."""
each_program = pytest.mark.parametrize("name", list(PROGRAMS))


@cache
def calls_of(name: str, layout: str, micro_batches: int, depth: int, stale: int) -> list[Call]:
    return order_calls(
        PROGRAMS[name],
        MAPS[layout],
        micro_batches,
        depth,
        samples_per_micro_batch=4,
        iterations=range(2),
        max_staleness=stale,
        stage_seconds=WORK,
    )


@each_program
def test_every_stage_sees_every_sample_once_after_what_it_takes(name):
    stages = {
        (number, stage.name)
        for number, part in enumerate(PROGRAMS[name])
        if isinstance(part, Pass)
        for stage in part.stages
    }
    for layout, micro_batches, depth, stale in SIZES:
        calls = calls_of(name, layout, micro_batches, depth, stale)
        seen = defaultdict[tuple[int, int, str], list[tuple[int | None, int]]](list)
        for place, call in enumerate(calls):
            assert all(taken < place for taken in call.inputs + call.waits_for)
            for stage in {calls[taken].stage for taken in call.inputs}:
                makers = [calls[taken] for taken in call.inputs if calls[taken].stage == stage]
                handed = {sample for maker in makers for sample in range(*maker.samples)}
                assert set(range(*call.samples)) <= handed
            for sample in range(*call.samples):
                seen[call.iteration, call.part, call.stage].append((call.micro_batch, sample))
        everything = sorted(product(range(micro_batches), range(4)))
        assert {key: sorted(samples) for key, samples in seen.items()} == {
            (iteration, *stage): everything for iteration, stage in product(range(2), stages)
        }


@each_program
def test_what_a_stage_keeps_is_used_up_after_it_on_its_own_rank(name):
    users = {
        (number, stage.name): stage.keeps_until
        for number, part in enumerate(PROGRAMS[name])
        if isinstance(part, Pass)
        for stage in part.stages
        if stage.keeps_until
    }
    for layout, micro_batches, depth, stale in SIZES:
        calls = calls_of(name, layout, micro_batches, depth, stale)
        place = {
            (c.iteration, c.part, c.stage, c.micro_batch, c.rank): at for at, c in enumerate(calls)
        }
        for (iteration, part, stage, micro_batch, rank), kept in place.items():
            if (part, stage) in users:
                user = users[part, stage]
                assert place[iteration, part, user, micro_batch, rank] > kept


@each_program
def test_gradients_are_gathered_in_the_order_of_roles_with_processes_of_their_own(name):
    own = {role: Team() for role in (GENERATOR, TEACHER, FAKE_SCORE, DISCRIMINATOR)}
    for micro_batches in (1, 2, 5):
        alone = order_calls(PROGRAMS[name], own, micro_batches, 2, iterations=range(2))
        expected = {role: marks(calls, name) for (role, _), calls in by_process(alone).items()}
        assert any(stage.startswith("learn") for _, _, stage, _ in expected[GENERATOR])
        for layout, depth, stale in product(MAPS, (1, 2, 3), (0, 1)):
            calls = calls_of(name, layout, micro_batches, depth, stale)
            for (role, _), found in by_process(calls).items():
                if role != TEACHER:
                    assert marks(found, name) == expected[role]


def marks(calls: list[Call], name: str) -> list[tuple[object, ...]]:
    wanted = accumulating(name) | {REPORT, STEP}
    return [(c.iteration, c.part, c.stage, c.micro_batch) for c in calls if c.stage in wanted]


@each_program
def test_no_rank_keeps_more_than_depth_micro_batches(name):
    for layout, micro_batches, depth, stale in SIZES:
        kept = graphs_kept(calls_of(name, layout, micro_batches, depth, stale), PROGRAMS[name])
        for (role, rank), samples in kept.items():
            team = MAPS[layout][role]
            share = 4 // team.ranks_by_replica[team.replica_of(rank)]
            assert samples <= min(depth, micro_batches) * share


def test_the_second_call_about_a_micro_batch_finds_the_copy_that_kept_it():
    calls = calls_of("through the teacher", "two pools", 5, 3, 0)
    copies = {
        stage: {(c.iteration, c.micro_batch, c.samples): c.rank for c in calls if c.stage == stage}
        for stage in ("denoise", "pullback")
    }
    assert copies["denoise"] == copies["pullback"]
    assert len(set(copies["denoise"].values())) == 4


def test_between_equal_pools_a_sample_goes_from_rank_to_rank():
    """Hops of an iteration, counted: nothing is joined or cut, and no result makes two hops."""
    teams, num_bytes = MAPS["two pools"], {"rollout": 25, "denoise": 8, "signal": 8}
    calls = calls_of("shared", "two pools", 5, 3, 0)
    calls = [call for call in calls if call.iteration == 0]
    process = [teams[call.role].process(call.role, call.rank) for call in calls]
    hops = {
        (taken, process[place])
        for place, call in enumerate(calls)
        for taken in call.inputs
        if process[taken] != process[place]
    }
    assert all(process[taken][1] == rank for taken, (_, rank) in hops)
    assert all(calls[taken].samples == call.samples for call in calls for taken in call.inputs)
    by_stage_of = defaultdict[str, int](int)
    for taken, _ in hops:
        by_stage_of[calls[taken].stage] += 1
    learned = sum(c.stage == "denoise" and c.rank < 2 for c in calls)
    # Ten shares of two samples: each rollout and each signal crosses once, and each prediction of
    # the teacher's copy on the generator's side.
    assert by_stage_of == {"rollout": 10, "signal": 10, "denoise": learned}
    assert 0 < learned < 10
    moved = sum(2 * num_bytes[stage] * number for stage, number in by_stage_of.items())
    assert moved == 20 * (25 + 8) + 16 * learned


@pytest.mark.parametrize(
    ("micro_batches", "depth", "most"), [(4, 2, 1.09), (8, 3, 1.06), (16, 3, 1.04)]
)
def test_two_pools_with_a_copied_teacher_leave_little_idle(micro_batches, depth, most):
    """The time of an iteration over its work divided by the processes, which no order undercuts."""
    pools = Home("learn", 4), Home("score", 4)
    shared, classic = teams_on(*pools, *pools), None
    found = iteration_s(shared, micro_batches, depth) / (13.5 * micro_batches / 2)
    assert 1 <= found <= most
    classic = {GENERATOR: Team(1, 4), TEACHER: Team(), FAKE_SCORE: Team(1, 4)}
    # The same learners beside a teacher of its own: one process more, and still slower.
    assert iteration_s(classic, micro_batches, depth) > iteration_s(shared, micro_batches, depth)


def iteration_s(teams: dict[str, Team], micro_batches: int, depth: int) -> float:
    calls = order_calls(
        PROGRAMS["shared"],
        teams,
        micro_batches,
        depth,
        samples_per_micro_batch=4,
        stage_seconds=WORK,
    )
    seconds = {name: units for name, units in WORK.items()}
    return simulate(calls, Costs(by_stage(seconds)), teams).iteration_s


def test_one_pool_takes_the_sum_of_its_work():
    assert iteration_s(MAPS["one pool"], 5, 2) == pytest.approx(5 * 2 * 13.5)


def test_a_slower_pool_is_given_fewer_calls():
    def calls_on_b(speed: float) -> int:
        a, b = Home("a"), Home("b", speed=speed)
        teams = {"x": Team.on(Home("c")), "y": Team.on(a, b)}
        found = deal_pass(
            Pass((Stage("make", "x"), Stage("look", "y", ("make",)))),
            teams,
            12,
            2,
            lambda stage, replica: 0.1 if stage.role == "x" else 1 / (1, speed)[replica],
        )
        return sum(deal.stage.role == "y" and deal.replica == 1 for deal in found.deals)

    assert (calls_on_b(1.0), calls_on_b(0.5), calls_on_b(0.1)) == (6, 4, 1)


@pytest.mark.parametrize("wrong_s", [math.inf, math.nan, -1.0])
def test_seconds_that_are_no_times_are_refused(wrong_s):
    a_pass, teams = Pass((Stage("make", "x"),)), {"x": Team.on(Home("a"))}
    assert deal_pass(a_pass, teams, 2, 1, lambda stage, replica: 1.0).seconds == 2
    with pytest.raises(AssertionError, match="seconds of stages"):
        deal_pass(a_pass, teams, 2, 1, lambda stage, replica: wrong_s)


def test_the_order_is_a_function_of_its_arguments():
    first = calls_of("shared", "two pools", 5, 2, 0)
    calls_of.cache_clear()
    assert calls_of("shared", "two pools", 5, 2, 0) == first


@each_program
def test_stages_that_run_ahead_of_an_update_are_found_on_shared_processes_too(name):
    for layout, micro_batches, depth in product(MAPS, (1, 2, 5), (1, 2)):
        calls = calls_of(name, layout, micro_batches, depth, 0)
        assert set(staleness(calls, PROGRAMS[name], MAPS[layout])) == {0}
        late = calls_of(name, layout, micro_batches, depth, 1)
        assert max(staleness(late, PROGRAMS[name], MAPS[layout])) <= 1
