"""The frozen teacher in a recipe: what does not go with how its weights are kept."""

from pipelines.config.adapters import teacher_is_base
from pipelines.config.recipe_sections import RecipeSections
from pipelines.config.roles import TEACHER
from pipelines.config.topology import TopologySettings


def teacher_ranks(topology: TopologySettings) -> int:
    """Most ranks of a pool that share the weights of one teacher."""
    if topology.mode == "local":
        return 1
    if topology.shares_pools:
        return max(topology.role_pools[name].ranks for name in topology.places[TEACHER])
    return topology.teacher.ranks


def frozen_contradictions(config: RecipeSections) -> list[str]:
    """Returns what does not go with weights in fp8, as sentences."""
    teacher, problems = config.teacher, list[str]()
    if teacher.compute.weights != "fp8":
        return problems
    ranks = teacher_ranks(config.topology)
    if teacher.sharded and ranks > 1:
        problems.append(
            f"teacher.compute.weights is fp8 and {ranks} ranks share them, but FSDP2 gathers no "
            "fp8; set teacher.sharded=false, which keeps them whole on every rank, or "
            "teacher.compute.weights=bf16"
        )
    if teacher_is_base(config):
        problems.append(
            "teacher.compute.weights is fp8, but adapters in its process have it as their base; "
            "set teacher.compute.weights=bf16"
        )
    return problems
