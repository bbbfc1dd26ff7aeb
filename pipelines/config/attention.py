"""Kernels of attention in a recipe: what the roles' derivatives and devices ask of them."""

from collections.abc import Mapping

from pipelines.config.recipe_sections import RecipeSections
from pipelines.config.roles import GENERATOR, TEACHER
from pipelines.config.topology import TopologySettings
from sgmd_core.objectives import GradientPath
from sgmd_core.objectives.consistency import consistency_of
from workers.attention import KERNELS
from workers.network_settings import ComputeSettings


def attention_contradictions(config: RecipeSections) -> list[str]:
    """Returns what does not go with the roles' kernels of attention, as sentences."""
    problems: list[str] = []
    method, topology = config.objective.method, config.topology
    for role, compute in config.computes.items():
        key, kernel = f"{role}.compute.attention {compute.attention}", KERNELS[compute.attention]
        if role == TEACHER and not kernel.differentiable:
            if config.objective.path is GradientPath.BOTH_SCORES:
                problems.append(
                    f"{key} has no gradients, and {method} takes one through the teacher's input; "
                    "set it to native or flash"
                )
            if compute.checkpointing:
                problems.append(
                    f"{key} has no gradients, so there is nothing to make again; set "
                    f"{role}.compute.checkpointing=false"
                )
        consistent = consistency_of(config.objective) is not None
        if role == GENERATOR and consistent and not kernel.forward_mode:
            problems.append(
                f"{key} has no derivative in forward mode, which {method} takes; set it to native"
            )
        problems += [
            f"{key} runs on GPUs, and topology.{name}.gpus is 0; set it to native, or give every "
            "rank a GPU"
            for name in _pools_without_gpus(topology, role, config.computes)
            if not kernel.on_cpu
        ]
    return problems


def _pools_without_gpus(
    topology: TopologySettings, role: str, roles: Mapping[str, ComputeSettings]
) -> list[str]:
    pools = topology.role_pools_of(tuple(roles))
    prefix = "pools." if topology.mode == "map" else ""
    return [
        prefix + name
        for name in topology.places_of(tuple(roles))[role]
        if name in pools and not pools[name].gpus
    ]
