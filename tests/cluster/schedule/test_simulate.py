"""The simulator against times that can be worked out by hand."""

from itertools import pairwise

import pytest

from benchmarks.dummies import in_sequence
from cluster.schedule.program import Pass, Stage, Team, Update
from cluster.schedule.schedule import Call, order_calls
from cluster.schedule.simulate import Cause, Costs, Timeline, by_stage, simulate
from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER
from pipelines.stages.algorithm import iteration_program

ONE_EACH = {GENERATOR: Team(), TEACHER: Team(), FAKE_SCORE: Team()}
SECONDS = {
    (GENERATOR, "rollout"): 5.0,
    (TEACHER, "denoise"): 2.0,
    (FAKE_SCORE, "signal"): 3.0,
    (FAKE_SCORE, "track"): 1.0,
    (GENERATOR, "learn"): 4.0,
}


def chain(*roles: str) -> tuple[Pass]:
    """A pass in which each role hands on to the next."""
    stages = [Stage(f"stage {number}", role) for number, role in enumerate(roles)]
    linked = [Stage(stage.name, stage.role, (before.name,)) for before, stage in pairwise(stages)]
    return (Pass((stages[0], *linked)),)


def run(program, seconds, teams=None, m=1, depth=1, **options) -> Timeline:
    costs = {
        name: options.pop(name)
        for name in ("bandwidth", "latency_s", "call_s", "answer_s", "result_bytes")
        if name in options
    }
    teams = teams or {role: Team() for role, _ in seconds}
    calls = order_calls(program, teams, m, depth, **options)
    return simulate(calls, Costs(by_stage(seconds), **costs), teams)


def test_one_process_takes_the_sum_of_its_stages():
    timeline = run(chain("a", "a"), {("a", "stage 0"): 2.0, ("a", "stage 1"): 3.0}, m=4)
    assert timeline.duration_s == 4 * (2 + 3)
    assert [usage.busy_share for usage in timeline.usage()] == [1.0]


def test_a_chain_takes_the_slowest_stage_once_a_micro_batch_and_the_others_once():
    seconds = {("a", "stage 0"): 2.0, ("b", "stage 1"): 5.0, ("c", "stage 2"): 3.0}
    for m in (1, 2, 7, 50):
        assert run(chain("a", "b", "c"), seconds, m=m).duration_s == 2 + 3 + 5 * m


def test_copies_divide_the_time_of_their_stage():
    seconds = {("a", "stage 0"): 1.0, ("b", "stage 1"): 4.0}
    teams = {"a": Team(), "b": Team(replicas=4)}
    assert run(chain("a", "b"), seconds, teams, m=40).duration_s == 40 + 4


def test_ranks_share_the_samples_of_a_micro_batch():
    seconds = {("a", "stage 0"): 1.0, ("b", "stage 1"): 1.0}
    teams = {"a": Team(ranks=4), "b": Team(ranks=2)}
    timeline = run(chain("a", "b"), seconds, teams, m=1, samples_per_micro_batch=8)
    assert timeline.duration_s == 8 / 4 + 8 / 2


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        # One at a time: rollout, denoise, signal, learn, and the next one.
        (1, 4 * (5 + 2 + 3 + 4)),
        # r0 r1 | l0 r2 | l1 r3 | l2 | l3. r3 ends at 28, l2 at 32, but its signal comes at 33.
        (2, 4 * (5 + 4) + 1),
        # Three deep, l1 and l2 stand between r3 and l3, and the generator never waits.
        (3, 4 * (5 + 4)),
    ],
)
def test_a_deeper_window_hides_the_others_behind_the_generator(depth, expected):
    timeline = run(iteration_program(), SECONDS, ONE_EACH, m=4, depth=depth)
    assert timeline.duration_s == expected


def test_with_many_micro_batches_the_busiest_role_sets_the_pace():
    for busiest in (GENERATOR, TEACHER, FAKE_SCORE):
        seconds = {key: 8.0 if key[0] == busiest else 1.0 for key in SECONDS}
        work = sum(time for (role, _), time in seconds.items() if role == busiest)
        timeline = run(iteration_program(), seconds, ONE_EACH, m=200, depth=4)
        assert timeline.duration_s == pytest.approx(200 * work, rel=0.01)


def test_calls_in_sequence_take_the_sum_of_all_stages():
    calls = order_calls(iteration_program(), ONE_EACH, 4, 2)
    timeline = simulate(in_sequence(calls), Costs(by_stage(SECONDS)), ONE_EACH)
    assert timeline.duration_s == 4 * sum(SECONDS.values())


def test_a_late_update_costs_nothing_where_the_next_iteration_may_begin_before_it():
    seconds = {**SECONDS, (FAKE_SCORE, "step"): 6.0, (GENERATOR, "step"): 1.0}
    exact, stale = (
        run(
            iteration_program(),
            seconds,
            ONE_EACH,
            m=4,
            depth=3,
            iterations=range(9),
            max_staleness=s,
        )
        for s in (0, 1)
    )
    # Exact: every iteration ends with the fake score's track 3 and step, after the last learn.
    assert exact.iteration_s == 4 * (5 + 4) + 6
    assert stale.iteration_s == pytest.approx(4 * (5 + 4) + 1)
    busy = {usage.role: usage.busy_share for usage in stale.usage()}
    assert busy[GENERATOR] > 0.97


def test_transfers_delay_the_taker_and_are_told_apart_from_waiting():
    seconds = {("a", "stage 0"): 2.0, ("b", "stage 1"): 1.0}
    timeline = run(
        chain("a", "b"), seconds, latency_s=0.5, bandwidth=4.0, result_bytes=lambda call: 10.0
    )
    assert timeline.duration_s == 2 + (0.5 + 10 / 4) + 1
    a, b = timeline.usage()
    assert (a.busy_s, a.transferring_s, a.waiting_s) == (2, 0, 4)
    assert (b.busy_s, b.transferring_s, b.waiting_s) == (1, 3, 2)


def test_what_stays_in_its_process_is_not_transferred():
    seconds = {("a", "stage 0"): 2.0, ("a", "stage 1"): 1.0}
    assert run(chain("a", "a"), seconds, latency_s=9.0).duration_s == 3


def test_the_controller_makes_one_call_after_another_and_hears_of_results_late():
    program = (Pass((Stage("a", "x"),)), Update(("x",)))
    teams = {"x": Team()}
    calls = order_calls(program, teams, 3, 1)
    costs = Costs(by_stage({}), call_s=1.0, answer_s=7.0)
    timeline = simulate(calls, costs, teams, apart=True)
    # Three stages and a report are asked for by 4; the report is known at 11, the step asked at 12.
    assert timeline.duration_s == 12
    assert timeline.spans[-1].cause is Cause.CONTROLLER
    # All but the step are one call.
    assert simulate(calls, costs, teams).duration_s == 1 + 7 + 1


def test_ranks_of_a_copy_begin_together():
    stages = (Stage("a", "x"), Stage("b", "y", ("a",)))
    teams = {"x": Team(replicas=2), "y": Team(ranks=2)}
    calls = order_calls((Pass(stages),), teams, 1, 1, samples_per_micro_batch=2)

    def uneven(call: Call) -> float:
        return 3.0 if (call.role, call.rank) == ("x", 1) else 1.0

    spans = simulate(calls, Costs(uneven), teams).spans
    assert [span.start_s for span in spans if span.call.role == "y"] == [3.0, 3.0]


def test_the_critical_path_leads_from_the_first_call_to_the_last():
    timeline = run(iteration_program(), SECONDS, ONE_EACH, m=2, depth=1)
    path = [timeline.spans[place].call for place in timeline.critical_path()]
    stages = [f"{call.stage} {call.micro_batch}" for call in path if call.micro_batch is not None]
    assert stages == [f"{s} {j}" for j in (0, 1) for s in ("rollout", "denoise", "signal", "learn")]
    times = [timeline.spans[place] for place in timeline.critical_path()]
    assert sum(span.end_s - span.start_s for span in times) == timeline.duration_s
