"""The order of calls, over every small combination of sizes: what must hold whatever they are."""

from collections import defaultdict
from functools import cache
from itertools import product

import pytest

from cluster.errors import ScheduleError
from cluster.schedule.program import Pass, Stage, Team, Update, partition_samples, pass_order
from cluster.schedule.schedule import REPORT, STEP, Call, order_calls
from cluster.schedule.staleness import staleness
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, TEACHER
from pipelines.stages.algorithm import iteration_program
from pipelines.stages.kind import IterationKind
from sgmd_core.objectives import ComparedStates, GradientPath
from tests.helpers.kept_graphs import graphs_kept

STEPS, DATA, BOTH = ComparedStates.STEPS, ComparedStates.DATA, GradientPath.BOTH_SCORES
KINDS = {
    "shared": IterationKind(),
    "fresh": IterationKind(1),
    "several updates": IterationKind(3),
    "through the teacher": IterationKind(2, path=BOTH),
    "shared and through the teacher": IterationKind(path=BOTH),
    "one backward pass": IterationKind(joint=True),
    "with diversity": IterationKind(diversity=True),
    "with all": IterationKind(2, path=BOTH, diversity=True, mixes_weights=True),
    "comparing steps": IterationKind(compared=STEPS),
    "comparing steps, fresh": IterationKind(1, compared=STEPS),
    "comparing data": IterationKind(2, diversity=True, compared=DATA),
    "comparing data, shared": IterationKind(path=BOTH, compared=DATA),
    "consistency": IterationKind(consistency=True),
    "consistency alone": IterationKind(1, consistency=True, matching=False),
    "strides": IterationKind(1, flow=True, matching=False),
}
PROGRAMS = {name: iteration_program(kind) for name, kind in KINDS.items()}
TEAMS = [
    {
        GENERATOR: Team(1, g),
        TEACHER: Team(copies, ranks),
        FAKE_SCORE: Team(1, f),
        DISCRIMINATOR: Team(1, 3 - min(g, 2)),
    }
    for g, copies, ranks, f in [
        (1, 1, 1, 1),
        (1, 3, 1, 1),
        (2, 3, 1, 1),
        (2, 1, 2, 4),
        (1, 2, 2, 2),
    ]
]
SIZES = list(product(range(len(TEAMS)), (1, 2, 5), (1, 2, 3), (0, 1)))
"""(team, micro-batches, depth, staleness); every test goes through all of them."""
each_program = pytest.mark.parametrize("name", list(PROGRAMS))


@cache
def calls_of(name: str, number: int, micro_batches: int, depth: int, stale: int) -> list[Call]:
    return order_calls(
        PROGRAMS[name],
        TEAMS[number],
        micro_batches,
        depth,
        samples_per_micro_batch=4,
        iterations=range(2),
        max_staleness=stale,
    )


def accumulating(name: str) -> set[str]:
    passes = [part for part in PROGRAMS[name] if isinstance(part, Pass)]
    return {stage.name for part in passes for stage in part.stages if stage.accumulates}


def by_process(calls: list[Call]) -> dict[tuple[str, int], list[Call]]:
    found = defaultdict[tuple[str, int], list[Call]](list)
    for call in calls:
        found[call.role, call.rank].append(call)
    return found


@each_program
def test_every_stage_sees_every_sample_once(name):
    for number, micro_batches, depth, stale in SIZES:
        seen = defaultdict[tuple[int, int, str], list[tuple[int | None, int]]](list)
        for call in calls_of(name, number, micro_batches, depth, stale):
            for sample in range(*call.samples):
                seen[call.iteration, call.part, call.stage].append((call.micro_batch, sample))
        stages = [
            (number, stage.name)
            for number, part in enumerate(PROGRAMS[name])
            if isinstance(part, Pass)
            for stage in part.stages
        ]
        everything = sorted(product(range(micro_batches), range(4)))
        for iteration, (part, stage) in product(range(2), stages):
            assert sorted(seen[iteration, part, stage]) == everything


@each_program
def test_a_call_comes_after_the_calls_that_made_its_inputs(name):
    for number, micro_batches, depth, stale in SIZES:
        calls = calls_of(name, number, micro_batches, depth, stale)
        for place, call in enumerate(calls):
            assert all(taken < place for taken in call.inputs + call.waits_for)
            makers = [calls[taken] for taken in call.inputs]
            assert all(
                (m.iteration, m.micro_batch) == (call.iteration, call.micro_batch) for m in makers
            )
            for stage in {maker.stage for maker in makers}:
                handed = [s for m in makers if m.stage == stage for s in range(*m.samples)]
                assert set(range(*call.samples)) <= set(handed)


@each_program
def test_no_rank_keeps_more_than_its_share_of_depth_micro_batches(name):
    for number, micro_batches, depth, stale in SIZES:
        calls = calls_of(name, number, micro_batches, depth, stale)
        kept = graphs_kept(calls, PROGRAMS[name])
        for rank in range(TEAMS[number][GENERATOR].size):
            share = 4 // TEAMS[number][GENERATOR].ranks
            # Without samples of its own the generator keeps no graph between two calls.
            alone = name in ("consistency alone", "strides")
            waiting = 0 if alone else min(depth, micro_batches) * share
            assert kept.get((GENERATOR, rank), 0) == waiting
        assert all(most <= depth * 4 for most in kept.values())


@pytest.mark.parametrize(("name", "micro_batches"), list(product(PROGRAMS, (1, 2, 5, 8))))
def test_gradients_are_gathered_in_one_order_whatever_depth_and_teams(name, micro_batches):
    orders = defaultdict[str, set[tuple[object, ...]]](set)
    for number, depth, stale in product(range(len(TEAMS)), (1, 2, 3, 9), (0, 1)):
        calls = calls_of(name, number, micro_batches, depth, stale)
        for (role, _), own in by_process(calls).items():
            if role == TEACHER:
                continue
            marks = [
                (call.iteration, call.part, call.stage, call.micro_batch)
                for call in own
                if call.stage in accumulating(name) | {REPORT, STEP}
            ]
            orders[role].add(tuple(marks))
    judges = {DISCRIMINATOR: 1} if name.startswith("comparing") else {}
    expected = {GENERATOR: 1, FAKE_SCORE: 1, **judges}
    assert {role: len(found) for role, found in orders.items()} == expected


@each_program
def test_only_what_runs_ahead_of_a_late_update_is_stale(name):
    for number, micro_batches, depth, stale in SIZES:
        calls = calls_of(name, number, micro_batches, depth, stale)
        behind = staleness(calls, PROGRAMS[name])
        ahead = {
            (call.role, call.stage)
            for call, updates in zip(calls, behind, strict=True)
            if updates and call.stage not in (REPORT, STEP)
            if call.part == 0
        }
        if not stale:
            assert ahead == set()
        else:
            assert max(behind) == 1
            expected = {(GENERATOR, "rollout"), (TEACHER, "denoise")}
            if "start" in {stage for _, stage in ahead}:
                expected |= {(GENERATOR, "start"), (TEACHER, "anchor")}
            if name.startswith("consistency"):
                expected |= {(GENERATOR, "noise_data"), (TEACHER, "denoise_data")}
            if name == "consistency alone":
                # The generator asks the fake score for nothing.
                expected -= {(GENERATOR, "rollout"), (TEACHER, "denoise")}
                expected |= {(GENERATOR, "learn_consistency")}
            if name == "strides":
                expected = {(GENERATOR, "learn_flow")}
            if name.startswith("comparing"):
                # A late discriminator lets the fake score go on, up to what it would be asked.
                assert expected <= ahead
                assert (GENERATOR, "learn") not in ahead
                assert DISCRIMINATOR not in {role for role, _ in ahead}
            else:
                assert ahead == expected


def test_the_order_of_a_shared_iteration_is_the_one_drawn():
    calls = order_calls(PROGRAMS["shared"], TEAMS[0], 4, 2)
    told = {
        role: " ".join(f"{c.stage[0]}{'' if c.micro_batch is None else c.micro_batch}" for c in own)
        for (role, _), own in by_process(calls).items()
    }
    assert told == {
        GENERATOR: "r0 r1 l0 r2 l1 r3 l2 l3 g s",
        TEACHER: "d0 d1 d2 d3",
        FAKE_SCORE: "s0 t0 s1 t1 s2 t2 s3 t3 g s",
    }


def test_a_role_asked_twice_about_a_micro_batch_first_begins_the_next_one():
    (distil, *_) = PROGRAMS["shared and through the teacher"]
    assert isinstance(distil, Pass)

    def teacher_order(depth: int, cycles: dict[str, int]) -> str:
        order = pass_order(distil, 4, depth, cycles)
        return " ".join(f"{s.name[0]}{j}" for s, j in order if s.role == TEACHER)

    assert teacher_order(1, {}) == "d0 p0 d1 p1 d2 p2 d3 p3"
    assert teacher_order(3, {}) == "d0 d1 p0 d2 p1 d3 p2 p3"
    assert teacher_order(3, {TEACHER: 2}) == "d0 d1 d2 p0 d3 p1 p2 p3"


@pytest.mark.parametrize("num_copies", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_samples", [1, 8, 15])
def test_copies_share_a_micro_batch_without_gap_or_overlap(num_samples: int, num_copies: int):
    shares = partition_samples(num_samples, Team(replicas=num_copies), round=0)
    spans = [share.samples for share in shares]
    assert [at for first, end in spans for at in range(first, end)] == list(range(num_samples))
    sizes = [end - first for first, end in spans]
    assert len(sizes) == min(num_copies, num_samples)
    assert max(sizes) - min(sizes) <= 1


def test_copies_take_turns_and_none_gets_more_than_one_share_extra():
    loads = [0] * 3
    for turn in range(7):
        for share in partition_samples(4, Team(replicas=3), turn):
            loads[share.rank] += share.samples[1] - share.samples[0]
        assert max(loads) - min(loads) <= 1
    assert [partition_samples(1, Team(3), turn)[0].rank for turn in range(4)] == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("num_samples", "team", "turn", "expected"),
    [
        (5, Team(1, 2), 0, [(0, (0, 3)), (1, (3, 5))]),
        (5, Team(2, 2), 1, [(2, (0, 3)), (3, (3, 5))]),
        (2, Team(1, 4), 0, [(0, (0, 1)), (1, (1, 2)), (2, "stands in"), (3, "stands in")]),
    ],
)
def test_ranks_share_what_does_not_divide(num_samples: int, team: Team, turn: int, expected):
    shares = partition_samples(num_samples, team, turn)
    found = [(one.rank, "stands in" if one.stands_in else one.samples) for one in shares]
    assert found == expected
    # A rank without a sample works on the first one.
    assert all(one.samples == (0, 1) for one in shares if one.stands_in)


@pytest.mark.parametrize(
    ("num_samples", "team", "expected"),
    [
        (1, Team(1, 2, ranks_per_sample=2), [(0, 0, 1), (1, 0, 1)]),
        (3, Team(1, 4, ranks_per_sample=2), [(0, 0, 2), (1, 0, 2), (2, 2, 3), (3, 2, 3)]),
        (2, Team(2, 2, ranks_per_sample=2), [(0, 0, 1), (1, 0, 1), (2, 1, 2), (3, 1, 2)]),
    ],
)
def test_ranks_that_work_together_have_the_same_samples(num_samples, team, expected):
    shares = partition_samples(num_samples, team, 0)
    assert [(one.rank, *one.samples) for one in shares] == expected
    assert [one.assists for one in shares] == [one.rank % 2 == 1 for one in shares]
    assert not any(one.stands_in for one in shares)


def test_of_ranks_that_work_together_one_has_the_result_and_all_have_the_work():
    teams = {
        GENERATOR: Team(1, 4, ranks_per_sample=2),
        TEACHER: Team(1, 2),
        FAKE_SCORE: Team(1, 4, ranks_per_sample=4),
    }
    calls = order_calls(PROGRAMS["with all"], teams, 3, 2, samples_per_micro_batch=[3, 2, 1])
    assert not any(calls[taken].assists for call in calls for taken in call.inputs)
    asked = defaultdict[tuple[int, str, str, int], list[Call]](list)
    for call in calls:
        if call.micro_batch is not None:
            asked[call.part, call.role, call.stage, call.micro_batch].append(call)
    for (_, role, _, micro_batch), found in asked.items():
        assert {call.rank for call in found} == set(range(teams[role].ranks))
        counted = sum(call.num_samples for call in found if call.counts)
        assert counted == [3, 2, 1][micro_batch]
        # What the ranks gather adds up to that of all samples, each with all of its ranks.
        assert sum(call.num_samples for call in found) == counted * teams[role].ranks_per_sample


def test_odd_micro_batches_go_to_replicas_in_turn():
    teams = {GENERATOR: Team(), TEACHER: Team(2, 2), FAKE_SCORE: Team()}
    calls = order_calls(
        PROGRAMS["shared"], teams, 4, 2, samples_per_micro_batch=[4, 4, 4, 3], iterations=range(8)
    )
    loads = [0, 0]
    for call in calls:
        if call.role == TEACHER:
            loads[call.rank // 2] += call.num_samples
    assert sum(loads) == 8 * 15
    assert abs(loads[0] - loads[1]) <= 3


def test_nobody_takes_what_a_rank_without_a_sample_made():
    teams = {GENERATOR: Team(1, 3), TEACHER: Team(1, 2), FAKE_SCORE: Team(1, 4)}
    calls = order_calls(PROGRAMS["with all"], teams, 3, 2, samples_per_micro_batch=[3, 2, 1])
    made = [place for place, call in enumerate(calls) if call.stands_in]
    assert {calls[place].role for place in made} == {*teams}
    assert not any(calls[taken].stands_in for call in calls for taken in call.inputs)
    # Every rank of a role is asked about every micro-batch, so that its collectives are complete.
    asked = defaultdict[tuple[int, str, str, int], set[int]](set)
    for call in calls:
        if call.micro_batch is not None:
            asked[call.part, call.role, call.stage, call.micro_batch].add(call.rank)
    assert all(len(ranks) == teams[key[1]].ranks for key, ranks in asked.items())
    counted = sum(call.num_samples for call in calls if call.stage == "learn")
    assert counted == 6


def test_the_second_call_about_a_micro_batch_finds_the_copy_that_kept_it():
    calls = calls_of("through the teacher", 1, 5, 3, 0)
    first = {(c.iteration, c.micro_batch, c.samples): c.rank for c in calls if c.stage == "denoise"}
    again = {
        (c.iteration, c.micro_batch, c.samples): c.rank for c in calls if c.stage == "pullback"
    }
    assert first == again
    assert set(first.values()) == {0, 1, 2}


def test_an_update_of_several_roles_waits_until_all_have_gathered_soundly():
    calls = calls_of("shared", 2, 2, 2, 0)
    steps = [place for place, call in enumerate(calls) if call.stage == STEP]
    reports = [place for place, call in enumerate(calls) if call.stage == REPORT]
    assert set(calls[steps[0]].waits_for) == set(reports[:3])
    beginning = next(place for place, call in enumerate(calls) if call.iteration == 1)
    assert set(calls[beginning].waits_for) == set(steps[:3])


@pytest.mark.parametrize(
    ("program", "teams", "samples", "told"),
    [
        ((Pass((Stage("b", "x", ("a",)),)),), {"x": Team()}, 1, r"takes \('a',\) after \[\]"),
        ((Pass((Stage("a", "y"),)),), {"x": Team()}, 1, r"done by y of roles \['x'\]"),
        ((Pass((Stage("a", "x", keeps_until="b"),)),), {"x": Team()}, 1, "until b"),
        ((Update(("x",)),), {"x": Team(2)}, 1, "several would drift apart"),
    ],
)
def test_what_cannot_be_worked_through_is_refused(program, teams, samples, told):
    with pytest.raises(ScheduleError, match=told):
        order_calls(program, teams, 1, 1, samples_per_micro_batch=samples)
    with pytest.raises(ScheduleError, match="0 micro-batches"):
        order_calls((), {"x": Team()}, 0, 1)
