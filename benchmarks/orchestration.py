"""Measures the cost of separate processes: schedules of sleepers, transfers, scaling.

    python benchmarks/orchestration.py schedule transfer scaling validation --output figures.json
    python benchmarks/orchestration.py validation --docs docs/orchestration

    schedule     measured iteration time over the simulator's bound; orders and depths; busy shares
    maps         roles that share pools: time over the limit of any placement; predictions
    limit        the first half of that, for stages of any length (--unit-ms)
    staleness    what a staleness of one gains on two pools, with shared and with fresh tracking
    controller   what the machinery adds to a micro-batch
    transfer     one tensor from process to process and from raylet to raylet, next to a plain copy
    scaling      1 to 32 processes against the ideal
    validation   predicted against measured iteration time; a table and a plot
    memory       object store and controller over 1,000 iterations

Stages sleep instead of computing, so that many processes fit a small machine; what a rehearsal
takes beyond the bound is calls, references, transfers and waits. What is compared takes turns, and
medians are reported. The machine should have nothing else to do.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from documents import write_document
from dummies import in_sequence, run_dummies
from harness import Groups, Setting, rehearse_setting, sleepers
from orchestration_maps import (
    LAYOUTS,
    UNIT_MS,
    measure_limit,
    measure_maps,
    measure_staleness,
)
from orchestration_memory import measure_memory
from orchestration_scaling import measure_scaling
from orchestration_transfer import measure_transfer
from orchestration_validation import measure_validation, write_docs

from cluster.schedule.simulate import Costs, simulate
from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER

GENERATOR_BOUND = (160.0, 80.0, 60.0, 50.0, 120.0)
SPLITS = (
    Setting("generator is the bottleneck", (1, 1, 1), GENERATOR_BOUND, 8, 3),
    Setting("teacher has two copies", (1, 2, 1), (120, 240, 70, 70, 100), 8, 3),
    Setting("fake score is the bottleneck", (1, 1, 1), (80, 70, 110, 90, 70), 8, 3),
    Setting("2 : 3 : 2 processes", (2, 3, 2), (110, 120, 60, 60, 70), 8, 3, samples=2),
)
MICRO_BATCHES = (1, 2, 4, 8, 16)
NUM_MEMORY_ITERATIONS = 1000


def measure_schedule(rounds: int, num_iterations: int) -> dict[str, Any]:
    """Measured times over the bound, the effect of order and depth, and how busy the pools are."""
    sizes = {
        GENERATOR: max(split.teams[0] for split in SPLITS),
        TEACHER: max(split.teams[1] for split in SPLITS),
        FAKE_SCORE: max(split.teams[2] for split in SPLITS),
    }
    with sleepers(sizes) as groups:
        rehearse_setting(SPLITS[0], groups, 1)
        return {
            "over_bound": _over_bound(groups, rounds, num_iterations),
            "orders": _orders(groups, rounds, num_iterations),
            "busy": _busy(groups, rounds),
        }


def _over_bound(groups: Groups, rounds: int, num_iterations: int) -> list[dict[str, Any]]:
    settings = [replace(split, micro_batches=m) for split in SPLITS for m in MICRO_BATCHES]
    measured = _in_turns(
        {
            (setting.name, setting.micro_batches): lambda one=setting: (
                rehearse_setting(one, groups, num_iterations).iteration_s
            )
            for setting in settings
        },
        rounds,
    )
    rows = []
    for setting in settings:
        bound_s = setting.bound_s(num_iterations)
        found = measured[setting.name, setting.micro_batches]
        row = {
            "split": setting.name,
            "processes": setting.teams,
            "micro_batches": setting.micro_batches,
            "bound_s": bound_s,
            "measured_s": statistics.median(found),
            "over_bound": statistics.median(found) / bound_s,
        }
        rows.append(row)
        _tell(f"{setting.name}, m = {setting.micro_batches}: {row['over_bound']:.3f} of the bound")
    return rows


def _orders(groups: Groups, rounds: int, num_iterations: int) -> list[dict[str, Any]]:
    """The same work in sequence and at depths 1 to 4."""
    base = SPLITS[0]
    teams = base.team_of()
    variants = {f"depth {depth}": replace(base, depth=depth) for depth in (1, 2, 3, 4)}
    orders = {name: setting.calls(num_iterations) for name, setting in variants.items()}
    orders = {"in sequence": in_sequence(base.calls(num_iterations)), **orders}
    costs = Costs(base.costs().seconds)
    measured = _in_turns(
        {
            name: lambda own=calls: (
                run_dummies(own, {role: groups[role] for role in teams}, costs).iteration_s
            )
            for name, calls in orders.items()
        },
        rounds,
    )
    rows = []
    for name, calls in orders.items():
        bound_s = simulate(calls, costs, teams).iteration_s
        rows.append(
            {"order": name, "bound_s": bound_s, "measured_s": statistics.median(measured[name])}
        )
        _tell(f"{name}: {rows[-1]['measured_s']:.3f} s, bound {bound_s:.3f} s")
    return rows


def _busy(groups: Groups, rounds: int) -> dict[str, float]:
    """Returns the busy share of the generator, as the bottleneck, with m = 8."""
    exact = replace(SPLITS[0], micro_batches=8)
    variants = {"exact": exact, "staleness 1": replace(exact, staleness=1)}
    measured = _in_turns(
        {
            name: lambda one=setting: rehearse_setting(one, groups, 4).busy_share(GENERATOR)
            for name, setting in variants.items()
        },
        rounds,
    )
    shares = {name: statistics.median(found) for name, found in measured.items()}
    _tell(f"generator busy: {shares}")
    return shares


def measure_controller(rounds: int, num_iterations: int) -> dict[str, float]:
    """Measures what the machinery adds to a micro-batch, with five processes.

    A sleep lasts a little longer than it was asked to, and that is not work of a controller: the
    bound is that of the naps as they were.
    """
    setting = Setting("controller", (1, 3, 1), (100, 150, 50, 40, 60), 16, 3)
    calls, teams = setting.calls(num_iterations), setting.team_of()
    beyond_asked, beyond_slept = [], []
    with sleepers({role: team.size for role, team in teams.items()}) as groups:
        rehearse_setting(setting, groups, 1)
        for _ in range(rounds):
            run = rehearse_setting(setting, groups, num_iterations)
            slept = {
                call: nap.end_s - nap.start_s for call, nap in zip(run.calls, run.naps, strict=True)
            }
            bound_s = simulate(calls, Costs(slept.__getitem__), teams).iteration_s
            beyond_slept.append(run.iteration_s - bound_s)
            beyond_asked.append(run.iteration_s - setting.bound_s(num_iterations))
    per_micro_batch = 1e3 / setting.micro_batches
    found = {
        "processes": 5,
        "added_ms_per_micro_batch": per_micro_batch * statistics.median(beyond_slept),
        "added_with_oversleeping_ms": per_micro_batch * statistics.median(beyond_asked),
    }
    _tell(f"beyond the bound, a micro-batch: {found}")
    return found


def _in_turns(variants: dict[Any, Callable[[], float]], rounds: int) -> dict[Any, list[float]]:
    """Measures every variant once a round."""
    found: dict[Any, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, measure in variants.items():
            found[name].append(measure())
    return found


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, measures, writes JSON."""
    parts = (
        "schedule",
        "maps",
        "limit",
        "staleness",
        "controller",
        "transfer",
        "scaling",
        "validation",
        "memory",
    )
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--rounds", type=int, default=3, help="turns; medians are taken over them")
    parser.add_argument("--iterations", type=int, default=3, help="in one turn; the first is free")
    parser.add_argument("--max-processes", type=int, default=32, help="of the scaling")
    parser.add_argument("--unit-ms", type=float, default=UNIT_MS, help="of the limit's stages")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--output", type=Path, help="file for the JSON; standard output without")
    parser.add_argument("--docs", type=Path, help="folder for the validation's table and plot")
    given = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    for part in given.parts:
        _tell(f"--- {part}")
        if part == "schedule":
            results[part] = measure_schedule(given.rounds, given.iterations)
        elif part == "maps":
            results[part] = measure_maps(given.rounds, given.iterations)
        elif part == "limit":
            results[part] = measure_limit(
                given.rounds, given.iterations, given.unit_ms, given.layouts
            )
        elif part == "staleness":
            results[part] = measure_staleness(given.rounds, given.iterations)
        elif part == "controller":
            results[part] = measure_controller(given.rounds, given.iterations)
        elif part == "transfer":
            results[part] = measure_transfer(10 * given.rounds)
        elif part == "scaling":
            results[part] = measure_scaling(given.max_processes, given.rounds)
        elif part == "memory":
            results[part] = measure_memory(NUM_MEMORY_ITERATIONS)
        else:
            results[part] = measure_validation(given.rounds, given.iterations)
            if given.docs:
                write_docs(results[part], given.docs)
    measured = {
        "rounds": given.rounds,
        "iterations": given.iterations,
        "results": results,
    }
    write_document("orchestration", measured, given.output)


if __name__ == "__main__":
    main()
