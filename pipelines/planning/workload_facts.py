"""Facts of a recipe that a workload is counted from: heads, sizes, and roles by their settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from pipelines.config.adapters import adapted_roles
from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, TEACHER
from pipelines.config.sequence import require_divisible
from pipelines.config.walk import may_walk_once
from pipelines.planning.networks import (
    family_of_role,
    latent_buckets_of,
)
from sgmd_core.buckets import LatentBuckets
from workers.discriminator_heads import num_head_parameters
from workers.models.shape import DenoiserShape, ModelShape
from workers.network_settings import ComputeSettings, OptimizerSettings

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class HeadsWork:
    """A discriminator: heads on a frozen copy of the teacher.

    Attributes:
        num_heads: Layers whose outputs have a head.
        num_parameters: Of all heads, which are trained in float32.
        weights: Type that the copy's weights are kept in.
    """

    num_heads: int
    num_parameters: int
    weights: str = "fp32"


def heads_of(config: DistillConfig, teacher: DenoiserShape) -> HeadsWork | None:
    """The discriminator's heads on a teacher of this shape; None for methods without one."""
    own = config.discriminator
    if config.adversary is None:
        return None
    num_heads = len(own.layers_of(teacher.num_layers))
    of_each = num_head_parameters(teacher.width, own.width, own.num_strides)
    return HeadsWork(num_heads, num_heads * of_each, own.compute.weights)


def largest_size_label(config: DistillConfig, buckets: LatentBuckets, shape: DenoiserShape) -> str:
    """Label of the size with most tokens, of several."""
    if len(buckets.shapes) < 2:
        return ""
    labels = [bucket.label for bucket in config.video.trained]
    tokens = [shape.num_tokens(latent_shape) for latent_shape in buckets.shapes]
    return labels[tokens.index(max(tokens))]


def optimizers_of(config: DistillConfig) -> dict[str, OptimizerSettings]:
    """Settings by which each learner is updated."""
    learners = [role for role in config.roles if role != TEACHER]
    return {role: getattr(config, role).optimizer for role in learners}


def shareable_buckets(
    config: DistillConfig, shape: ModelShape, others: Mapping[str, DenoiserShape]
) -> LatentBuckets:
    """Latent shapes of the trained sizes, whose tokens the ranks of each role can share."""
    buckets = latent_buckets_of(config, shape)
    _require_whole_tokens(config.computes, shape.denoiser, others, buckets)
    return buckets


def _require_whole_tokens(
    computes: Mapping[str, ComputeSettings],
    shape: DenoiserShape,
    others: Mapping[str, DenoiserShape],
    buckets: LatentBuckets,
) -> None:
    """Checks that ranks which work on samples together share tokens and heads evenly."""
    for role, compute in computes.items():
        own = others.get(TEACHER if role == DISCRIMINATOR else role, shape)
        for latent_shape in buckets.shapes:
            require_divisible(role, compute.ulysses, own, latent_shape)


def roles_where(settings: Mapping[str, S], holds: Callable[[S], bool]) -> frozenset[str]:
    """The roles whose settings satisfy a condition."""
    return frozenset(role for role, own in settings.items() if holds(own))


def roles_over_bf16(config: DistillConfig) -> frozenset[str]:
    """The roles with adapters over a base that is kept in bfloat16."""
    computes = config.computes
    return frozenset(role for role in adapted_roles(config) if computes[role].weights == "bf16")


def allows_joint_walk(config: DistillConfig, model: str | None) -> bool:
    """True if the fake score's two gradients may be made by one backward pass."""
    return (
        may_walk_once(config.objective, config.fake_score)
        and "joint" in family_of_role(config, FAKE_SCORE, model).traits.computes
    )
