"""Bytes that an iteration moves, by stage: weights gathered, tokens exchanged, results sent.

    num_gathers, gathered_bytes    between ranks that share weights
    exchanged_bytes                between ranks that share samples
    result_bytes                   from a role to the next one

All are of one sample or one call, and of all parts: a rank's own is for a layout to say.
"""

from math import prod

from pipelines.config.roles import DISCRIMINATOR, TEACHER
from pipelines.planning.kept_bytes import stream_bytes
from pipelines.planning.stage_work import counted_together, mean_over_sizes, passes_by_stage
from pipelines.planning.workload import StageName, Workload
from pipelines.stages.algorithm import (
    COMPARE_DATA,
    COMPARE_STEPS,
    COMPLETE,
    DENOISE,
    DENOISE_DATA,
    LEARN,
    LEARN_CONSISTENCY,
    LEARN_FLOW,
    NOISE_DATA,
    PREDICT,
    PULLBACK,
    ROLLOUT,
    SAMPLE,
    SIGNAL,
    STAGES,
    TRACK,
    Sent,
)

_EXCHANGED = 4
"""Tensors of a layer, each of the size of the stream."""


def weight_bytes(work: Workload, role: str) -> int:
    """Bytes of a weight as a role gathers it: in the type of its products."""
    return 2 if role in work.bf16 else 4


def gathered_bytes(work: Workload) -> dict[StageName, float]:
    """Bytes of weights and gradients that a sharded call of each stage moves, all ranks' parts.

    Gradients are summed in float32, weights are gathered in the type of a role's products.
    """
    summed = {LEARN: 1.0 + work.diversity.enabled + work.kind.looks.off_trajectory, TRACK: 1.0}
    summed |= {COMPARE_STEPS: 1.0, COMPARE_DATA: 1.0, LEARN_CONSISTENCY: 1.0}
    summed |= {LEARN_FLOW: 1.0}
    if work.kind.joint:
        summed |= {SIGNAL: 1.0, TRACK: 0.0}
    reductions = {(stage.role, stage.name): count for stage, count in summed.items()}
    found: dict[StageName, float] = {}
    for name, count in num_gathers(work).items():
        gradients = reductions.get(name, 0.0)
        trained = work.num_trained(name[0])
        # A discriminator gathers the teacher's copy, and sums gradients of its heads.
        whole = work.shape_of(name[0]).num_parameters if name[0] == DISCRIMINATOR else trained
        weights = weight_bytes(work, name[0]) * (count - gradients) * whole
        found[name] = weights + 4 * gradients * trained
    if work.teacher_whole:
        found |= {name: 0.0 for name in found if name[0] == TEACHER}
    return found


def num_gathers(work: Workload) -> dict[StageName, float]:
    """Counts how often a sharded call of each stage gathers weights or sends gradients."""
    off, guides = work.kind.looks.off_trajectory, work.kind.looks.splits_guidance
    counts = {
        ROLLOUT: work.rollout + off,
        SAMPLE: work.sample,
        LEARN: 2.0 + 3.0 * work.diversity.enabled + 2.0 * off,
        DENOISE: 1.0 + work.diversity.num_anchor_steps + off + guides,
        PULLBACK: 2.0,
        SIGNAL: 2.0 + 2.0 * off,
        TRACK: 2.0 if work.kind.shared else 3.0,
        # Forward, and back with the sum of gradients; tracking asks for nothing more.
        **({SIGNAL: 3.0, TRACK: 0.0} if work.kind.joint else {}),
        NOISE_DATA: 0.0,
        DENOISE_DATA: 1.0,
        # Two forward passes, one backward, and the sum.
        LEARN_CONSISTENCY: 4.0,
        LEARN_FLOW: 3.0 + work.kind.guided_flow,
    }
    if work.heads is not None:
        # Each state forward, one of them backward, and the sum of the heads' gradients.
        counts |= {PREDICT: 1.0, COMPLETE: 1.0}
        counts |= dict.fromkeys((COMPARE_STEPS, COMPARE_DATA), 2.0 + work.kind.compared_states)
    return {(stage.role, stage.name): count for stage, count in counts.items()}


def result_bytes(work: Workload) -> dict[StageName, float]:
    """Bytes of one sample that each stage sends, in the mean; tensors travel in float32."""
    if work.buckets is not None:
        return mean_over_sizes(work, result_bytes)
    size = {
        Sent.LATENTS: 4 * prod(work.latent_shape),
        Sent.TEXT: 4 * work.text_length * work.shape.text_width,
    }
    sent: dict[StageName, float] = {
        (stage.role, stage.name): sum(size[each] for each in stage.sends)
        for stage in STAGES.values()
        if stage.sends
    }
    # Beside its gradient, such a signal carries the teacher's cotangent.
    sent[SIGNAL.role, SIGNAL.name] *= 1 + int(work.kind.through_teacher)
    # Looks have noise of their own, and samples where they are off the trajectory.
    off, guides = int(work.kind.looks.off_trajectory), int(work.kind.looks.splits_guidance)
    beside = {ROLLOUT: guides + 2 * off, DENOISE: 2 * guides + off, SIGNAL: off}
    for stage, count in beside.items():
        sent[stage.role, stage.name] += count * size[Sent.LATENTS]
    return sent


def exchanged_bytes(work: Workload) -> dict[StageName, float]:
    """Bytes of tokens of one sample that pass through a rank's exchanges, by stage.

    Ranks that work together exchange queries, keys, values and the result of self-attention,
    tokens for heads, and their gradients on the way back; of each a rank has its part. Of
    several sizes it is the mean.
    """
    if work.buckets is not None:
        return mean_over_sizes(work, exchanged_bytes)
    together, found = dict(work.ulysses), dict[StageName, float]()
    for stage, passes in passes_by_stage(work).items():
        if stage.role in together:
            again = passes.backwards * (stage.role in work.checkpointing)
            times = passes.forwards + passes.backwards + again
            parts = _EXCHANGED * stream_bytes(work, stage.role) / together[stage.role]
            found[stage.role, stage.name] = times * parts
    return counted_together(found)
