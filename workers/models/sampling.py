"""Sample clips from a model folder as its users would.

ClipSampler     what a family opens: a pipeline of diffusers, or
EulerSampler    plain Euler steps over the family's own networks
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.velocity import Guidance
from workers.evaluator import VideoDecoder, sample_video, to_pixels
from workers.models.folder import LatentShape
from workers.placement import device_of
from workers.text_encoder import CaptionEmbedder


@dataclass(frozen=True, slots=True)
class SamplingRules:
    """Defaults of sampling a folder that does not state its own.

    Attributes:
        source: What these values are the defaults of, for messages.
        multiple_px: Height and width must be multiples of it, beyond what the networks ask for.
        num_steps: Denoising steps.
        guidance_scale: s in `uncond + s * (cond - uncond)`.
        flow_shift: Shift of the noise levels.
        text_length: Text positions that the denoiser sees.
        num_frames: Video frames a clip.
        height: Pixels.
        width: Pixels.
        fps: Frames a second.
    """

    source: str
    multiple_px: int
    num_steps: int
    guidance_scale: float
    flow_shift: float
    text_length: int
    num_frames: int
    height: int
    width: int
    fps: int


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One clip to sample.

    Attributes:
        prompt: What to show.
        seed: Seed of the initial noise, drawn on the CPU: the same clip on every machine.
        num_steps: Denoising steps.
        guidance_scale: s in `uncond + s * (cond - uncond)`; 1 is the conditional prediction alone.
        schedule: Noise levels of the sampler.
        text_length: Text positions that the denoiser sees.
        negative_prompt: What guidance leads away from.
        num_frames: Video frames.
        height: Pixels.
        width: Pixels.
    """

    prompt: str
    seed: int
    num_steps: int
    guidance_scale: float
    schedule: FlowMatchSchedule
    text_length: int
    negative_prompt: str
    num_frames: int
    height: int
    width: int

    @property
    def listed(self) -> bool:
        """True if the levels are those that the schedule lists, which are for unguided steps."""
        steps = self.schedule.steps
        return steps is not None and len(steps) == self.num_steps and self.guidance_scale == 1


class ClipSampler(Protocol):
    """Networks that are ready to sample."""

    def sample(
        self, request: SampleRequest, on_step: Callable[[int], None] = lambda step: None
    ) -> NDArray[np.uint8]:
        """Sample one clip.

        Args:
            request: The clip.
            on_step: Called with the number of steps done, after each.

        Returns:
            Pixels (frames, height, width, 3).
        """
        ...


class EulerSampler:
    """Euler steps along the shifted flow grid, for families without a pipeline of diffusers.

    Args:
        denoiser: Velocity model.
        embedder: Tokenizer and text encoder.
        decoder: Latents to pixels.
        latent_shape: Shape of the latents of a clip by (frames, height, width).
    """

    def __init__(
        self,
        denoiser: nn.Module,
        embedder: CaptionEmbedder,
        decoder: VideoDecoder,
        latent_shape: Callable[[int, int, int], LatentShape],
    ) -> None:
        self._denoiser: Any = denoiser
        self._embedder = embedder
        self._decoder = decoder
        self._latent_shape = latent_shape

    @torch.no_grad()
    def sample(
        self, request: SampleRequest, on_step: Callable[[int], None] = lambda step: None
    ) -> NDArray[np.uint8]:
        """Sample one clip; see `ClipSampler`."""
        device = device_of(self._denoiser)
        shape = self._latent_shape(request.num_frames, request.height, request.width)
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(request.seed))
        captions = [request.prompt, request.negative_prompt]
        text, negative = self._embedder.encode(captions, request.text_length).to(device).split(1)
        video = sample_video(
            self._denoiser,
            self._decoder,
            request.schedule,
            noise.to(device),
            text,
            Guidance(negative, request.guidance_scale),
            request.num_steps,
            on_step,
        )
        (pixels,) = to_pixels(video)
        return pixels
