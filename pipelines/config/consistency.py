"""A method with a consistency term in a recipe: what its derivatives and its sampler ask for."""

from collections.abc import Iterator

from pipelines.config.recipe_sections import RecipeSections
from pipelines.config.roles import GENERATOR, ROLES
from sgmd_core.objectives.consistency import ConsistentObjective, consistency_of
from sgmd_core.objectives.meanflow import flow_of

_LEAST_NORM = 1e3
"""Least `max_grad_norm` for losses that are sums: usual limits are for means, and clip each step.

Published runs clip nothing, which 1e6 comes to.
"""


def consistency_contradictions(config: RecipeSections) -> list[str]:
    """Returns what does not go with a derivative of the generator, as sentences."""
    if consistency_of(config.objective) is None:
        return rounded_derivatives(config)
    method, compute = config.objective.method, config.generator.compute
    problems = rounded_derivatives(config)
    if not config.schedule.renoise and config.generator.num_steps > 1:
        problems.append(
            f"objective.method {method} learns to go to clean latents, and its second step would "
            "start where no data are noised to; set schedule.renoise=true, or generator.num_steps=1"
        )
    if compute.compile:
        problems.append(
            f"generator.compute.compile has no derivative in forward mode, which {method} takes; "
            "set it to false"
        )
    if compute.weights != "fp32":
        problems.append(
            f"generator.compute.weights {compute.weights} has too few digits for the derivative "
            f"that {method} takes; set it to fp32"
        )
    return problems


def rounded_derivatives(config: RecipeSections) -> list[str]:
    """Returns a sentence where a derivative of the generator would have too few digits."""
    method, compute = config.objective.method, config.generator.compute
    takes_one = consistency_of(config.objective) or flow_of(config.objective)
    # Only then, because pools that contradict themselves have no ranks to be counted.
    if takes_one is None or compute.precision != "bf16":
        return []
    if config.topology.teams_of(ROLES)[GENERATOR].ranks == 1:
        return []
    return [
        "generator.compute.precision bf16 has several ranks gather the weights in bfloat16, in "
        f"which the derivative that {method} takes has too few digits; set it to fp32, or give "
        "the generator one rank"
    ]


def clipped_sums(config: RecipeSections) -> Iterator[str]:
    """Returns a sentence where gradients of summed losses are clipped in every update."""
    norm = config.generator.optimizer.max_grad_norm
    if isinstance(config.objective, ConsistentObjective) and norm < _LEAST_NORM:
        yield (
            f"generator.optimizer.max_grad_norm {norm:g} clips every update, because the losses of "
            f"{config.objective.method} are sums over a clip's values; 1e6 clips nothing, as "
            "published"
        )
