"""Adversarial terms: what a discriminator and a generator minimise, and what a discriminator sees.

    hinge      D  mean max(0, 1 - real) + mean max(0, 1 + fake)       G  -mean fake
    softplus   D  mean softplus(-real) + mean softplus(fake)          G  mean softplus(-fake)
    both       D  + weight * mean (logit(x) - logit(x + s noise))^2   approximate R1

ADM (adversarial distribution matching) shows the discriminator one step of the probability-flow
equation from the same noised sample, the teacher's as real and the fake score's as fake:

    x_real = x_t - delta velocity_teacher,   x_fake = x_t - delta velocity_fake

so the generator's gradient passes through x_t and through the fake score's input. With a linear
discriminator along x_real - x_fake it is (delta / sigma) (1 - sigma) (I - delta d velocity_fake /
d x_t)' gap: the direction of `dmd` as delta falls to 0, that of `tsg_fisher` at delta = sigma.
DMD2's GAN term shows it real latents and the generator's, noised alike.

Real and fake differ by delta (velocity_teacher - velocity_fake), so a fake score that still is the
teacher leaves the discriminator nothing to see.

Source: ADM (arXiv:2507.18569) and DMD2 (arXiv:2405.14867); approximate R1 as in video trainers.
`workers.discriminator` trains the discriminator.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sgmd_core.errors import ConfigError
from sgmd_core.objectives.settings import require_number
from sgmd_core.seeds import random_generator
from sgmd_core.types import Latents, Loss, NoisedBatch, PerSample, Scalar, float32

Logits = Float[Tensor, "*logits"]

NOISE_THIRDS = ("low", "middle", "high")
"""Thirds of the noise levels, from 0 to 1."""
_PART, _SHARE = "logit_gap_{}_part", "logit_gap_{}_share"


def hinge_discriminator_loss(real: Logits, fake: Logits) -> Scalar:
    """Loss of a discriminator under the hinge: 2 where it says nothing, 0 beyond the margins.

    Args:
        real: Its logits of what it should accept.
        fake: Its logits of what it should refuse.
    """
    return (1 - float32(real)).relu().mean() + (1 + float32(fake)).relu().mean()


def hinge_generator_loss(fake: Logits) -> Scalar:
    """Loss of a generator under the hinge: `-mean fake`."""
    return -float32(fake).mean()


def softplus_discriminator_loss(real: Logits, fake: Logits) -> Scalar:
    """Loss of a discriminator in the non-saturating form: 2 log 2 where it says nothing.

    Args:
        real: Its logits of what it should accept.
        fake: Its logits of what it should refuse.
    """
    return functional.softplus(-float32(real)).mean() + functional.softplus(float32(fake)).mean()


def softplus_generator_loss(fake: Logits) -> Scalar:
    """Loss of a generator in the non-saturating form: `mean softplus(-fake)`."""
    return functional.softplus(-float32(fake)).mean()


def approximate_r1(logits: Logits, perturbed: Logits) -> Scalar:
    """Mean squared change of logits under a little noise, in place of a gradient penalty.

    For small noise of standard deviation s it is s^2 times the mean squared gradient of the logit.

    Args:
        logits: At the real samples.
        perturbed: At the same samples with noise added.
    """
    return (float32(logits) - float32(perturbed)).square().mean()


def probability_flow_step(x_t: Latents, velocity: Latents, delta: float) -> Latents:
    """State one step further towards the data: `x_t - delta velocity`.

    Args:
        x_t: State at a noise level of at least `delta`.
        velocity: A network's velocity there.
        delta: Difference of noise levels.
    """
    return x_t - delta * velocity


def discriminated_states(
    query: NoisedBatch, velocity_fake: Latents, velocity_teacher: Latents, delta: float
) -> tuple[Latents, Latents]:
    """States that ADM's discriminator compares: the teacher's step, and the fake score's.

    Args:
        query: The generator's sample and the noise it is looked at through; `x0` may require a
            gradient.
        velocity_fake: Fake score's prediction, with its graph back to `x0`.
        velocity_teacher: Guided teacher's prediction; a constant.
        delta: Difference of noise levels, 1/64 in the paper.

    Returns:
        The real state, without a graph, and the fake one with its graph through both ways: `x_t`,
        and the fake score's input.
    """
    x_t = query.x_t
    real = probability_flow_step(x_t.detach(), float32(velocity_teacher).detach(), delta)
    return real, probability_flow_step(x_t, float32(velocity_fake), delta)


def noised_alike(query: NoisedBatch, data: Latents) -> tuple[Latents, Latents]:
    """States that the GAN term's discriminator compares, at one noise level and with one noise.

    Args:
        query: The generator's samples and the noise they are looked at through; `x0` may require a
            gradient.
        data: Clean latents of the data, as many.

    Returns:
        The noised data, without a graph, and the noised samples.
    """
    real = replace(query, x0=float32(data).detach().to(query.x0), anchor=None)
    return real.x_t.detach(), query.x_t


def perturbation(
    seed: int, iteration: int, sample_indices: Sequence[int], shape: tuple[int, ...]
) -> Tensor:
    """Noise of `approximate_r1`, standard normal: one stream a sample, counted by iteration.

    Args:
        seed: The run's seed.
        iteration: Updates of the generator made before.
        sample_indices: Position of each sample in the iteration's whole batch.
        shape: Of one sample.
    """
    streams = [random_generator(seed, "perturb", iteration, index) for index in sample_indices]
    return torch.stack([torch.randn(shape, generator=stream) for stream in streams])


def logit_gap(real: Logits, fake: Logits) -> Scalar:
    """Mean logit of real minus that of fake: 0 for good is a discriminator that sees nothing."""
    return (float32(real).mean() - float32(fake).mean()).detach()


def gaps_by_noise(real: Logits, fake: Logits, sigma: PerSample) -> dict[str, Scalar]:
    """Sums from which `finished_gaps` makes the gap of each third of the noise levels.

    They are means over samples, and so add up over micro-batches and ranks, which a mean over the
    samples of a third does not.

    Args:
        real: A discriminator's logits of what it should accept; the first axis is the samples'.
        fake: Those of what it should refuse, of the same samples.
        sigma: Noise level that each sample is looked at through.
    """
    gap = (float32(real) - float32(fake)).detach().flatten(1).mean(dim=1)
    third = (3 * sigma.detach()).long().clamp(0, 2)
    found: dict[str, Scalar] = {}
    for place, name in enumerate(NOISE_THIRDS):
        inside = (third == place).to(gap)
        found[_PART.format(name)] = (inside * gap).mean()
        found[_SHARE.format(name)] = inside.mean()
    return found


def finished_gaps(terms: Mapping[str, float]) -> dict[str, float]:
    """Loss terms of an iteration, with the sums of `gaps_by_noise` turned into gaps.

        logit_gap_low, _middle, _high   below a third of the noise, in the middle, above two thirds

    A third without samples has no gap, and terms without such sums stay as they are.

    Args:
        terms: Means over all samples of an iteration.
    """
    found = dict(terms)
    for name in NOISE_THIRDS:
        part, share = (found.pop(sums.format(name), None) for sums in (_PART, _SHARE))
        if part is not None and share:
            found[f"logit_gap_{name}"] = part / share
    return found


def discriminator_accuracy(real: Logits, fake: Logits) -> Scalar:
    """Share of logits with the right sign, of equally many real and fake ones."""
    right = torch.cat([(real > 0).flatten(), (fake < 0).flatten()])
    return right.float().mean()


@dataclass(frozen=True, slots=True)
class AdversarialTerm:
    """Loss of generator and discriminator against each other, with an approximate R1 penalty.

    A part of `AdmObjective` and, if set, of `Dmd2Objective` and `TmdObjective`. The fields are the
    recipe keys below `objective.adversary:`.

    Attributes:
        weight: Weight of the term in the generator's loss.
        loss: `hinge`, or `softplus`, which is not saturating.
        r1_weight: Weight of the approximate R1 penalty in the discriminator's loss; 0 leaves it
            out. Video trainers have 20 to 600.
        r1_sigma: Standard deviation of its noise, in latent units.
    """

    weight: float = 1.0
    loss: Literal["hinge", "softplus"] = "hinge"
    r1_weight: float = 0.0
    r1_sigma: float = 0.05

    def __post_init__(self) -> None:
        require_number("adversary.weight", self.weight, zero_allowed=False)
        require_number("adversary.r1_weight", self.r1_weight, zero_allowed=True)
        require_number("adversary.r1_sigma", self.r1_sigma, zero_allowed=False)
        if self.loss not in ("hinge", "softplus"):
            raise ConfigError(
                "reading the objective",
                f"adversary.loss is {self.loss!r}",
                "'hinge' or 'softplus'",
            )

    @property
    def has_penalty(self) -> bool:
        """True if the discriminator is also asked about perturbed states."""
        return self.r1_weight > 0

    @property
    def num_states(self) -> int:
        """States of a sample that the discriminator looks at."""
        return 2 + self.has_penalty

    def generator_loss(self, fake: Logits) -> Loss:
        """Term of the generator's loss, its weight included.

        Args:
            fake: Logits of what the generator has made, with their graph.
        """
        loss = hinge_generator_loss if self.loss == "hinge" else softplus_generator_loss
        value = loss(fake)
        return Loss(self.weight * value, {"adversarial": value.detach()})

    def discriminator_loss(self, real: Logits, fake: Logits, perturbed: Logits | None) -> Loss:
        """Loss of the discriminator.

        Args:
            real: Its logits of what it should accept.
            fake: Its logits of what it should refuse.
            perturbed: Its logits of what it should accept with a little noise; None without a
                penalty.
        """
        hinge = self.loss == "hinge"
        loss = hinge_discriminator_loss if hinge else softplus_discriminator_loss
        value = loss(real, fake)
        terms = {
            "discriminator": value.detach(),
            "logit_gap": logit_gap(real, fake),
            "discriminator_accuracy": discriminator_accuracy(real, fake),
        }
        if perturbed is None:
            return Loss(value, terms)
        penalty = approximate_r1(real, perturbed)
        return Loss(value + self.r1_weight * penalty, {**terms, "r1": penalty.detach()})
