"""One iteration of the SGMD authors' released trainer, built plainly of torch and diffusers.

    generator   roll out; fake score, recorded; teacher with the caption, then without it
                backward of Fisher - 0.1 correction, which also makes gradients of the fake score's
                parameters; these are thrown away; clip, AdamW
    fake score  the same once more on another batch without its backward pass, for samples, noise
                and level alone, with the rollout's exit step recorded for nobody
                fake score on them, recorded; backward of its velocity loss; clip, AdamW

So a rollout of four steps costs 12 forward passes an iteration: 5 of the generator on average, 3
of the fake score, 4 of the teacher. What is repeated and thrown away is theirs, and is what ours is
measured against. Their text encoder, averaging over ranks and logging are left out; the figures
that they log are read off the device as they read them.

Source: a description of the trainer released with SGMD (arXiv:2605.30116), August 2026.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from sgmd_core.types import Draws

CORRECTION_WEIGHT = 0.1
_FLOOR = 1e-8
_OVER_ELEMENTS = (1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Batch:
    """Captions of a micro-batch, encoded, and the negative one for each sample."""

    text: Tensor
    negative: Tensor


@dataclass(frozen=True, slots=True)
class Losses:
    """Results of the generator's phase.

    Attributes:
        x0: Samples, with the graph of their exit step.
        fisher: Fisher term.
        correction: Correction by the fake score, before its weight.
        residual: Mean distance of the teacher's prediction from each sample.
    """

    x0: Tensor
    fisher: Tensor
    correction: Tensor
    residual: Tensor


class Network:
    """A network that is trained, with AdamW and a constant rate.

    Args:
        network: The network.
        lr: Learning rate.
        max_grad_norm: Norm that gradients are clipped to.
    """

    def __init__(self, network: WanTransformer3DModel, lr: float, max_grad_norm: float) -> None:
        self.network = network.train()
        self._max_grad_norm = max_grad_norm
        self._adamw = torch.optim.AdamW(
            network.parameters(), lr=lr, betas=(0.0, 0.999), eps=1e-8, weight_decay=0.01
        )
        self._rate = get_scheduler("constant", self._adamw)

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Velocity in float32."""
        return velocity(self.network, x_t, sigma, text)

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self._adamw.zero_grad()

    def step(self) -> float:
        """Clips and updates; returns the norm before."""
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self._max_grad_norm)
        self._adamw.step()
        self._rate.step()
        return float(norm)


class AuthorsIteration:
    """Generator, fake score and teacher, and one iteration after another.

    Args:
        make_network: Makes a network; all three start alike.
        sigmas: Falling noise levels of the generator's steps, 0 the last.
        guidance_scale: Of the teacher.
        rates: Learning rates of generator and fake score.
        max_grad_norm: Norm that gradients are clipped to.
    """

    def __init__(
        self,
        make_network: Callable[[], WanTransformer3DModel],
        sigmas: Tensor,
        guidance_scale: float = 3.0,
        rates: tuple[float, float] = (2e-6, 4e-7),
        max_grad_norm: float = 10.0,
    ) -> None:
        self._sigmas = sigmas
        self._guidance_scale = guidance_scale
        self.generator = Network(make_network(), rates[0], max_grad_norm)
        self.fake_score = Network(make_network(), rates[1], max_grad_norm)
        self._teacher = make_network().requires_grad_(False)

    def run(
        self,
        batches: Sequence[Batch],
        fresh: Sequence[Batch],
        draw: Callable[[str, int], Draws],
    ) -> dict[str, float]:
        """One update of both networks.

        Args:
            batches: Micro-batches that the generator learns from.
            fresh: As many that the fake score learns from.
            draw: Draws of a phase, `generate` or `track`, and a micro-batch.

        Returns:
            The figures that are logged, of the last micro-batch.
        """
        figures: dict[str, float] = {}
        self.generator.zero_grad()
        for place, batch in enumerate(batches):
            made = self._losses(batch, draw("generate", place))
            loss = made.fisher - CORRECTION_WEIGHT * made.correction
            (loss / len(batches)).backward()
            self.fake_score.zero_grad()
            figures["generator"] = loss.item()
            figures["fisher"] = made.fisher.item()
            figures["fake_correction"] = made.correction.item()
        figures["generator_norm"] = self.generator.step()

        self.fake_score.zero_grad()
        for place, batch in enumerate(fresh):
            draws = draw("track", place)
            with torch.no_grad():
                made = self._losses(batch, draws)
            x0, sigma = made.x0.detach(), _as_factor(draws.sigma)
            x_t = (1 - sigma) * x0 + sigma * draws.noise
            found = self.fake_score.velocity(x_t, draws.sigma, batch.text)
            loss = 0.5 * (found - (draws.noise - x0)).square().mean()
            (loss / len(fresh)).backward()
            apart = 0.5 * (x_t - sigma * found.detach() - x0).square()
            figures["v_pred"] = loss.item()
            figures["x_pred"] = (apart / (_as_factor(made.residual) + _FLOOR)).mean().item()
        figures["fake_score_norm"] = self.fake_score.step()
        return figures

    def _losses(self, batch: Batch, draws: Draws) -> Losses:
        """Rolls out and computes the terms of the generator's loss at a score query."""
        x0 = self._rollout(batch.text, draws)
        sigma = _as_factor(draws.sigma)
        x_t = (1 - sigma) * x0 + sigma * draws.noise
        x0_fake = x_t - sigma * self.fake_score.velocity(x_t, draws.sigma, batch.text)
        with torch.no_grad():
            with_caption = velocity(self._teacher, x_t, draws.sigma, batch.text)
            without = velocity(self._teacher, x_t, draws.sigma, batch.negative)
            guided = without + self._guidance_scale * (with_caption - without)
            x0_teacher = x_t - sigma * guided
            residual = (x0 - x0_teacher).abs().mean(_OVER_ELEMENTS)
            correction = (x0_fake - x0) / sigma.clamp_min(_FLOOR)
        apart = 0.5 * (x0_fake - x0_teacher).square() / (_as_factor(residual) + _FLOOR)
        target = (x0_fake - correction).detach()
        return Losses(
            x0=x0,
            fisher=apart.mean(_OVER_ELEMENTS).mean(),
            correction=0.5 * (x0_fake - target).square().mean(),
            residual=residual,
        )

    def _rollout(self, text: Tensor, draws: Draws) -> Tensor:
        """Euler steps to the exit step, of which that one alone is recorded, by whomever asked."""
        x_t = draws.initial_noise
        for step in range(draws.exit_step + 1):
            sigma, following = self._sigmas[step], self._sigmas[step + 1]
            with torch.set_grad_enabled(step == draws.exit_step):
                found = self.generator.velocity(x_t, sigma.expand(len(x_t)), text)
            if step == draws.exit_step:
                return x_t - sigma * found
            x_t = x_t + (following - sigma) * found
        raise AssertionError("a rollout leaves at one of its steps")


def velocity(network: WanTransformer3DModel, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """Velocity in float32, at the time that the network is trained with."""
    found = network(
        hidden_states=x_t, timestep=1000 * sigma, encoder_hidden_states=text, return_dict=False
    )
    return found[0].float()


def _as_factor(values: Tensor) -> Tensor:
    """One value a sample, ready to multiply latents."""
    return values.reshape(-1, 1, 1, 1, 1)
