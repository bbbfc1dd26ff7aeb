"""Work of the stages of an iteration: passes through networks, in units of a forward pass.

`pipelines.stages.costs` has the passes of one call of each stage; here they are weighed by the
sizes, clips and checkpointing of a workload. With checkpointing, k steps and guidance, in forward
passes of one sample:

    rollout (k + 1) / 2   denoise 2   signal 2 + i   track 1 + w (fresh: 2 + w)   learn 1 + w

where i and w are the costs of backward passes to the input and to the weights, `PassCosts`.

With shared tracking the two backward passes of the fake score go one after the other over one
forward pass, so with checkpointing its activations are made three times in all; twice where one
walk makes both (`fake_score.walk`).
"""

from collections.abc import Callable, Mapping

from pipelines.config.roles import TEACHER
from pipelines.planning.workload import StageName, Workload, remember
from pipelines.stages.algorithm import (
    ANCHOR,
    DENOISE,
    DIVERSIFY,
    LEARN,
    ROLLOUT,
    STAGES,
    START,
    StageSpec,
)
from pipelines.stages.costs import PassCosts, Passes, stage_passes

COUNTED_WITH = {START: ROLLOUT, ANCHOR: DENOISE, DIVERSIFY: LEARN}
"""Stages of a diversity loss, which the planned program does not have, and their role's own."""


def made_again(work: Workload, role: str) -> float:
    """Part of a forward pass that is made again for each backward pass of a role."""
    if role not in work.selective:
        return float(role in work.checkpointing)
    shape = work.shape_of(role)
    flops = shape.pass_flops(work.latent_shape, work.text_length)
    tokens = shape.num_tokens(work.latent_shape)
    # Of attention that of the tokens to each other; the rest looks at the caption.
    kept = flops.attention * tokens / (tokens + work.text_length)
    return 1 - kept / flops.forward


def role_costs(work: Workload) -> dict[str, PassCosts]:
    """Costs of each role's passes at this clip's size, in forward passes of the teacher."""
    flops = {
        role: work.shape_of(role).pass_flops(work.latent_shape, work.text_length)
        for role in work.roles
    }
    return {role: PassCosts.of(own, flops[TEACHER].forward) for role, own in flops.items()}


def units_by_stage(work: Workload) -> dict[StageName, float]:
    """Work of one call of each stage on one sample, in forward passes.

    The stages of a diversity loss are counted with the role's own: see `Workload.program`.
    """
    return counted_together(stage_units(work))


def backwards_by_stage(work: Workload) -> dict[StageName, float]:
    """Backward passes of one sample by stage, those of a diversity loss as in `units_by_stage`."""
    table = passes_by_stage(work)
    return counted_together(
        {(stage.role, stage.name): passes.backwards for stage, passes in table.items()}
    )


def split_by_stage(work: Workload, seconds: Mapping[StageName, float]) -> dict[StageName, float]:
    """Splits seconds that hold those of a diversity loss among its stages, by their work."""
    found: dict[StageName, float] = {}
    counted = units_by_stage(work)
    for (role, stage), units in stage_units(work).items():
        name = _counted_with(role, stage)
        # A stage that asks no network has no other with it.
        part = units / counted[name] if units else 1.0
        found[role, stage] = seconds[name] * part
    return found


@remember
def stage_units(work: Workload) -> Mapping[StageName, float]:
    """Work of one call of each stage on one sample, in forward passes of the generator."""
    return {
        (stage.role, stage.name): _relative_cost(work, stage.role)
        * passes.units(_costs_of(work, stage.role), checkpointed=made_again(work, stage.role))
        for stage, passes in passes_by_stage(work).items()
    }


def _costs_of(work: Workload, role: str) -> PassCosts:
    return PassCosts.of(work.shape_of(role).pass_flops(work.latent_shape, work.text_length))


def _relative_cost(work: Workload, role: str) -> float:
    """Operations of a forward pass of a role over those of the generator's."""
    own = work.shape_of(role)
    if own is work.shape:
        return 1.0
    return own.forward_flops(work.latent_shape, work.text_length) / work.forward_flops


def passes_by_stage(work: Workload) -> Mapping[StageSpec, Passes]:
    """Passes of one sample, for one call of each stage."""
    return stage_passes(
        work.kind,
        rollout=work.rollout,
        sample=work.sample,
        guided=work.guided,
        anchor_steps=work.diversity.num_anchor_steps,
    )


def mean_over_sizes(
    work: Workload, table: Callable[[Workload], Mapping[StageName, float]]
) -> dict[StageName, float]:
    """Mean of a figure of each stage over the sizes that are trained, by their weights.

    Args:
        work: The iteration.
        table: The figure by stage, of an iteration of one size.
    """
    found: dict[StageName, float] = {}
    for share, one in work.sizes:
        for name, value in table(one).items():
            found[name] = found.get(name, 0.0) + share * value
    return found


def counted_together(units: Mapping[StageName, float]) -> dict[StageName, float]:
    """Adds the stages of a diversity loss to those that they are counted with."""
    found: dict[StageName, float] = {}
    for (role, stage), value in units.items():
        name = _counted_with(role, stage)
        found[name] = found.get(name, 0.0) + value
    return found


def _counted_with(role: str, stage: str) -> StageName:
    counted = COUNTED_WITH.get(STAGES[role, stage])
    return (role, stage) if counted is None else (counted.role, counted.name)
