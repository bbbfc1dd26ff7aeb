"""A schedule worked through by sleeping processes takes what the simulator says."""

import pytest

from benchmarks.dummies import (
    DummyWorker,
    SimulatedRun,
    in_sequence,
    make_dummy_worker,
    run_dummies,
)
from cluster.local import LocalWorkerGroup
from cluster.schedule.program import Team
from cluster.schedule.schedule import Call, order_calls
from cluster.schedule.simulate import Costs, by_stage, simulate
from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER
from pipelines.stages.algorithm import iteration_program
from tests.cluster.toys import WAIT_S

TEAMS = {GENERATOR: Team(), TEACHER: Team(), FAKE_SCORE: Team()}
SECONDS = {
    (GENERATOR, "rollout"): 0.16,
    (TEACHER, "denoise"): 0.10,
    (FAKE_SCORE, "signal"): 0.08,
    (FAKE_SCORE, "track"): 0.06,
    (GENERATOR, "learn"): 0.12,
}


def ends_in_order(told: SimulatedRun, calls: list[Call]) -> bool:
    """Whether each call began after the calls that it takes results from had ended."""
    return all(
        told.naps[place].end_s <= told.naps[at].start_s
        for at, call in enumerate(calls)
        for place in call.inputs
    )


def test_one_process_takes_the_sum_of_all_stages():
    groups = {role: LocalWorkerGroup(role, [DummyWorker()]) for role in TEAMS}
    calls = order_calls(iteration_program(), TEAMS, 2, 2)
    told = run_dummies(calls, groups, Costs(lambda call: 0.01, lambda call: 100.0))
    assert [nap.place for nap in told.naps] == list(range(len(calls)))
    assert told.iteration_s >= len(calls) * 0.01
    assert ends_in_order(told, calls)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_processes_on_ray_overlap_as_simulated():
    from cluster.ray.group import RayWorkerGroup
    from cluster.ray.pools import Pool
    from cluster.ray.topology import reserve

    pools = [Pool(role, cpus_per_rank=0.1) for role in TEAMS]
    costs = Costs(by_stage(SECONDS), lambda call: 1e5)
    calls = order_calls(iteration_program(), TEAMS, 4, 3, iterations=range(3))
    with reserve(pools, WAIT_S) as placement:
        groups = {role: RayWorkerGroup(role, make_dummy_worker, (), placement) for role in TEAMS}
        for group in groups.values():
            group.wait_ready(WAIT_S)
        told = run_dummies(calls, groups, costs)
        for group in groups.values():
            group.close()
    bound_s = simulate(calls, Costs(costs.seconds), TEAMS).iteration_s
    alone_s = simulate(in_sequence(calls), Costs(costs.seconds), TEAMS).iteration_s
    assert ends_in_order(told, calls)
    # Never faster than the bound. The upper limit allows for a machine that does much else.
    assert bound_s * 0.99 < told.iteration_s < (bound_s + alone_s) / 2
    assert told.busy_share(GENERATOR) > 0.75
