"""Stage 2: train denoiser and caption encoder by flow matching.

    x_t  = (1 - sigma) * x0 + sigma * noise
    loss = mean (velocity(x_t, sigma, text) - (noise - x0))^2
    sigma = shift(u),  u uniform:  more draws at high noise, where motion is decided

Knows no Ray: a training object takes numbered steps and can be saved and restored; every draw
depends on (seed, step) alone, so a resumed run repeats the uninterrupted one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from pipelines.pretraining.config import DenoiserSettings, TextSettings
from sgmd_core.errors import NonFiniteError, non_finite_remedy
from workers.adamw import make_adamw, restore_moments
from workers.models.wan import WanVelocity
from workers.models.wan_text import CaptionEncoder, embed_captions


@dataclass(frozen=True, slots=True)
class FlowDraws:
    """Random numbers of one batch: noise like x0, sigma (B,), and which captions are dropped."""

    noise: Tensor
    sigma: Tensor
    dropped: Tensor


class TeacherNetworks(nn.Module):
    """Denoiser and caption encoder as one network, trained jointly.

    Args:
        transformer: The denoiser.
        text_encoder: The caption encoder.
        tokenizer: Its tokenizer.
    """

    def __init__(
        self,
        transformer: WanVelocity,
        text_encoder: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer

    def forward(
        self, x_t: Tensor, sigma: Tensor, captions: Sequence[str], text_length: int
    ) -> Tensor:
        """Velocity of noisy latents (B, C, T, H, W) under their captions."""
        text = embed_captions(self.tokenizer, self.text_encoder, captions, text_length)
        return self.transformer(x_t, sigma, text)

    def caption_encoder(self) -> CaptionEncoder:
        """The caption half, for sampling."""
        return CaptionEncoder(self.tokenizer, self.text_encoder)


def draw_flow(
    num_samples: int, latent_shape: Sequence[int], settings: DenoiserSettings, seed: int
) -> FlowDraws:
    """Draw noise, noise levels and dropped captions for one batch.

    Noise levels are stratified over the batch: as random, but evenly spread, which lowers the
    variance of the loss.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_samples, *latent_shape, generator=generator)
    offset = torch.rand((), generator=generator)
    uniform = (torch.arange(num_samples) / num_samples + offset).remainder(1.0)
    uniform = uniform[torch.randperm(num_samples, generator=generator)]
    shift = settings.sigma_shift
    sigma = shift * uniform / (1 + (shift - 1) * uniform)
    dropped = torch.rand(num_samples, generator=generator) < settings.caption_dropout
    return FlowDraws(noise=noise, sigma=sigma, dropped=dropped)


def flow_matching_loss(
    networks: nn.Module, x0: Tensor, captions: Sequence[str], draws: FlowDraws, text_length: int
) -> Tensor:
    """Mean squared error of the predicted velocity.

    Args:
        networks: Maps (x_t, sigma, captions, text_length) to a velocity.
        x0: Normalised latents (B, C, T, H, W).
        captions: One caption per sample; dropped ones become "".
        draws: Noise, noise levels and dropped captions.
        text_length: Text positions of the embeddings.

    Returns:
        Float32 scalar.
    """
    sigma = draws.sigma.to(x0)
    noise = draws.noise.to(x0)
    level = sigma[:, None, None, None, None]
    x_t = (1 - level) * x0 + level * noise
    kept = [
        "" if drop else caption
        for caption, drop in zip(captions, draws.dropped.tolist(), strict=True)
    ]
    velocity = networks(x_t, sigma, kept, text_length)
    return (velocity - (noise - x0)).square().mean()


@dataclass(frozen=True, slots=True)
class RateSchedule:
    """Learning rate over steps: warm-up, hold, and a linear fall that a score sets off.

    Attributes:
        settings: Section `denoiser` of the recipe.
        decay_start: Step at which the fall began; None while the rate is held.
    """

    settings: DenoiserSettings
    decay_start: int | None = None

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        peak, warmup = self.settings.learning_rate, self.settings.warmup_steps
        if step < warmup:
            return peak * (step + 1) / warmup
        if self.decay_start is None:
            return peak
        fallen = (step - self.decay_start) / self.settings.decay_steps
        return peak * max(0.0, 1 - fallen)

    def after_step(self, step: int, direction_score: float | None) -> "RateSchedule":
        """The schedule for the steps after `step`, given the score measured there, if any."""
        if self.decay_start is not None:
            return self
        reached = direction_score is not None and (
            direction_score >= self.settings.hold_until_score
        )
        if reached or step >= self.settings.max_hold_steps:
            return RateSchedule(self.settings, decay_start=step)
        return self

    def is_over(self, step: int) -> bool:
        """True once the rate has fallen to zero."""
        return self.decay_start is not None and step >= self.decay_start + self.settings.decay_steps


class DenoiserTraining:
    """Denoiser and caption encoder under training, with their moving average.

    Args:
        networks: What is trained.
        settings: Section `denoiser` of the recipe.
        text: Section `text` of the recipe.
        seed: Seed of the run.
        rank: Index of this worker: workers draw different batches.
        sync_gradients: Averages the gradients over workers, where there are several.
    """

    def __init__(
        self,
        networks: TeacherNetworks,
        settings: DenoiserSettings,
        text: TextSettings,
        seed: int,
        rank: int = 0,
        sync_gradients: Callable[[Iterable[nn.Parameter]], None] = lambda parameters: None,
    ) -> None:
        self.networks = networks
        self.settings = settings
        self.text = text
        self.schedule = RateSchedule(settings)
        self.num_steps_done = 0
        self._seed = seed
        self._rank = rank
        self._sync_gradients = sync_gradients
        self._average = {
            name: value.detach().clone() for name, value in networks.named_parameters()
        }
        self._optimizer = make_adamw(
            networks.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )

    @property
    def is_over(self) -> bool:
        """True once the schedule has ended."""
        return self.schedule.is_over(self.num_steps_done)

    def step(self, latents: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """Take one step on a batch drawn from latents (N, C, T, H, W) and their captions.

        Raises:
            NonFiniteError: the loss is not finite; nothing was updated.
        """
        step = self.num_steps_done
        rate = self.schedule.rate(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        seed = (self._seed * 1_000_003 + step) * 1_009 + self._rank
        chosen = torch.randint(
            len(latents),
            (self.settings.batch_size,),
            generator=torch.Generator().manual_seed(seed),
        )
        draws = draw_flow(len(chosen), latents.shape[1:], self.settings, seed + 1)
        is_long = step % self.text.long_every_steps == self.text.long_every_steps - 1
        loss = flow_matching_loss(
            self.networks,
            latents[chosen],
            [str(captions[int(index)]) for index in chosen],
            draws,
            self.text.long_length if is_long else self.text.max_length,
        )
        if not torch.isfinite(loss):
            raise NonFiniteError(
                "training the denoiser",
                f"the loss {loss.item()} at step {step}",
                "a finite loss",
                non_finite_remedy(step, "denoiser.learning_rate")
                + ". The last checkpoint is as it was",
            )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._sync_gradients(self.networks.parameters())
        norm = nn.utils.clip_grad_norm_(self.networks.parameters(), self.settings.max_grad_norm)
        self._optimizer.step()
        self._update_average(step)
        self.num_steps_done += 1
        return {"loss": loss.item(), "grad_norm": float(norm), "learning_rate": rate}

    def watched(self, direction_score: float | None) -> None:
        """Tell the rate schedule the score measured after the last step, or None."""
        self.schedule = self.schedule.after_step(self.num_steps_done, direction_score)

    @contextmanager
    def averaged(self) -> Iterator[TeacherNetworks]:
        """Lend the networks with the moving average in them; the trained weights return after."""
        trained = {name: value.detach().clone() for name, value in self.networks.named_parameters()}
        self._assign(self._average)
        try:
            yield self.networks
        finally:
            self._assign(trained)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs."""
        return {
            "networks": self.networks.state_dict(),
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
            "num_steps_done": self.num_steps_done,
            "decay_start": self.schedule.decay_start,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.networks.load_state_dict(state["networks"])
        self._average = {name: value.clone() for name, value in state["average"].items()}
        restore_moments(self._optimizer, state["optimizer"]["state"])
        self.num_steps_done = state["num_steps_done"]
        self.schedule = RateSchedule(self.settings, state["decay_start"])

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        # A short horizon at first, so that the average does not remember the initial weights.
        decay = min(self.settings.ema_decay, (step + 1) / (step + 10))
        trained = dict(self.networks.named_parameters())
        torch._foreach_lerp_(
            [self._average[name] for name in trained], [*trained.values()], 1 - decay
        )

    @torch.no_grad()
    def _assign(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.networks.named_parameters():
            parameter.copy_(values[name])
