"""Seconds of one iteration, in one process and with the roles on Ray, in turns.

    python benchmarks/iteration.py --output iteration.json

All topologies run the same recipe side by side and take turns, one iteration each, so that a
machine whose speed drifts slows all of them. Quote medians and the ratios. CPU seconds are those of
the processes of the three roles and of this one, all their threads together.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from documents import write_document

from cluster.ray.group import RayWorkerGroup
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.data.stream.batch import BatchFeed
from pipelines.data.stream.feed import FeedProgress
from pipelines.distillation.groups import Groups, open_groups
from pipelines.distillation.iteration import PromptBatch, iterate
from pipelines.distillation.iteration_plan import plan_iteration
from pipelines.distillation.preflight import run_preflight
from pipelines.run.folder import RunFolder
from workers.text_encoder import TextEncoder

TRACKING = ("shared", "fresh")
TOPOLOGIES = ("local", "map", "pools", "fused")


class Stand:
    """One topology, opened and ready to iterate."""

    def __init__(self, config: DistillConfig, groups: Groups) -> None:
        self._groups = groups
        self._size = config.batch.size
        self._plan = plan_iteration(
            config,
            groups.roles.text.call_rank(
                0, TextEncoder.encode_negative, config.model.negative_prompt
            ),
        )
        self._prompts = [
            PromptBatch(batch.captions)
            for batch in groups.feed.fetch(
                [
                    groups.feed.call_rank(0, BatchFeed.take, self._size)
                    for _ in range(self._plan.batches_per_iteration)
                ],
                60,
                "taking captions",
            )
        ]
        self._iteration = 0
        roles = groups.roles.scheduled.values()
        pids = {
            pid for role in roles if isinstance(role, RayWorkerGroup) for pid in role.process_ids()
        }
        self._pids = {*pids, os.getpid()}

    def run(self) -> tuple[float, float, dict[str, float]]:
        """Wall and CPU seconds of one iteration, and its losses."""
        wall, cpu = time.perf_counter(), self._cpu_s()
        report = iterate(self._groups.roles, self._plan, self._iteration, self._prompts)
        self._iteration += 1
        return time.perf_counter() - wall, self._cpu_s() - cpu, dict(report.losses)

    def _cpu_s(self) -> float:
        return sum(_cpu_s_of(pid) for pid in self._pids)


def _cpu_s_of(pid: int) -> float:
    """CPU seconds of a process of this machine, user's and system's (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(
    recipe: str, overrides: Sequence[str], num_iterations: int, warmup: int
) -> dict[str, Any]:
    """Medians for both tracking modes and all topologies."""
    found: dict[str, Any] = {}
    for tracking in TRACKING:
        with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
            stands = {}
            for mode in TOPOLOGIES:
                settings = [f"fake_score.tracking={tracking}", f"topology.mode={mode}"]
                config = load_recipe(recipe, [*overrides, *settings, "validation.every=0"])
                folder = RunFolder(Path(scratch) / mode)
                groups = open_groups(
                    config, run_preflight(config), folder, FeedProgress(), 2 * config.batch.size
                )
                stands[mode] = Stand(config, stack.enter_context(groups))
            runs: dict[str, list[tuple[float, float]]] = {mode: [] for mode in TOPOLOGIES}
            for number in range(warmup + num_iterations):
                losses = []
                for mode, stand in stands.items():
                    wall_s, cpu_s, terms = stand.run()
                    losses.append(terms)
                    if number >= warmup:
                        runs[mode].append((wall_s, cpu_s))
                assert all(one == losses[0] for one in losses), "topologies make the same numbers"
        found[tracking] = _summary(runs)
        print(tracking, json.dumps(found[tracking]), file=sys.stderr)
    return found


def _summary(runs: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Medians of each topology, and its ratios to one process, pair by pair."""
    found: dict[str, dict[str, float]] = {}
    for mode, own in runs.items():
        pairs = list(zip(own, runs["local"], strict=True))
        wall, cpu = ([mine[part] / local[part] for mine, local in pairs] for part in (0, 1))
        found[mode] = {
            "wall_s": statistics.median(wall_s for wall_s, _ in own),
            "cpu_s": statistics.median(cpu_s for _, cpu_s in own),
            "wall_over_local": statistics.median(wall),
            "wall_over_local_min": min(wall),
            "wall_over_local_max": max(wall),
            "cpu_over_local": statistics.median(cpu),
        }
    return found


def main() -> None:
    """Parses the arguments, measures, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the recipe")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--iterations", type=int, default=20, help="counted ones")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--output", type=Path, help="file for the JSON; standard output without")
    arguments = parser.parse_args()
    measured = {
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "iterations": arguments.iterations,
        "results": measure(
            arguments.recipe, arguments.overrides, arguments.iterations, arguments.warmup
        ),
    }
    write_document("iteration", measured, arguments.output)


if __name__ == "__main__":
    main()
