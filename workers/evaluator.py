"""Samples clips, of teacher and generator alike.

    captions -> text -> Euler steps from counted noise -> decoder -> video in [0, 1]

One network serves everybody: the base model's weights are the teacher's, and other weights of the
same network, such as a generator's averaged ones, are put in for a call without being loaded. A GPU
never holds both: those that they replace are in main memory meanwhile, and so is the text encoder
while clips are sampled. The noise of a clip is counted by (seed, index of its caption), so two ways
of sampling see the same noise when they use the same seed, however the captions are split.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import clear_frames
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
from sgmd_core.velocity import Guidance, VelocityModel
from workers.placement import device_of
from workers.role_state import require_same_tensors
from workers.sharding import parameters_of
from workers.text_encoder import TextEncoder

Video = Tensor
"""Clips (b, 3, t, h, w) in [0, 1], float32, on the CPU."""

CHUNK_CLIPS = 16
"""Clips that are sampled in one batch by default."""

TOKENS_SIDE_BY_SIDE = 2**15
"""Most tokens of these clips: more keep no GPU busier. 81 frames of 480x832 have 32,760."""

_STREAM = "evaluate"


class VideoDecoder(Protocol):
    """Latents to pixels, such as a `workers.models.family.Autoencoder`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents (b, c, t, h, w) to clips (b, 3, t', h', w') in [0, 1]."""
        ...


def clips_side_by_side(most: int, tokens: int) -> int:
    """Largest batch of clips that the network is given at once.

    Args:
        most: Batch that is asked for.
        tokens: Tokens of one clip in the network.

    Returns:
        At least 1 and at most `most`; its tokens are at most `TOKENS_SIDE_BY_SIDE`, or one clip's.
    """
    return max(1, min(most, TOKENS_SIDE_BY_SIDE // tokens))


def sample_video(
    model: VelocityModel,
    decoder: VideoDecoder,
    schedule: FlowMatchSchedule,
    noise: Latents,
    text: Text,
    guidance: Guidance,
    num_steps: int,
    on_step: Callable[[int], None] | None = None,
) -> Video:
    """Samples clips from their initial noise and decodes them, side by side.

    Args:
        model: Teacher or generator.
        decoder: Turns latents into pixels.
        schedule: Noise levels of the sampler.
        noise: Standard normal (b, c, t, h, w), on the model's device.
        text: Embedding of each clip's caption.
        guidance: Scale, and embedding that guidance leads away from.
        num_steps: Euler steps.
        on_step: Called with the number of steps done, after each.

    Returns:
        Clips (b, 3, t, h, w) in [0, 1], float32, on the CPU.
    """
    latents = euler_sample(
        model,
        schedule.sampling_grid(num_steps, guidance.scale),
        noise,
        text,
        guidance,
        on_step,
        renoise=schedule.renoises(guidance.scale),
    )
    return decoder.decode(latents).float().cpu()


@dataclass(frozen=True, slots=True)
class SampledNetworks:
    """Networks of an evaluator.

    Attributes:
        base: The base model's denoiser, which an evaluator freezes.
        adapted: Network that other weights are put into, where these are adapters of the base
            model or weights of another size; None puts them into the base model.
    """

    base: nn.Module
    adapted: nn.Module | None = None


class Evaluator:
    """Samples with the base model, or with other weights in its place.

    Args:
        networks: The base model's network, and that of other weights.
        text_encoder: Embeds captions.
        decoder: Turns latents into pixels.
        schedule: Noise levels of the sampler.
        latent_shape: Shape (C, T, H, W) of one clip's latents.
        negative_prompt: What guidance leads away from.
        chunk_clips: Clips that are sampled side by side.
        captions_network: Network of `text_encoder`, to be in main memory while clips are sampled.
    """

    def __init__(
        self,
        networks: SampledNetworks,
        text_encoder: TextEncoder,
        decoder: VideoDecoder,
        schedule: FlowMatchSchedule,
        latent_shape: tuple[int, int, int, int],
        negative_prompt: str = "",
        chunk_clips: int = CHUNK_CLIPS,
        captions_network: nn.Module | None = None,
    ) -> None:
        adapted = networks.adapted
        self._other = (networks.base if adapted is None else adapted).eval()
        # Frozen ones stay: the base of adapters, and an expert that was not trained.
        self._replaced = parameters_of(self._other)
        self._network = networks.base.eval().requires_grad_(False)
        # Its parameters are elsewhere while others take their place.
        self._device = device_of(self._network)
        self._text_encoder = text_encoder
        self._encoding = [] if captions_network is None else list(captions_network.parameters())
        self._decoder = decoder
        self._schedule = schedule
        self._latent_shape = latent_shape
        self._negative_prompt = negative_prompt
        self._chunk_clips = chunk_clips

    @property
    def chunk_clips(self) -> int:
        """Clips that are sampled side by side."""
        return self._chunk_clips

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
            guidance_scale: s in `uncond + s * (cond - uncond)`; 1 means no guidance.
            weights: Parameters by name, or adapters, to use instead of the base model's.
            on_progress: Called after every step of every chunk with (steps done, steps in all).

        Returns:
            Clips (b, 3, t, h, w) in [0, 1], float32, on the CPU.

        Raises:
            CheckpointError: The weights are those of another network.
        """
        with self._model(weights) as model:
            chunks = [
                captions[start : start + self._chunk_clips]
                for start in range(0, len(captions), self._chunk_clips)
            ]
            texts = [self._text_encoder.encode(own, range(len(own))).text for own in chunks]
            negative = self._text_encoder.encode_negative(self._negative_prompt)
            guidance = Guidance(negative.to(self._device), guidance_scale)
            clips: list[Tensor] = []
            with _put_aside(self._encoding):
                for number, text in enumerate(texts):

                    def on_step(step: int, done: int = number * num_steps) -> None:
                        if on_progress is not None:
                            on_progress(done + step, len(chunks) * num_steps)

                    first = first_index + number * self._chunk_clips
                    clips.append(
                        sample_video(
                            model,
                            self._decoder,
                            self._schedule,
                            self._noise(seed, first, len(text)),
                            text.to(self._device),
                            guidance,
                            num_steps,
                            on_step,
                        )
                    )
            return torch.cat(clips)

    @contextmanager
    def _model(self, weights: Mapping[str, Tensor] | None) -> Iterator[VelocityModel]:
        """The network with these weights in place of its own, for as long as the context lasts."""
        if weights is None:
            yield self._network
            return
        require_same_tensors(weights, self._replaced, "sampling with other weights")
        with _put_aside(self._replaced.values()):
            placed: dict[str, Tensor] = {}
            try:
                for name, value in weights.items():
                    # As a network of this type is loaded: some of its weights are wider.
                    placed[name] = value.to(self._device, self._replaced[name].dtype)
                yield self._with_weights(placed)
            finally:
                # The caller still has the model; a GPU has no room for both when its own are back.
                placed.clear()

    def _with_weights(self, placed: dict[str, Tensor]) -> VelocityModel:

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
        return torch.stack(clips).to(self._device)


@contextmanager
def _put_aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Keeps parameters in main memory for a while; where they are there already, nothing moves."""
    own = [(one, one.device) for one in parameters]
    try:
        for one, _ in own:
            one.data = one.data.cpu()
        yield
    except BaseException as error:
        # Frames of what has failed hold activations; a second failure would hide the first.
        clear_frames(error.__traceback__)
        raise
    finally:
        for one, device in own:
            one.data = one.data.to(device)


def to_pixels(video: Video) -> list[NDArray[np.uint8]]:
    """Clips (b, 3, t, h, w) in [0, 1] as pixels (t, h, w, 3), one array a clip."""
    frames = (video * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)
    return [clip.numpy() for clip in frames.contiguous()]
