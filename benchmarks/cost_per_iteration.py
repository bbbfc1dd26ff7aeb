r"""Seconds of one iteration of each method, in turns, next to what counting passes predicts.

    python benchmarks/cost_per_iteration.py --output cost.json            # the study of `tiny`
    python benchmarks/cost_per_iteration.py --methods --output cost.json  # every method

Every method is opened in one process without Ray, and they take turns, one iteration each, so that
a machine whose speed drifts slows all. Ratios are taken turn by turn, to the first method.
Iterations differ in where their rollouts leave, so that each turn's seconds are set against the
passes of that very iteration, as well as against the mean.

`--methods` takes the recipes that ship for single methods, and needs what they name:

    sgmd experts assets/tiny-wan models/tiny-experts --boundary 0.825
    sgmd transition assets/tiny-wan models/tiny-flow --layers 1 --steps 2
    sgmd shapes data/shapes
    sgmd encode data/shapes/train data/shapes-encoded --model assets/tiny-wan --num-frames 13 \
        --height 32 --width 32 --fps 8 --text-length 16
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from documents import write_document

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.data.shards.schema import LATENTS
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
from pipelines.stages.algorithm import needs_data
from pipelines.study.plan import plan_study
from workers.text_encoder import TextEncoder

_TIMEOUT_S = 60.0

METHODS: dict[str, tuple[str, list[str]]] = {
    "sgmd": ("tiny", []),
    "sgmd-fresh": ("tiny", ["fake_score.tracking=fresh"]),
    "tsg_fisher": ("tiny", ["objective.method=tsg_fisher", "fake_score.tracking=fresh"]),
    "tsg_sim": ("tiny", ["objective.method=tsg_sim"]),
    "dmd": ("tiny", ["objective.method=dmd", "fake_score.tracking=fresh"]),
    "dmd2": ("tiny", ["objective.method=dmd2", "fake_score.tracking=fresh"]),
    "dmd2-gan": ("tiny-gan", []),
    "pdmd": ("tiny-pdmd", []),
    "cdm": ("tiny-cdm", []),
    "cdm-on-trajectory": ("tiny-cdm", ["objective.off_trajectory=0"]),
    "phased_dmd-high": ("tiny-phased", []),
    "phased_dmd-low": ("tiny-phased", ["objective.high_iterations=1"]),
    "sid": ("tiny", ["objective.method=sid", "fake_score.tracking=fresh"]),
    "adm": ("tiny-adm", []),
    "adm-fresh": ("tiny-adm", ["fake_score.tracking=fresh"]),
    "rcm": ("tiny-rcm", ["objective.consistency.warmup=0"]),
    "scm": ("tiny-rcm", ["objective.matching_weight=0", "objective.fake_updates=1"]),
    "tmd-meanflow": (
        "tiny-tmd",
        ["objective.stage=meanflow", "objective.fake_updates=1", "data.train=data/shapes-encoded"],
    ),
    "tmd": ("tiny-tmd", []),
    "tmd-gan": (
        "tiny-tmd",
        [
            "objective.adversary={weight: 0.03, loss: softplus}",
            "discriminator={layers: [2, 4], width: 64, num_strides: 1}",
            "data.train=data/shapes-encoded",
        ],
    ),
}
"""Recipe and settings of each method's iteration."""


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
        has_data = needs_data(self._plan.program)
        columns = [(LATENTS,) if has_data and not place else () for place in range(self._count)]
        taken = [
            groups.feed.call_rank(0, BatchFeed.take, config.batch.size, wanted)
            for wanted in columns
        ]
        self._prompts = [
            PromptBatch(
                batch.captions,
                data=groups.feed.call_rank(0, BatchFeed.data, batch.number) if wanted else None,
            )
            for batch, wanted in zip(
                groups.feed.fetch(taken, _TIMEOUT_S, "taking captions"), columns, strict=True
            )
        ]

    @property
    def _count(self) -> int:
        return self._plan.batches_per_iteration

    def run(self, iteration: int) -> dict[str, float]:
        """Wall and CPU seconds of one iteration, and busy seconds by `role.stage`."""
        roles = self._groups.roles
        wall, cpu = time.perf_counter(), time.process_time()
        iterate(roles, self._plan, iteration, self._prompts)
        found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        for group in (*roles.scheduled.values(), roles.text):
            found |= {f"{group.name}.{stage}": s for stage, s in group.timings().items()}
        return found


def planned_configs(recipe: str, overrides: Sequence[str]) -> dict[str, DistillConfig]:
    """Settings of each variant of a recipe's study."""
    plan = plan_study(load_recipe(recipe, overrides))
    return {each.variant: each.config for each in plan.runs[: len(plan.variants)]}


def method_configs(overrides: Sequence[str], names: Sequence[str]) -> dict[str, DistillConfig]:
    """Settings of the methods, by name; of all of them where none is named."""
    return {
        name: load_recipe(recipe, ["topology.mode=local", *settings, *overrides])
        for name, (recipe, settings) in METHODS.items()
        if not names or name in names
    }


def measure(configs: Mapping[str, DistillConfig], turns: int, warmup: int) -> dict[str, Any]:
    """Medians of every method, and ratios to the first one, turn by turn."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        stands: dict[str, Stand] = {}
        for name, own in configs.items():
            folder = RunFolder(Path(scratch) / name)
            rows = own.batch.size * (1 + own.fresh_updates)
            groups = open_groups(own, run_preflight(own), folder, FeedProgress(), rows)
            stands[name] = Stand(own, stack.enter_context(groups))
        for turn in range(warmup + turns):
            for name, stand in stands.items():
                found = stand.run(turn)
                if turn >= warmup:
                    runs[name].append(found)
            print(f"turn {turn + 1} of {warmup + turns}", file=sys.stderr)
        base = next(iter(stands))
        return {
            name: _summary(runs[name], runs[base], stand.config, stands[base].config, warmup)
            for name, stand in stands.items()
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
        "units_made": statistics.fmean(made),
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
    parser.add_argument(
        "--methods", nargs="*", metavar="NAME", help=f"of {', '.join(METHODS)}; alone: all of them"
    )
    parser.add_argument("--turns", type=int, default=11, help="counted ones")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--output", type=Path, help="file for the JSON; standard output without")
    arguments = parser.parse_args()
    configs = (
        planned_configs(arguments.recipe, arguments.overrides)
        if arguments.methods is None
        else method_configs(arguments.overrides, arguments.methods)
    )
    measured = {
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "turns": arguments.turns,
        "results": measure(configs, arguments.turns, arguments.warmup),
    }
    write_document("cost_per_iteration", measured, arguments.output)


if __name__ == "__main__":
    main()
