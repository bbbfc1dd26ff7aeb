"""The consistency term of rCM and sCM: the same clean latents from everywhere on a teacher's path.

    f = cos(t) x_trig - sin(t) F                       the generator's x0, see `trigflow`
    g = cos(t) df/dt  along dx_trig/dt = F_teacher     at r = 1; 0 for a consistent generator
      = -cos^2 (F - F_teacher) - (cos sin x_trig + cos sin dF/dt)
    L = weight * sum (F_theta - sg[F + g / (|g| + tangent_offset)])^2        mean over samples

While r rises from 0 to 1 over the tangent warm-up, the two published forms of g are

    rcm   -cos sqrt(1 - r^2 sin^2) (F - F_teacher) - (r cos sin x_trig + cos sin dF/dt)
    scm   -cos^2                   (F - F_teacher) - r (cos sin x_trig + cos sin dF/dt)

Both networks look at data, noised to sigma = z sqrt(T) / (1 + z sqrt(T)) with log z normal and T
latent frames. The sum over elements is as published: a mean would change the balance with the
matching term by the number of elements.

Source: rCM (arXiv:2510.08431) and its code, whose weight is 100; sCM (arXiv:2410.11081).
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

from sgmd_core.errors import ConfigError
from sgmd_core.objectives.settings import require_number
from sgmd_core.trigflow import trig_state, trig_time, trig_velocity, velocity_derivative
from sgmd_core.types import Latents, Loss, NoisedBatch, PerSample, Scalar, per_sample

WarmupForm = Literal["rcm", "scm"]


def consistency_tangent(
    query: NoisedBatch,
    velocity: Latents,
    velocity_teacher: Latents,
    derivative: Latents,
    *,
    warmup: float = 1.0,
    form: WarmupForm = "rcm",
) -> Float64[Tensor, "b c t h w"]:
    """Returns the tangent g of a generator along the teacher's path.

    Args:
        query: Data and the noise that they are looked at through.
        velocity: The generator's velocity there; a constant.
        velocity_teacher: The guided teacher's.
        derivative: Derivative of the generator along sigma (1 - sigma) (velocity_teacher, 1).
        warmup: The factor r, in [0, 1].
        form: Terms that r multiplies.

    Returns:
        The tangent, in latent units, without a graph.
    """
    x_t, velocity = query.x_t.detach(), velocity.detach()
    teacher = velocity_teacher.detach()
    t = trig_time(query.sigma)
    cos, sin = (per_sample(part, x_t) for part in (t.cos(), t.sin()))
    state = cos * sin * trig_state(x_t, t)
    moved = velocity_derivative(x_t, velocity, teacher, derivative.detach(), t)
    apart = trig_velocity(x_t, velocity, t) - trig_velocity(x_t, teacher, t)
    if form == "scm":
        return -cos.square() * apart - warmup * (state + moved)
    return -cos * (1 - warmup**2 * sin.square()).sqrt() * apart - (warmup * state + moved)


def sample_norm(values: Latents) -> PerSample:
    """Euclidean norm of each sample over all of its elements."""
    return values.flatten(1).square().sum(dim=1).sqrt()


def consistency_loss(
    query: NoisedBatch, velocity: Latents, tangent: Latents, *, offset: float
) -> Scalar:
    """Loss whose gradient moves a velocity on the circle along the normalised tangent.

        sum (F_theta - sg[F + g / (|g| + offset)])^2, mean over samples

    Args:
        query: Data and the noise that they are looked at through.
        velocity: The generator's velocity there, with its graph.
        tangent: Of `consistency_tangent`.
        offset: Added to the norm of each sample's tangent.

    Returns:
        The loss in float64.
    """
    target = tangent / per_sample(sample_norm(tangent) + offset, tangent)
    t = trig_time(query.sigma)
    # F_theta - F with the state cancelled; the bracket is zero and carries the gradient.
    moved = (velocity - velocity.detach()).double() / per_sample(t.cos() + t.sin(), velocity)
    return (moved - target).square().flatten(1).sum(dim=1).mean()


@dataclass(frozen=True, slots=True)
class ConsistencyTerm:
    """The term in a generator's loss.

    Attributes:
        weight: Weight of the term; 0 leaves it out, and its warm-up with it.
        warmup: Updates over which r rises from 0 to 1; 0 starts at 1.
        warmup_form: Terms that r multiplies: `rcm` or `scm`.
        tangent_offset: Added to the norm of a sample's tangent.
        log_mean: Mean of log z, whose scale sqrt(T) belongs to clips of T latent frames.
        log_std: Standard deviation of log z.
    """

    weight: float = 100.0
    warmup: int = 0
    warmup_form: WarmupForm = "rcm"
    tangent_offset: float = 0.1
    log_mean: float = -0.8
    log_std: float = 1.6

    def __post_init__(self) -> None:
        for name in ("weight", "tangent_offset", "log_std"):
            require_number(
                f"consistency.{name}", getattr(self, name), zero_allowed=name == "weight"
            )
        if self.warmup < 0:
            raise ConfigError(
                "reading the objective",
                f"consistency.warmup is {self.warmup}",
                "a count of at least 0",
            )
        if self.warmup_form not in ("rcm", "scm"):
            raise ConfigError(
                "reading the objective",
                f"consistency.warmup_form is {self.warmup_form!r}",
                "'rcm' or 'scm'",
            )

    def warmup_at(self, iteration: int) -> float:
        """The factor r of an iteration: a linear rise, then 1."""
        return 1.0 if self.warmup == 0 else min(1.0, iteration / self.warmup)

    def sigma(self, normal: PerSample, num_frames: int) -> PerSample:
        """Noise level of data, from a standard normal number, in float32.

        Args:
            normal: Standard normal numbers.
            num_frames: Latent frames of a sample.
        """
        log_z = self.log_mean + self.log_std * normal.double()
        log_z = log_z + 0.5 * torch.tensor(num_frames).double().log()
        return log_z.sigmoid().float()

    def loss(
        self,
        query: NoisedBatch,
        velocity: Latents,
        constant: Latents,
        velocity_teacher: Latents,
        derivative: Latents,
    ) -> Loss:
        """The term, its weight included.

        Args:
            query: Data and the noise that they are looked at through.
            velocity: The generator's velocity there, with its graph.
            constant: The same velocity as it was computed beside the derivative.
            velocity_teacher: The guided teacher's.
            derivative: See `consistency_tangent`.

        Returns:
            The loss in float64, and its detached terms: `consistency`, without its weight, and
            `tangent_norm`, the norm of a sample's tangent before it is normalised.
        """
        tangent = consistency_tangent(
            query,
            constant,
            velocity_teacher,
            derivative,
            warmup=self.warmup_at(query.key.iteration),
            form=self.warmup_form,
        )
        value = consistency_loss(query, velocity, tangent, offset=self.tangent_offset)
        terms = {"consistency": value.detach(), "tangent_norm": sample_norm(tangent).mean()}
        return Loss(self.weight * value, terms)


@runtime_checkable
class ConsistentObjective(Protocol):
    """Part of an objective whose generator loss has a consistency term on latents of the data."""

    @property
    def consistency(self) -> ConsistencyTerm:
        """Term on noised latents of the data: its weight, warm-up and law of noise levels."""
        ...

    @property
    def matches(self) -> bool:
        """True if the generator also learns from its own samples."""
        ...


@runtime_checkable
class DataObjective(Protocol):
    """Part of an objective with a term on latents of the data, which may stand alone."""

    @property
    def matches(self) -> bool:
        """True if the generator also learns from its own samples."""
        ...


def learns_from_samples(objective: object) -> bool:
    """True if the generator learns from its own samples with an objective."""
    return not isinstance(objective, DataObjective) or objective.matches


def consistency_of(objective: object) -> ConsistencyTerm | None:
    """The consistency term of an objective; None without one, or where its weight is 0."""
    if not isinstance(objective, ConsistentObjective) or objective.consistency.weight == 0:
        return None
    return objective.consistency
