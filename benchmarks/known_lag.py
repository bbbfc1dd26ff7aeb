"""Lag of fake scores in closed-form worlds: as a run measures it, and as it is.

An affine generator of one step makes a Gaussian, whose velocity is known. So beside the figure that
needs no truth (`sgmd_core.metrics.lag`) stands what it is a lower limit of: the share of the
tracking loss that is error of a settled copy against the exact velocity.
"""

from dataclasses import dataclass

import torch

from pipelines.config.lag import LagSettings
from pipelines.study.gaussians.distilling import GaussianDistillation, Velocity, points
from sgmd_core.metrics.lag import settling_updates, tracking_lag
from sgmd_core.types import Latents, NoisedBatch
from sgmd_core.worlds.gaussian import full_gaussian_velocity


@dataclass(frozen=True, slots=True)
class KnownLag:
    """Lag of one member.

    Attributes:
        measured: The figure of a run; None where nothing was finite.
        own_rate: The same by a copy at the fake score's own rate alone.
        exact: Error of the settled copy against the exact velocity, over the tracking loss.
        error: The same of the fake score itself: with the noise of its steps.
        loss: The tracking loss, in velocities.
    """

    measured: float | None
    own_rate: float | None
    exact: float
    error: float
    loss: float


def known_lags(
    distillation: GaussianDistillation, iteration: int, settings: LagSettings
) -> list[KnownLag]:
    """Lag of every member; all are then as they were, bit for bit.

    Args:
        distillation: Its generators are affine, of one step.
        iteration: Iterations made.
        settings: What is measured on.
    """
    held = distillation.held_queries(iteration, settings.batches)
    before = distillation.held_loss(held)
    exact = exact_velocity(distillation)
    error = distillation.held_error(held, exact)
    settling = settling_updates(settings.updates)
    with distillation.extra_updates(iteration, 1.0, settling, settings.batches):
        settled, left = distillation.held_loss(held), distillation.held_error(held, exact)
    after: dict[float, torch.Tensor] = {}
    for rate in dict.fromkeys((1.0, *settings.rates)):
        with distillation.extra_updates(iteration, rate, settings.updates, settings.batches):
            after[rate] = distillation.held_loss(held)
    found: list[KnownLag] = []
    members = zip(before.tolist(), settled.tolist(), error.tolist(), left.tolist(), strict=True)
    for member, (loss, base, wrong, lagging) in enumerate(members):
        own = {rate: losses[member].item() for rate, losses in after.items()}
        counted = {rate: own[rate] for rate in settings.rates}
        measured = tracking_lag(loss, base, counted)
        alone = tracking_lag(loss, base, {1.0: own[1.0]})
        found.append(
            KnownLag(
                measured and measured[0], alone and alone[0], lagging / loss, wrong / loss, loss
            )
        )
    return found


def exact_velocity(distillation: GaussianDistillation) -> Velocity:
    """Velocity of what the present generators make, for affine ones of one step."""
    laws = distillation.affine_laws()

    def exact(query: NoisedBatch) -> Latents:
        x_t = points(query.x_t).double().chunk(len(laws))
        sigma = query.sigma.double().chunk(len(laws))
        pairs = zip(x_t, sigma, laws, strict=True)
        velocities = [full_gaussian_velocity(x, s, *law) for x, s, law in pairs]
        return torch.cat(velocities).reshape(query.x_t.shape)

    return exact
