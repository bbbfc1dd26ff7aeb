"""The recipe that a plan leads to."""

from collections.abc import Mapping
from typing import Any

from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import FAKE_SCORE, GENERATOR
from pipelines.config.topology import FUSED
from pipelines.planning.plan import Plan
from pipelines.planning.planned_layout import Layout
from pipelines.planning.stage_work import split_by_stage

_FUSED_LABELS = "topology.fused.labels"


def planned_recipe(config: DistillConfig, plan: Plan) -> DistillConfig:
    """The recipe with a plan's best layout, and without what only its own layout had a use for."""
    best, topology = plan.best, config.topology
    settings: dict[str, Any] = {
        "topology.generator.ranks": 1,
        "topology.teacher.ranks": 1,
        "topology.teacher.replicas": 1,
        "topology.fake_score.ranks": 1,
        "topology.discriminator.ranks": 1,
        "batch.size": plan.work.batch_size,
        # Draws of the exit step are those of the new micro-batches.
        "batch.exit_draws": None,
        "topology.transport": topology.transport if best.name == "pools" else "object_store",
        "topology.max_staleness_iterations": (
            0 if _learners_take_turns(best) else topology.max_staleness_iterations
        ),
    }
    settings |= {key: value for key, value in best.settings.items() if ".pools" not in key}
    if best.name == FUSED:
        settings |= {_FUSED_LABELS: {**topology.fused.labels, **settings.get(_FUSED_LABELS, {})}}
    if best.name == "map":
        # Pools of the recipe keep their CPUs, labels and resources, and no speed: a plan says what
        # GPUs there are.
        given = {name: pool.model_dump(exclude={"speed"}) for name, pool in topology.pools.items()}
        homes = {GENERATOR: topology.roles.generator, FAKE_SCORE: topology.roles.fake_score}
        settings["topology.pools"] = {
            name: _planned_pool(
                given.get(next((homes[role] for role in pool.roles if role in homes), name), {}),
                _of_pool(best.settings, name),
            )
            for name, pool in best.pools.items()
        }
        if plan.times.is_measured:
            settings["topology.stage_seconds"] = {
                ".".join(name): seconds
                for name, seconds in split_by_stage(plan.work, plan.times.seconds).items()
            }
    return config.with_settings(settings)


def _learners_take_turns(best: Layout) -> bool:
    """Returns True if generator and fake score live in the same processes."""
    return any({GENERATOR, FAKE_SCORE} <= {*pool.roles} for pool in best.pools.values())


def _planned_pool(given: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, Any]:
    """A pool of the recipe as it is planned; it asks for the labels of both."""
    labels = {**given.get("labels", {}), **planned.get("labels", {})}
    return {**given, **planned, "labels": labels}


def _of_pool(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    whole = settings.get("topology.pools")
    if whole is not None:
        return whole[name]
    prefix = f"topology.pools.{name}."
    return {
        key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)
    }
