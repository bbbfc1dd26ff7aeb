"""Stage 1: train the video autoencoder by reconstruction.

    loss = mean (decoded - video)^2 + kl_weight * KL(posterior, N(0, 1))

Knows no Ray: a training object takes numbered steps and can be saved and restored; every draw
depends on (seed, step) alone, so a resumed run repeats the uninterrupted one.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from pipelines.pretraining.config import VaeSettings
from sgmd_core.errors import NonFiniteError, non_finite_remedy
from workers.adamw import make_adamw, restore_moments

_PIXEL_LEVELS = 255.0
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True)
class VaeLoss:
    """Loss of one batch and its parts; `psnr_db` is that of the reconstruction."""

    total: Tensor
    l1: Tensor
    l2: Tensor
    kl: Tensor
    psnr_db: Tensor


def to_unit_video(pixels: Tensor) -> Tensor:
    """uint8 (B, T, H, W, 3) to float (B, 3, T, H, W) in [0, 1]."""
    return pixels.permute(0, 4, 1, 2, 3).float() / _PIXEL_LEVELS


def psnr_db(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of videos in [0, 1], in decibel; mean over the batch."""
    error = (first - second).square().mean(dim=(1, 2, 3, 4))
    return (-10 * error.clamp_min(1e-12).log10()).mean()


def vae_loss(
    vae: AutoencoderKLWan, video: Tensor, kl_weight: float, generator: torch.Generator
) -> VaeLoss:
    """Reconstruction loss of videos (B, 3, T, H, W) in [0, 1]; the networks see [-1, 1]."""
    posterior = vae.encode(2 * video - 1, return_dict=False)[0]
    latents = posterior.sample(generator)
    decoded = vae.decode(latents, return_dict=False)[0].float()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    error = decoded - (2 * video - 1)
    l1, l2 = error.abs().mean(), error.square().mean()
    with torch.no_grad():
        quality = psnr_db((decoded.clamp(-1, 1) + 1) / 2, video)
    return VaeLoss(total=l2 + kl_weight * kl, l1=l1, l2=l2, kl=kl, psnr_db=quality)


def cosine_rate(step: int, num_steps: int, warmup_steps: int) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class VaeTraining:
    """An autoencoder under training.

    Args:
        vae: The network.
        settings: Section `vae` of the recipe.
        seed: Seed of the run; workers pass different ones.
        sync_gradients: Averages the gradients over workers, where there are several.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        settings: VaeSettings,
        seed: int,
        sync_gradients: Callable[[Iterable[nn.Parameter]], None] = lambda parameters: None,
    ) -> None:
        self.vae = vae
        self.settings = settings
        self.seed = seed
        self.num_steps_done = 0
        self._sync_gradients = sync_gradients
        self._optimizer = make_adamw(
            vae.parameters(), lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )

    def step(self, clips: Tensor) -> dict[str, float]:
        """Take one step on clips drawn from uint8 (N, T, H, W, 3).

        Raises:
            NonFiniteError: the loss is not finite; the weights are as before the step.
        """
        rate = cosine_rate(self.num_steps_done, self.settings.num_steps, self.settings.warmup_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * self.settings.learning_rate
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.num_steps_done)
        loss = vae_loss(self.vae, self._draw(clips, generator), self.settings.kl_weight, generator)
        if not torch.isfinite(loss.total):
            raise NonFiniteError(
                "training the autoencoder",
                f"the loss {loss.total.item()} at step {self.num_steps_done}",
                "a finite loss",
                non_finite_remedy(self.num_steps_done, "vae.learning_rate")
                + ". The last checkpoint is as it was",
            )
        self._optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        self._sync_gradients(self.vae.parameters())
        nn.utils.clip_grad_norm_(self.vae.parameters(), _MAX_GRAD_NORM)
        self._optimizer.step()
        self.num_steps_done += 1
        return {
            "loss": loss.total.item(),
            "l1": loss.l1.item(),
            "kl": loss.kl.item(),
            "psnr_db": loss.psnr_db.item(),
            "learning_rate": rate * self.settings.learning_rate,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs."""
        return {
            "vae": self.vae.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "num_steps_done": self.num_steps_done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.vae.load_state_dict(state["vae"])
        restore_moments(self._optimizer, state["optimizer"]["state"])
        self.num_steps_done = state["num_steps_done"]

    def _draw(self, clips: Tensor, generator: torch.Generator) -> Tensor:
        """A batch of whole clips, or more often of short pieces, which cost a third."""
        index = torch.randint(len(clips), (self.settings.batch_size,), generator=generator)
        short = float(torch.rand((), generator=generator)) < self.settings.short_clip_share
        num_frames = clips.shape[1]
        length = min(self.settings.short_clip_frames, num_frames) if short else num_frames
        start = int(torch.randint(num_frames - length + 1, (), generator=generator))
        return to_unit_video(clips[index, start : start + length])


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, clips: Tensor, batch_size: int = 32) -> Tensor:
    """Posterior means, not normalised, of uint8 clips (N, T, H, W, 3): (N, C, T', H', W')."""
    return torch.cat(
        [
            vae.encode(2 * to_unit_video(batch) - 1, return_dict=False)[0].mean
            for batch in clips.split(batch_size)
        ]
    )


def store_latent_statistics(vae: AutoencoderKLWan, latents: Tensor) -> None:
    """Write mean and deviation of each latent channel into the autoencoder's configuration.

    The pipeline normalises with them, so that the denoiser sees zero mean and unit variance.
    """
    vae.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(),
        latents_std=latents.std(dim=(0, 2, 3, 4)).tolist(),
    )


@torch.no_grad()
def reconstruction_psnr_db(vae: AutoencoderKLWan, clips: Tensor, batch_size: int = 32) -> float:
    """Reconstruction quality on uint8 clips (N, T, H, W, 3), in decibel, mean over clips."""
    total = 0.0
    for batch in clips.split(batch_size):
        video = to_unit_video(batch)
        latents = vae.encode(2 * video - 1, return_dict=False)[0].mode()
        decoded = vae.decode(latents, return_dict=False)[0]
        total += float(psnr_db((decoded.clamp(-1, 1) + 1) / 2, video)) * len(batch)
    return total / len(clips)
