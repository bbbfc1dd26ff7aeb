"""Named pools that roles share: iteration time over the limit of any placement, and predictions.

    limit        work of all stages divided by the processes: no order and no placement undercuts it
    map          generator and fake score in pools of four, a copy of the teacher in both
    pools        the fastest of all classic splits of the same processes, by simulation
    fused        all three roles in every process
    staleness    the next rollouts begin before all updates of an iteration have ended

Stages sleep for 2.5, 2, 3, 3 and 3 units (rollout, denoise, signal, track, learn): the forward
passes of a sample with four steps, checkpointing and shared tracking, attention left out. A
micro-batch of a map has a sample for each rank, so m = 4, 8, 16 are batches of 16, 32, 64.
"""

import statistics
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from dummies import make_dummy_worker
from harness import (
    START_TIMEOUT_S,
    Groups,
    MachineCosts,
    Setting,
    measure_machine,
    rehearse_setting,
)

from cluster.ray.group import RayWorkerGroup
from cluster.ray.hosts import Hosts
from cluster.ray.pools import Pool
from cluster.ray.topology import reserve
from cluster.runtime import start_ray
from cluster.schedule.program import Home
from cluster.schedule.simulate import simulate
from pipelines.config.roles import FAKE_SCORE, GENERATOR, ROLES, TEACHER

UNIT_MS = 30.0
WORK_UNITS = 13.5
NUM_PROCESSES = 8
MICRO_BATCHES = (4, 8, 16)
LAYOUTS = ("map", "fused", "pools")
LEARN, SCORE, ALL = Home("learn", 4), Home("score", 4), Home("all", 8)
TWO_POOLS = {GENERATOR: (LEARN,), TEACHER: (LEARN, SCORE), FAKE_SCORE: (SCORE,)}
FUSED = dict.fromkeys(ROLES, (ALL,))

A, B, C, D = Home("a", 2), Home("b", 2), Home("c", 1), Home("d", 1)


@dataclass(frozen=True, slots=True)
class _MapSetting:
    """A map whose predicted time is compared with a measured one."""

    name: str
    generator: Home
    teacher: tuple[Home, ...]
    fake_score: Home
    stage_ms: tuple[float, float, float, float, float]
    micro_batches: int
    depth: int = 2
    fresh_updates: int = 0
    samples: int = 2
    megabytes: float = 0.0

    @property
    def setting(self) -> Setting:
        """The same, to rehearse."""
        homes = {
            GENERATOR: (self.generator,),
            TEACHER: self.teacher,
            FAKE_SCORE: (self.fake_score,),
        }
        return Setting(
            self.name,
            (1, 1, 1),
            self.stage_ms,
            self.micro_batches,
            self.depth,
            self.fresh_updates,
            self.samples,
            self.megabytes,
            homes=homes,
        )


_SEAMS, _MANY = (1, 2, 4, 8), 96
"""Micro-batches of an iteration, and iterations, in which a staleness of one is looked at."""
TRACKINGS = {"shared": 0, "fresh": 1}
"""Updates of the fake score on samples of its own."""
VALIDATED = (
    _MapSetting("two pools", A, (A, B), B, (100, 80, 60, 60, 120), 4),
    _MapSetting("two pools, 8 parts", A, (A, B), B, (50, 40, 60, 60, 60), 8, 3),
    _MapSetting("teacher on one", A, (A,), B, (60, 40, 90, 90, 70), 6),
    _MapSetting("teacher on the other", A, (B,), B, (120, 40, 40, 40, 120), 6),
    _MapSetting("three copies", A, (A, B, C), B, (60, 120, 60, 60, 60), 6, 3),
    _MapSetting("a pool of copies", A, (C, D), B, (60, 90, 60, 60, 60), 6, 3),
    _MapSetting("learners together", A, (B,), A, (50, 90, 40, 40, 50), 6),
    _MapSetting("one pool", A, (A,), A, (50, 40, 40, 40, 50), 4, 1),
    _MapSetting("two to one", A, (A, C), C, (80, 60, 40, 40, 80), 6),
    _MapSetting("odd samples", A, (A, B), B, (50, 40, 60, 60, 60), 5, 2, samples=3),
    _MapSetting("fresh tracking", A, (A, B), B, (60, 50, 60, 70, 70), 4, 2, fresh_updates=1),
    _MapSetting("deep", A, (A, B), B, (90, 40, 50, 50, 60), 8, 4),
    _MapSetting("one micro-batch", A, (A, B), B, (100, 80, 60, 60, 120), 1, 1),
    _MapSetting("2 MB a sample", A, (A, B), B, (100, 80, 60, 60, 120), 4, 2, megabytes=2),
)


def stage_ms(unit_ms: float) -> tuple[float, float, float, float, float]:
    """Sleeps of the stages, of units of this length."""
    return (2.5 * unit_ms, 2.0 * unit_ms, 3.0 * unit_ms, 3.0 * unit_ms, 3.0 * unit_ms)


def measure_maps(rounds: int, num_iterations: int) -> dict[str, Any]:
    """Measures layouts in turns against the limit, and maps against the simulator."""
    return {
        "over_limit": measure_limit(rounds, num_iterations),
        **_validation(rounds, num_iterations),
    }


def measure_staleness(rounds: int, num_iterations: int) -> list[dict[str, Any]]:
    """Measures what a staleness of one gains on two pools, in turns with none, and simulates it.

    The last iteration has none to overlap with, so few iterations show more than many.
    """
    settings = {
        (tracking, m, stale): replace(
            _setting("map", m, min(3, m), 4, TWO_POOLS), fresh_updates=updates, staleness=stale
        )
        for tracking, updates in TRACKINGS.items()
        for m in _SEAMS
        for stale in (0, 1)
    }
    measured = _measured(settings, rounds, num_iterations)
    rows: list[dict[str, Any]] = []
    for tracking, m, stale in settings:
        if not stale:
            continue
        exact, early = (settings[tracking, m, one].bound_s(num_iterations) for one in (0, 1))
        long_exact, long_early = (settings[tracking, m, one].bound_s(_MANY) for one in (0, 1))
        pairs = zip(measured[tracking, m, 1], measured[tracking, m, 0], strict=True)
        rows.append(
            {
                "tracking": tracking,
                "micro_batches": m,
                "exact_s": exact,
                "in_the_long_run": long_early / long_exact,
                "simulated_ratio": early / exact,
                "measured_ratio": statistics.median(one / other for one, other in pairs),
            }
        )
        print_row(rows[-1])
    return rows


def measure_limit(
    rounds: int,
    num_iterations: int,
    unit_ms: float = UNIT_MS,
    layouts: Collection[str] = LAYOUTS,
) -> list[dict[str, Any]]:
    """Measures layouts in turns against the limit.

    Args:
        rounds: Turns of each.
        num_iterations: In one turn.
        unit_ms: Sleep of a unit; what calls cost does not grow with it.
        layouts: Those of `LAYOUTS` that are measured.
    """
    settings: dict[tuple[str, int], Setting] = {}
    for m in MICRO_BATCHES:
        own = {
            "map": _setting("map", m, 3, 4, TWO_POOLS),
            "fused": _setting("fused", m // 2, 1, 8, FUSED),
            "pools": _best_classic(4 * m),
        }
        for name in layouts:
            settings[name, m] = replace(own[name], stage_ms=stage_ms(unit_ms))
    measured = _measured(settings, rounds, num_iterations)
    rows: list[dict[str, Any]] = []
    for (name, m), setting in settings.items():
        limit_s = 4 * m * WORK_UNITS * unit_ms / 1e3 / NUM_PROCESSES
        rows.append(
            {
                "layout": name,
                "unit_ms": unit_ms,
                "batch": 4 * m,
                "micro_batches": setting.micro_batches,
                "processes": {role: team.size for role, team in setting.team_of().items()},
                "limit_s": limit_s,
                "simulated_over_limit": setting.bound_s(num_iterations) / limit_s,
                "measured_over_limit": statistics.median(measured[name, m]) / limit_s,
            }
        )
        print_row(rows[-1])
    return rows


def _measured(
    settings: Mapping[Any, Setting], rounds: int, num_iterations: int
) -> dict[Any, list[float]]:
    """Seconds an iteration of each setting, by its key, all of them in turns."""
    found: dict[Any, list[float]] = {key: [] for key in settings}
    with _opened(settings.values()) as groups:
        for _ in range(rounds):
            for key, setting in settings.items():
                run = rehearse_setting(setting, groups[setting.layout], num_iterations)
                found[key].append(run.iteration_s)
    return found


def print_row(row: Mapping[str, Any]) -> None:
    """One line on standard error, as measurements come in."""
    words = ", ".join(
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
    )
    print(words, file=sys.stderr)


def _setting(name: str, micro_batches: int, depth: int, samples: int, homes: Any) -> Setting:  # noqa: ANN401
    return Setting(
        name, (1, 1, 1), stage_ms(UNIT_MS), micro_batches, depth, samples=samples, homes=homes
    )


def _best_classic(batch: int) -> Setting:
    """The fastest split of the processes into pools of the roles' own, by simulation."""
    found: list[Setting] = []
    for generator in range(1, NUM_PROCESSES - 1):
        for fake_score in range(1, NUM_PROCESSES - generator):
            teacher = NUM_PROCESSES - generator - fake_score
            for samples in {generator, fake_score, max(generator, fake_score)}:
                if batch % samples == 0:
                    teams = (generator, teacher, fake_score)
                    found.append(
                        Setting(
                            "pools", teams, stage_ms(UNIT_MS), batch // samples, 3, samples=samples
                        )
                    )
    return min(found, key=lambda setting: setting.bound_s(2))


def _validation(rounds: int, num_iterations: int) -> dict[str, Any]:
    settings = [one.setting for one in VALIDATED]
    with _opened(settings) as groups:
        machine = measure_machine(_two_processes(groups))
        measured: list[list[float]] = [[] for _ in settings]
        for _ in range(rounds):
            for times, setting in zip(measured, settings, strict=True):
                run = rehearse_setting(setting, groups[setting.layout], num_iterations)
                times.append(run.iteration_s)
    rows: list[dict[str, Any]] = []
    for setting, times in zip(settings, measured, strict=True):
        predicted_s, measured_s = (
            _predict_s(setting, machine, num_iterations),
            statistics.median(times),
        )
        error = predicted_s / measured_s - 1
        rows.append(
            {
                "map": setting.name,
                "predicted_s": predicted_s,
                "measured_s": measured_s,
                "error": error,
            }
        )
        print_row(rows[-1])
    return {"validation": rows, "largest_error": max(abs(row["error"]) for row in rows)}


def _predict_s(setting: Setting, machine: MachineCosts, num_iterations: int) -> float:
    calls = setting.calls(num_iterations)
    return simulate(calls, setting.costs(machine), setting.team_of()).iteration_s


def _two_processes(groups: Mapping[Any, Groups]) -> Groups:
    """Two roles in processes of different pools."""
    own = next(iter(groups.values()))
    return {GENERATOR: own[GENERATOR], FAKE_SCORE: own[FAKE_SCORE]}


@contextmanager
def _opened(settings: Any) -> Iterator[dict[Any, Groups]]:  # noqa: ANN401
    """Groups of every layout on one Ray; layouts with the same pools share their processes."""
    settings = list(settings)
    pools = {pool: ranks for setting in settings for pool, ranks in setting.pools.items()}
    asked = [Pool(name, ranks, cpus_per_rank=0.01) for name, ranks in pools.items()]
    with ExitStack() as stack:
        stack.enter_context(start_ray(num_cpus=max(4, sum(pools.values()))))
        placement = stack.enter_context(reserve(asked, START_TIMEOUT_S))
        hosts = {name: Hosts(name, placement, shared=True) for name in pools}
        made: dict[tuple[str, ...], RayWorkerGroup[Any]] = {}
        found: dict[Any, Groups] = {}
        for setting in settings:
            own: dict[str, RayWorkerGroup[Any]] = {}
            for role, names in setting.places.items():
                if (role, *names) not in made:
                    made[role, *names] = stack.enter_context(
                        RayWorkerGroup(
                            f"{role} on {' '.join(names)}",
                            make_dummy_worker,
                            (),
                            [hosts[name] for name in names],
                        )
                    )
                own[role] = made[role, *names]
            found[setting.layout] = own
        for group in made.values():
            group.wait_ready(START_TIMEOUT_S)
        yield found
