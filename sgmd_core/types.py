"""The records that travel between the roles, and the legend of every shape.

Letters and words mean the same wherever they appear in the four packages:

    b  samples          c  latent channels      t, h, w  latent frames, rows, columns
    l  text tokens      d  width of a text embedding

    x0        clean latents              sigma     noise level in [0, 1]; 1 is pure noise
    noise     standard normal            x_t       (1 - sigma) * x0 + sigma * noise
    velocity  noise - x0                 (the derivative of x_t with respect to sigma)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sgmd_core.interval import interval_state, interval_velocity
from sgmd_core.sample_record import SampleRecord

Latents = Float[Tensor, "b c t h w"]
"""Latents of a batch: sample, channel, latent frame, row, column."""
PerSample = Float[Tensor, " b"]
"""One number for each sample, such as a noise level."""
Text = Float[Tensor, "b l d"]
"""Caption embeddings: sample, text position, width; zeros after a caption's last token."""
Scalar = Float[Tensor, ""]
Samples = Float[Tensor, "b *element"]


VALUE, GRADIENT = "value", "gradient"
"""Kinds of tensors that may be rounded, if a recipe asks for it, when they travel between processes
(`WIRE_KINDS` of a record): what the networks are asked and answer, and what the generator learns.
"""


class Purpose(StrEnum):
    """Use that is made of a batch; two of them never share a random draw."""

    GENERATE = "generate"
    TRACK = "track"
    LAG = "lag"


@dataclass(frozen=True, slots=True)
class MicroBatchKey:
    """Names one micro-batch of one iteration; roles refuse a key that they do not hold.

    Attributes:
        iteration: Number of generator updates made before this one.
        micro_batch: Index within the iteration. The fresh batches of several tracking updates are
            counted on, so that no two of them share a key.
        purpose: `GENERATE` for the batch that teaches the generator (and, in shared tracking, the
            fake score too), `TRACK` for the fresh batch of the separate tracking step, `LAG` for
            the batches that a lag of the fake score is measured on.
        incarnation: Counts restarts of the role groups, so that a call left over from before a
            restart is recognised.
        exit_draw: Which draw of the exit step it takes, counted as `micro_batch` is; None takes one
            of its own. Micro-batches that share one leave their rollouts at the same step.
    """

    iteration: int
    micro_batch: int
    purpose: Purpose = Purpose.GENERATE
    incarnation: int = 0
    exit_draw: int | None = None


@dataclass(frozen=True, slots=True)
class TextBatch(SampleRecord):
    """Encoded captions and where their samples stand in the iteration.

    Attributes:
        text: Caption embeddings, zero after the caption's last token.
        sample_indices: Position of each sample in the whole batch of the iteration. Random draws
            are counted by it, so the draws do not depend on how the batch is split.
    """

    WIRE_KINDS: ClassVar[Mapping[str, str]] = {"text": VALUE}

    text: Text
    sample_indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Looks:
    """Score queries that an objective wants of a micro-batch beside the one at its samples.

    Attributes:
        splits_guidance: The teacher's guidance is asked for at a noise level of its own, between 0
            and that of the exit step; the query itself gets the caption's prediction alone.
        off_trajectory: Samples that the generator makes from a state beside its trajectory.
    """

    splits_guidance: bool = False
    off_trajectory: bool = False


@dataclass(frozen=True, slots=True)
class Look(SampleRecord):
    """Another score query of a micro-batch.

    Attributes:
        sigma: Its noise level.
        noise: Its noise, standard normal.
        x0: Its samples; None: those of the micro-batch.
        start: Noise level that the generator makes its samples from, where they are its own.
    """

    WIRE_KINDS: ClassVar[Mapping[str, str]] = {"x0": VALUE, "noise": VALUE}

    sigma: PerSample
    noise: Latents
    x0: Latents | None = None
    start: PerSample | None = None


@dataclass(frozen=True, slots=True)
class Draws(SampleRecord):
    """Every random number that one micro-batch consumes.

    Attributes:
        initial_noise: Where the rollout starts, standard normal.
        exit_step: The one rollout step, counted from 0, whose graph is kept.
        sigma: Noise level of the score query.
        noise: Noise of the score query, standard normal.
        grid: Falling noise levels of each sample's rollout, where they are drawn; None: those of
            the schedule. All samples have the same number of steps.
        guide: Where the teacher's guidance is asked for, if at a place of its own.
        off: Where samples off the trajectory are made and looked at, if there are any.
    """

    initial_noise: Latents
    exit_step: int
    sigma: PerSample
    noise: Latents
    grid: Float[Tensor, "b levels"] | None = None
    guide: Look | None = None
    off: Look | None = None


@dataclass(frozen=True, slots=True)
class NoisedBatch(SampleRecord):
    """A score query: samples of the generator and the noise that is added to them.

    Fake score and teacher predict velocities at `x_t = (1 - sigma) * x0 + sigma * noise`. `x_t` is
    derived rather than stored: it is cheaper to form than to send, and the gradient of a loss at
    `x0` flows through it. A loss can be computed from the first four fields alone.

    Attributes:
        x0: The generator's samples, clean latents (b, c, t, h, w).
        sigma: Noise level of each sample (b,), in [0, 1].
        noise: Standard normal noise, shaped like `x0`.
        text: Caption embeddings (b, l, d).
        key: The micro-batch.
        generator_version: Updates of the generator before it made the samples.
        guide: Another look, for the teacher's guidance alone.
        off: Another look, at samples off the generator's trajectory.
        anchor: State at a lower noise level, which is noised in place of `x0`; a constant. The
            gradient still belongs to `x0`.
        anchor_sigma: Noise level of the anchor.
        exit_sigma: Noise level that the generator left for `x0` and the anchor from.
        sample_indices: Position of each sample in the iteration's whole batch, for draws that are
            counted by it; empty if nothing is drawn for the query.
    """

    WIRE_KINDS: ClassVar[Mapping[str, str]] = {
        "x0": VALUE,
        "noise": VALUE,
        "text": VALUE,
        "anchor": VALUE,
    }

    x0: Latents
    sigma: PerSample
    noise: Latents
    text: Text
    key: MicroBatchKey = MicroBatchKey(0, 0)
    generator_version: int = 0
    guide: Look | None = None
    off: Look | None = None
    anchor: Latents | None = None
    anchor_sigma: PerSample | None = None
    exit_sigma: PerSample | None = None
    sample_indices: tuple[int, ...] = ()

    @property
    def x_t(self) -> Latents:
        """The noised latents, (1 - sigma) * x0 + sigma * noise, in float32 or wider.

        Of an anchor, `interval.interval_state`.
        """
        if self.anchor is not None and self.anchor_sigma is not None:
            return interval_state(self.anchor, self.noise, self.sigma, self.anchor_sigma)
        sigma = per_sample(self.sigma, self.x0)
        return (1 - sigma) * self.x0 + sigma * self.noise

    @property
    def numbers(self) -> Mapping[str, Tensor]:
        """Its tensors by what they are called in messages, in the order of their making."""
        beside = {} if self.off is None else {"the generator's x0 off its path": self.off.x0}
        return {
            "the text embedding": self.text,
            "the noise": self.noise,
            "the noise level": self.sigma,
            "the generator's x0": self.x0,
            **{name: value for name, value in beside.items() if value is not None},
        }

    def at(self, look: Look) -> "NoisedBatch":
        """The query of another look: at its samples, which may be these, through its noise."""
        return NoisedBatch(
            x0=self.x0 if look.x0 is None else look.x0,
            sigma=look.sigma,
            noise=look.noise,
            text=self.text,
            key=self.key,
            generator_version=self.generator_version,
        )

    @property
    def velocity(self) -> Latents:
        """The velocity of this very sample, noise - x0: what the fake score should predict.

        Of an anchor, `interval.interval_velocity`.
        """
        if self.anchor is not None and self.anchor_sigma is not None:
            return interval_velocity(self.anchor, self.noise, self.sigma, self.anchor_sigma)
        return self.noise - self.x0

    @property
    def chord(self) -> Latents:
        """Velocity of the straight line from `x0` to `x_t`: (x_t - x0) / sigma.

        Without an anchor it is `velocity`, and formed without a division.
        """
        if self.anchor is None:
            return self.velocity
        return (self.x_t - self.x0) / per_sample(self.sigma, self.x0)


@dataclass(frozen=True, slots=True)
class GuideAnswer(SampleRecord):
    """The teacher's two velocities where it is asked for its guidance alone."""

    WIRE_KINDS: ClassVar[Mapping[str, str]] = {"conditional": VALUE, "guided": VALUE}

    conditional: Latents
    guided: Latents


@dataclass(frozen=True, slots=True)
class TeacherPrediction(SampleRecord):
    """The teacher's velocities at a query, constants for every loss.

    Attributes:
        key: The micro-batch.
        velocity: At the query: guided, or with the caption alone where guidance has its own look.
        guide: At the look for guidance.
        off: At the samples off the trajectory, with the caption alone.
    """

    WIRE_KINDS: ClassVar[Mapping[str, str]] = {"velocity": VALUE, "off": VALUE}

    key: MicroBatchKey
    velocity: Latents
    guide: GuideAnswer | None = None
    off: Latents | None = None


@dataclass(frozen=True, slots=True)
class FakePrediction(SampleRecord):
    """The fake score's velocity at a query, for a loss that another role computes."""

    WIRE_KINDS: ClassVar[Mapping[str, str]] = {"velocity": VALUE}

    key: MicroBatchKey
    velocity: Latents


@dataclass(frozen=True, slots=True)
class DataBatch(SampleRecord):
    """Clean latents of the data, in the type in which they are stored."""

    WIRE_KINDS: ClassVar[Mapping[str, str]] = {"x0": VALUE}

    x0: Latents


@dataclass(frozen=True, slots=True)
class GeneratorSignal(SampleRecord):
    """All that a generator may learn from a batch: the gradient of its loss at `x0`.

    Attributes:
        key: The rollout that this signal belongs to.
        grad_x0: Derivative of the iteration's generator loss with respect to the batch's `x0`; the
            share of the batch in the iteration (samples over samples) is already in it.
        generator_version: Number of updates the generator had seen when it made the batch.
        metrics: Loss terms of the batch, means over its samples.
        teacher_cotangent: Derivative of the same loss with respect to the teacher's velocity, where
            the loss depends on `x0` through the teacher's input as well. While it is there, the
            part of `grad_x0` that goes through the teacher is missing.
        grad_off: Derivative at the samples off the trajectory, where there are any.
        fake_cotangent: As `teacher_cotangent`, of the fake score's velocity, where another role has
            computed the loss.
    """

    WIRE_KINDS: ClassVar[Mapping[str, str]] = {
        "grad_x0": GRADIENT,
        "teacher_cotangent": GRADIENT,
        "grad_off": GRADIENT,
        "fake_cotangent": GRADIENT,
    }

    key: MicroBatchKey
    grad_x0: Latents
    generator_version: int
    metrics: Mapping[str, float]
    teacher_cotangent: Latents | None = None
    grad_off: Latents | None = None
    fake_cotangent: Latents | None = None


@dataclass(frozen=True, slots=True)
class DiversityStart(SampleRecord):
    """Start of the generator's rollouts, for a teacher that goes the same way.

    Attributes:
        key: The micro-batch.
        noise: Initial noise of its samples.
        text: Their captions.
        grid: Falling noise levels of the teacher's steps, from 1 to that of the anchor; 1 alone in
            an iteration that leaves the first step as it is.
    """

    SHARED: ClassVar[tuple[str, ...]] = ("grid",)

    WIRE_KINDS: ClassVar[Mapping[str, str]] = {"noise": VALUE, "text": VALUE}

    key: MicroBatchKey
    noise: Latents
    text: Text
    grid: Float[Tensor, " steps"]

    @property
    def num_steps(self) -> int:
        """Steps of the teacher's path."""
        return len(self.grid) - 1

    @property
    def numbers(self) -> Mapping[str, Tensor]:
        """Its tensors by what they are called in messages, in the order of their making."""
        return {"the text embedding": self.text, "the initial noise": self.noise}


@dataclass(frozen=True, slots=True)
class DiversityTarget(SampleRecord):
    """The mean velocity of the teacher's way from the initial noise to its anchor."""

    WIRE_KINDS: ClassVar[Mapping[str, str]] = {"velocity": VALUE}

    key: MicroBatchKey
    velocity: Latents


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss, and the terms that it is made of.

    Attributes:
        value: Scalar with its graph, a mean over samples; call `backward` on it.
        terms: Detached scalars by the names that metrics.jsonl, W&B and the report show.
    """

    value: Scalar
    terms: Mapping[str, Scalar]


def per_sample(values: PerSample, like: Tensor) -> Tensor:
    """Views one value a sample as (b, 1, 1, ...), ready to multiply a batch of `like`'s rank."""
    return values.reshape(-1, *([1] * (like.dim() - 1)))


def sample_mean(values: Tensor) -> PerSample:
    """Mean over every axis but the first: (b, ...) -> (b,)."""
    return values.reshape(values.shape[0], -1).mean(dim=1)


def overflow_as_nan(divisor: PerSample) -> PerSample:
    """A divisor in which infinity is NaN; all else keeps its bits.

    A quotient by an infinite residual would be 0, which says that there is nothing to learn.
    """
    return divisor.masked_fill(divisor.isinf(), float("nan"))


def detached(query: NoisedBatch, x0: Latents | None = None) -> NoisedBatch:
    """The same query on constants, or on another `x0` such as a leaf that wants a gradient."""
    return NoisedBatch(
        key=query.key,
        x0=query.x0.detach() if x0 is None else x0,
        sigma=query.sigma.detach(),
        noise=query.noise.detach(),
        text=query.text.detach(),
        generator_version=query.generator_version,
        anchor=None if query.anchor is None else query.anchor.detach(),
        anchor_sigma=query.anchor_sigma,
        exit_sigma=query.exit_sigma,
    )


def float32(value: Tensor) -> Tensor:
    """At least float32: half types are widened, float64 stays."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
