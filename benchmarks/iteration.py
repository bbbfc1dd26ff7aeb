"""Seconds of one iteration, in one process and with the roles on Ray, in turns.

    python benchmarks/iteration.py --output iteration.json

Both topologies run the same recipe side by side and take turns, one iteration each, so that a
machine whose speed drifts slows both. Quote medians and the ratio. CPU seconds are those of the one
process, all its threads together.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from documents import write_document

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.data.stream.feed import Feed, FeedProgress
from pipelines.distillation.groups import Groups, open_groups
from pipelines.distillation.iteration import PromptBatch, iterate
from pipelines.distillation.iteration_plan import plan_iteration
from pipelines.distillation.preflight import run_preflight
from pipelines.run.folder import RunFolder
from workers.text_encoder import TextEncoder

TRACKING = ("shared", "fresh")
TOPOLOGIES = ("local", "pools")


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
                    groups.feed.call_rank(0, Feed.take, self._size)
                    for _ in range(self._plan.batches_per_iteration)
                ],
                60,
                "taking captions",
            )
        ]
        self._iteration = 0

    def run(self) -> tuple[float, float, dict[str, float]]:
        """Wall and CPU seconds of one iteration, and its losses."""
        wall, cpu = time.perf_counter(), time.process_time()
        report = iterate(self._groups.roles, self._plan, self._iteration, self._prompts)
        self._iteration += 1
        return time.perf_counter() - wall, time.process_time() - cpu, dict(report.losses)


def measure(
    recipe: str, overrides: Sequence[str], num_iterations: int, warmup: int
) -> dict[str, Any]:
    """Medians for both tracking modes and both topologies."""
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
                assert losses[0] == losses[1], "the topologies must make the same numbers"
        found[tracking] = _summary(runs)
        print(tracking, json.dumps(found[tracking]), file=sys.stderr)
    return found


def _summary(runs: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    local, pools = runs["local"], runs["pools"]
    ratios = [there[0] / here[0] for here, there in zip(local, pools, strict=True)]
    return {
        "local_wall_s": statistics.median(wall for wall, _ in local),
        "local_cpu_s": statistics.median(cpu for _, cpu in local),
        "pools_wall_s": statistics.median(wall for wall, _ in pools),
        "pools_over_local": statistics.median(ratios),
        "pools_over_local_min": min(ratios),
        "pools_over_local_max": max(ratios),
    }


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
