"""Samples clips, of teacher and generator alike.

    captions -> text -> Euler steps from counted noise -> decoder -> video in [0, 1]

One network serves everybody: the base model's weights are the teacher's, and other weights of the
same network, such as a generator's averaged ones, are put in for a call without being loaded. The
noise of a clip is counted by (seed, index of its caption), so two ways of sampling see the same
noise when they use the same seed, however the captions are split.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from sgmd_core.inner_flow import TransitionModel
from sgmd_core.rollout import euler_sample
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.seeds import random_generator
from sgmd_core.types import Latents, Text
from sgmd_core.velocity import NegativeText, VelocityModel
from workers.placement import device_of
from workers.role_state import require_same_tensors
from workers.sharding import parameters_of
from workers.text_encoder import TextEncoder

Video = Tensor
"""Clips (b, 3, t, h, w) in [0, 1], float32, on the CPU."""

CHUNK_CLIPS = 16
"""Clips that are sampled side by side, unless told otherwise."""

_STREAM = "evaluate"


class VideoDecoder(Protocol):
    """Latents to pixels, such as a `workers.models.family.Autoencoder`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents (b, c, t, h, w) to clips (b, 3, t', h', w') in [0, 1]."""
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """A way of sampling.

    Attributes:
        num_steps: Euler steps.
        guidance_scale: s in `uncond + s * (cond - uncond)`; 1 is the conditional prediction alone.
        seed: Seed of the initial noise.
    """

    num_steps: int
    guidance_scale: float
    seed: int


def sample_video(
    model: VelocityModel,
    decoder: VideoDecoder,
    schedule: FlowMatchSchedule,
    noise: Latents,
    text: Text,
    negative: NegativeText | None,
    num_steps: int,
    guidance_scale: float,
    on_step: Callable[[int], None] | None = None,
) -> Video:
    """Samples clips from their initial noise and decodes them, side by side.

    Args:
        model: Teacher or generator.
        decoder: Turns latents into pixels.
        schedule: Noise levels of the sampler.
        noise: Standard normal (b, c, t, h, w), on the model's device.
        text: Embedding of each clip's caption.
        negative: Embedding that guidance leads away from; needed for a scale other than 1.
        num_steps: Euler steps.
        guidance_scale: s in `uncond + s * (cond - uncond)`; 1 is no guidance.
        on_step: Called with the number of steps done, after each.

    Returns:
        Clips (b, 3, t, h, w) in [0, 1], float32, on the CPU.
    """
    latents = euler_sample(
        model,
        schedule.sampling_grid(num_steps, guidance_scale),
        noise,
        text,
        negative,
        guidance_scale,
        on_step,
        renoise=schedule.renoises(guidance_scale),
    )
    return decoder.decode(latents).float().cpu()


class Evaluator:
    """Samples with the base model, or with other weights in its place.

    Args:
        velocity_model: The base model's denoiser; it is frozen here.
        text_encoder: Embeds captions.
        decoder: Turns latents into pixels.
        schedule: Noise levels of the sampler.
        latent_shape: Shape (C, T, H, W) of one clip's latents.
        negative_prompt: What guidance leads away from.
        chunk_clips: Clips that are sampled side by side.
        adapted: Network that other weights are put into, where these are adapters of the base
            model or weights of another size; None puts them into the base model.
    """

    def __init__(
        self,
        velocity_model: nn.Module,
        text_encoder: TextEncoder,
        decoder: VideoDecoder,
        schedule: FlowMatchSchedule,
        latent_shape: tuple[int, int, int, int],
        negative_prompt: str = "",
        chunk_clips: int = CHUNK_CLIPS,
        adapted: nn.Module | None = None,
    ) -> None:
        self._network = velocity_model.eval().requires_grad_(False)
        self._other = self._network if adapted is None else adapted.eval()
        self._replaced = (
            dict(self._network.named_parameters()) if adapted is None else parameters_of(adapted)
        )
        self._text_encoder = text_encoder
        self._decoder = decoder
        self._schedule = schedule
        self._latent_shape = latent_shape
        self._negative_prompt = negative_prompt
        self._chunk_clips = chunk_clips

    def scheduled(self, schedule: FlowMatchSchedule) -> Self:
        """An evaluator over the same networks that samples by another schedule."""
        other = copy.copy(self)
        other._schedule = schedule
        return other

    @torch.no_grad()
    def sample(
        self,
        captions: Sequence[str],
        first_index: int,
        seed: int,
        num_steps: int,
        guidance_scale: float,
        weights: Mapping[str, Tensor] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Video:
        """Samples one clip a caption.

        Args:
            captions: What to show.
            first_index: Index of the first caption in the whole set; counts the noise.
            seed: Seed of the initial noise.
            num_steps: Euler steps.
            guidance_scale: s in `uncond + s * (cond - uncond)`; 1 is no guidance.
            weights: Parameters by name, or adapters, to use instead of the base model's.
            on_progress: Called after every step of every chunk with (steps done, steps in all).

        Returns:
            Clips (b, 3, t, h, w) in [0, 1], float32, on the CPU.

        Raises:
            CheckpointError: The weights are those of another network.
        """
        model = self._model(weights)
        starts = range(0, len(captions), self._chunk_clips)
        clips: list[Tensor] = []
        for number, start in enumerate(starts):
            chunk = captions[start : start + self._chunk_clips]

            def on_step(step: int, done: int = number * num_steps) -> None:
                if on_progress is not None:
                    on_progress(done + step, len(starts) * num_steps)

            noise = self._noise(seed, first_index + start, len(chunk))
            text = self._text_encoder.encode(chunk, range(len(chunk))).text
            negative = self._text_encoder.encode_negative(self._negative_prompt)
            clips.append(
                sample_video(
                    model,
                    self._decoder,
                    self._schedule,
                    noise,
                    text.to(noise.device),
                    negative.to(noise.device),
                    num_steps,
                    guidance_scale,
                    on_step,
                )
            )
        return torch.cat(clips)

    def _model(self, weights: Mapping[str, Tensor] | None) -> VelocityModel:
        if weights is None:
            return self._network
        require_same_tensors(weights, self._replaced, "sampling with other weights")
        device = device_of(self._network)
        placed = {name: value.to(device) for name, value in weights.items()}

        def velocity(x_t: Latents, sigma: Tensor, text: Tensor, /, *noise: Latents) -> Latents:
            return functional_call(self._other, placed, (x_t, sigma, text, *noise))

        if isinstance(self._other, TransitionModel):
            # By this attribute samplers tell a transition, and give it inner noise.
            velocity.inner_steps = self._other.inner_steps  # pyright: ignore
        return velocity

    def _noise(self, seed: int, first_index: int, count: int) -> Latents:
        """Initial noise of the captions from `first_index` on, one stream each."""
        clips = [
            torch.randn(self._latent_shape, generator=random_generator(seed, _STREAM, index))
            for index in range(first_index, first_index + count)
        ]
        return torch.stack(clips).to(device_of(self._network))


def to_pixels(video: Video) -> list[NDArray[np.uint8]]:
    """Clips (b, 3, t, h, w) in [0, 1] as pixels (t, h, w, 3), one array a clip."""
    frames = (video * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)
    return [clip.numpy() for clip in frames.contiguous()]
