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
These are the terms alone: no role here trains a discriminator yet.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from sgmd_core.types import Latents, NoisedBatch, Scalar, float32

Logits = Float[Tensor, "*logits"]


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


def logit_gap(real: Logits, fake: Logits) -> Scalar:
    """Mean logit of real minus that of fake: 0 for good is a discriminator that sees nothing."""
    return (float32(real).mean() - float32(fake).mean()).detach()


def discriminator_accuracy(real: Logits, fake: Logits) -> Scalar:
    """Share of logits with the right sign, of equally many real and fake ones."""
    right = torch.cat([(real > 0).flatten(), (fake < 0).flatten()])
    return right.float().mean()
