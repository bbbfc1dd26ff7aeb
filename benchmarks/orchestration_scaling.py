"""Iteration time against the number of processes, with sleeping stages, next to the ideal."""

import statistics
from typing import Any

from dummies import run_dummies
from harness import Groups, Setting, rehearse_setting, sleepers

from cluster.schedule.program import Pass, Stage, Team
from cluster.schedule.schedule import order_calls
from cluster.schedule.simulate import Costs
from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER

NAP_S = 0.2
TASKS = 64


def measure_scaling(max_processes: int, rounds: int) -> dict[str, Any]:
    """Copies of one role that share a fixed amount of work, and whole pipelines that grow."""
    counts = [count for count in (1, 2, 4, 8, 16, 32) if count <= max_processes]
    factors = [factor for factor in (1, 2, 4, 6) if 5 * factor <= max_processes]
    largest = max(1, *factors)
    sizes = {GENERATOR: 2 * largest, TEACHER: max(largest, *counts), FAKE_SCORE: 2 * largest}
    with sleepers({TEACHER: sizes[TEACHER]}) as groups:
        copies = [_copies(groups, count, rounds) for count in counts]
    sizes[TEACHER] = largest
    with sleepers(sizes) as groups:
        pipelines = [_pipeline(groups, factor, rounds) for factor in factors]
    return {"copies": copies, "pipelines": pipelines}


def _copies(groups: Groups, count: int, rounds: int) -> dict[str, float]:
    """The same tasks on more copies: the ideal is inversely proportional to their number."""
    program = (Pass((Stage("denoise", TEACHER),)),)
    calls = order_calls(program, {TEACHER: Team(replicas=count)}, TASKS, 1)
    costs = Costs(lambda call: NAP_S)
    times = [run_dummies(calls, groups, costs).iteration_s for _ in range(rounds)]
    return _row(count, statistics.median(times), TASKS * NAP_S / count)


def _pipeline(groups: Groups, factor: int, rounds: int) -> dict[str, float]:
    """2 generator ranks, 1 teacher, 2 of the fake score, and as many samples, times a factor."""
    setting = Setting(
        name=f"times {factor}",
        teams=(2 * factor, factor, 2 * factor),
        stage_ms=(160, 90, 60, 60, 120),
        micro_batches=8,
        depth=3,
        samples=2 * factor,
    )
    times = [rehearse_setting(setting, groups, 3).iteration_s for _ in range(rounds)]
    return _row(5 * factor, statistics.median(times), setting.bound_s(3))


def _row(processes: int, measured_s: float, ideal_s: float) -> dict[str, float]:
    return {
        "processes": processes,
        "ideal_s": ideal_s,
        "measured_s": measured_s,
        "efficiency": ideal_s / measured_s,
    }
