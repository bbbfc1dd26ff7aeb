"""Seconds of one iteration of each method, in turns, next to what counting passes foretells.

    python benchmarks/cost_per_iteration.py --output cost.json

Every method of the recipe's study is opened in one process without Ray, and they take turns, one
iteration each, so that a machine whose speed drifts slows all. Ratios are taken turn by turn, to
the first method. Iterations differ in where their rollouts leave, so that each turn's seconds are
set against the passes of that very iteration, as well as against the mean.
"""

import argparse
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
from pipelines.data.stream.batch import BatchFeed
from pipelines.data.stream.feed import FeedProgress
from pipelines.distillation.groups import Groups, open_groups
from pipelines.distillation.iteration import PromptBatch, iterate
from pipelines.distillation.iteration_plan import plan_iteration
from pipelines.distillation.preflight import run_preflight
from pipelines.planning.passes import (
    expected_passes,
    iteration_passes,
    pass_costs,
    role_of,
    total_units,
    units_by_role,
)
from pipelines.run.folder import RunFolder
from pipelines.study.plan import plan_study
from workers.text_encoder import TextEncoder

_TIMEOUT_S = 60.0


class Stand:
    """One method, opened and ready to iterate."""

    def __init__(self, config: DistillConfig, groups: Groups) -> None:
        self.config = config
        self._groups = groups
        roles = groups.roles
        self._plan = plan_iteration(
            config,
            roles.text.call_rank(0, TextEncoder.encode_negative, config.model.negative_prompt),
        )
        taken = [
            groups.feed.call_rank(0, BatchFeed.take, config.batch.size)
            for _ in range(self._plan.batches_per_iteration)
        ]
        batches = groups.feed.fetch(taken, _TIMEOUT_S, "taking captions")
        self._prompts = [PromptBatch(batch.captions) for batch in batches]

    def run(self, iteration: int) -> dict[str, float]:
        """Wall and CPU seconds of one iteration, and busy seconds by `role.stage`."""
        roles = self._groups.roles
        wall, cpu = time.perf_counter(), time.process_time()
        iterate(roles, self._plan, iteration, self._prompts)
        found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        for group in (roles.generator, roles.teacher, roles.fake_score, roles.text):
            found |= {f"{group.name}.{stage}": s for stage, s in group.timings().items()}
        return found


def measure(recipe: str, overrides: Sequence[str], turns: int, warmup: int) -> dict[str, Any]:
    """Medians of every method, and ratios to the first one, turn by turn."""
    config = load_recipe(recipe, overrides)
    plan = plan_study(config)
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in plan.variants}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        stands: dict[str, Stand] = {}
        for planned in plan.runs[: len(plan.variants)]:
            folder, own = RunFolder(Path(scratch) / planned.variant), planned.config
            rows = own.batch.size * (1 + own.fresh_updates)
            groups = open_groups(own, run_preflight(own), folder, FeedProgress(), rows)
            stands[planned.variant] = Stand(own, stack.enter_context(groups))
        for turn in range(warmup + turns):
            for variant, stand in stands.items():
                found = stand.run(turn)
                if turn >= warmup:
                    runs[variant].append(found)
            print(f"turn {turn + 1} of {warmup + turns}", file=sys.stderr)
        base = next(iter(stands))
        return {
            variant: _summary(runs[variant], runs[base], stand.config, stands[base].config, warmup)
            for variant, stand in stands.items()
        }


def _summary(
    own: Sequence[dict[str, float]],
    base: Sequence[dict[str, float]],
    config: DistillConfig,
    base_config: DistillConfig,
    first_turn: int,
) -> dict[str, Any]:
    per_iteration = expected_passes(config)
    costs, base_costs = pass_costs(config), pass_costs(base_config)
    units = total_units(per_iteration, costs)
    made = [total_units(iteration_passes(config, first_turn + n), costs) for n in range(len(own))]
    stages = {name for run in own for name in run if "." in name}
    by_stage = {name: statistics.median(run.get(name, 0.0) for run in own) for name in stages}
    by_role: dict[str, float] = {}
    for name, seconds in by_stage.items():
        by_role[role_of(name)] = by_role.get(role_of(name), 0.0) + seconds
    return {
        "wall_s": statistics.median(run["wall"] for run in own),
        "cpu_s": statistics.median(run["cpu"] for run in own),
        "wall_over_first": _ratios(own, base, "wall"),
        "cpu_over_first": _ratios(own, base, "cpu"),
        "units": units,
        "units_over_first": units / total_units(expected_passes(base_config), base_costs),
        "units_checkpointed": total_units(per_iteration, costs, checkpointed=True),
        "units_by_role": units_by_role(per_iteration, costs),
        "cpu_s_per_unit": statistics.median(
            run["cpu"] / count for run, count in zip(own, made, strict=True)
        ),
        "busy_s_by_role": dict(sorted(by_role.items())),
        "busy_s_by_stage": dict(sorted(by_stage.items())),
    }


def _ratios(
    own: Sequence[dict[str, float]], base: Sequence[dict[str, float]], clock: str
) -> dict[str, float]:
    found = [one[clock] / other[clock] for one, other in zip(own, base, strict=True)]
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}


def main() -> None:
    """Parses the arguments, measures, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the recipe")
    parser.add_argument("--recipe", default="tiny", help="its study names the methods")
    parser.add_argument("--turns", type=int, default=11, help="counted ones")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--output", type=Path, help="file for the JSON; standard output without")
    arguments = parser.parse_args()
    measured = {
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "turns": arguments.turns,
        "results": measure(
            arguments.recipe, arguments.overrides, arguments.turns, arguments.warmup
        ),
    }
    write_document("cost_per_iteration", measured, arguments.output)


if __name__ == "__main__":
    main()
