"""Adapters in a recipe: which roles share one base, and what does not go with adapters."""

from collections.abc import Sequence
from itertools import combinations

from pipelines.config.model_folders import same_model
from pipelines.config.recipe_sections import RecipeSections
from pipelines.config.roles import FAKE_SCORE, GENERATOR, ROLES, TEACHER
from pipelines.config.topology import TopologySettings


def adapted_roles(config: RecipeSections) -> tuple[str, ...]:
    """Roles that train adapters."""
    found = {GENERATOR: config.generator.lora, FAKE_SCORE: config.fake_score.lora}
    return tuple(role for role, lora in found.items() if lora is not None)


def share_process(topology: TopologySettings, first: str, second: str) -> bool:
    """Returns True if some process has ranks of both roles."""
    places = topology.places
    return topology.mode == "local" or bool({*places[first]} & {*places[second]})


def teacher_is_base(config: RecipeSections) -> bool:
    """Returns True if the teacher is the base of adapters in a process of its own."""
    models = config.models_of_roles
    return any(
        share_process(config.topology, TEACHER, role) and same_model(models[role], models[TEACHER])
        for role in adapted_roles(config)
    )


def lora_contradictions(config: RecipeSections) -> list[str]:
    """Returns what does not go with adapters, as sentences."""
    adapted = adapted_roles(config)
    if not adapted:
        return []
    problems: list[str] = []
    if config.fake_score.ida_decay < 1:
        problems.append(
            f"fake_score.ida_decay {config.fake_score.ida_decay} mixes weights, and mixed A and B "
            f"of adapters are not those of mixed weights; set it to 1, or {_keys(adapted)} to null"
        )
    models = config.models_of_roles
    weights = {role: getattr(config, role).compute.weights for role in ROLES}
    frozen = [role for role in ROLES if role in adapted or role == TEACHER]
    problems += [
        f"{first}.compute.weights is {weights[first]} and {second}.compute.weights "
        f"{weights[second]}, but the two share one base in a process; set both to the same"
        for first, second in combinations(frozen, 2)
        if weights[first] != weights[second]
        and share_process(config.topology, first, second)
        and same_model(models[first], models[second])
    ]
    return problems


def _keys(roles: Sequence[str]) -> str:
    return " and ".join(f"{role}.lora" for role in roles)
