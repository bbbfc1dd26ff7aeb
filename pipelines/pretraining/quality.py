"""Sample a teacher and measure what its clips show."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipelines.embedded_worlds import embedded_world
from pipelines.pretraining.config import PretrainConfig, SamplingSettings
from pipelines.pretraining.vae_stage import psnr_db, to_unit_video
from pipelines.shapes import ClipSplit, EmbeddedWorld
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.velocity import Guidance, VelocityModel
from sgmd_core.worlds.readings import WorldScores
from sgmd_core.worlds.shapes import ClipScores
from workers.evaluator import sample_video
from workers.models.families import family_of
from workers.models.family import Autoencoder

_QUALITY_SEED = 9_001
_DECODE_BATCH = 32

Embed = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True, slots=True)
class QualityReport:
    """Quality of a finished teacher, on held-out captions.

    Attributes:
        guided: Scores of the guided sampler with all its steps.
        guided_long_text: The same with captions padded to the default length of diffusers.
        unguided_4_steps: Scores of four unguided steps: what distillation has to beat.
        vae_psnr_db: Reconstruction of rendered held-out clips; mean over clips.
        measurer: Scores of the measurement itself on the rendered clips.
        reconstructed: Scores of the clips after encoding and decoding.
    """

    guided: WorldScores
    guided_long_text: WorldScores
    unguided_4_steps: WorldScores
    vae_psnr_db: float
    measurer: WorldScores
    reconstructed: WorldScores

    def in_words(self) -> str:
        """Scores of the guided clips in one line."""
        good = self.guided
        last = (
            f"speed rank correlation {good.speed_spearman:.3f}"
            if isinstance(good, ClipScores)
            else f"pace {good.pace:.3f}, rest or motion {good.verb:.3f}, count {good.count:.3f}"
        )
        return (
            f"{good.num_clips} held-out captions: colour {good.colour:.3f}, "
            f"shape {good.shape:.3f}, direction {good.direction:.3f}, {last}; "
            f"autoencoder {self.vae_psnr_db:.1f} dB"
        )


def measure_folder(folder: Path, config: PretrainConfig) -> QualityReport:
    """Measure a diffusers folder of an embedded world; see `QualityReport`."""
    settings, world = config.sampling, config.world
    rules = embedded_world(world.name)
    family = family_of(folder)
    denoiser, text = family.load_denoiser(folder), family.load_text(folder)
    vae = family.load_autoencoder(folder)
    frames = (world.num_frames, world.frame_px, world.frame_px)
    latent_shape = family.inspect(folder).latent_shape(*frames)
    seed = config.seed + _QUALITY_SEED
    captions = held_out_captions(rules, settings.num_clips, seed)

    def scores(sampling: SamplingSettings, text_length: int) -> WorldScores:
        videos = sample_videos(
            denoiser,
            lambda texts: text.encode(texts, text_length),
            vae,
            captions,
            latent_shape,
            sampling,
            seed,
        )
        return rules.score(videos, captions)

    few = settings.model_copy(update={"num_steps": 4, "guidance_scale": 1.0})
    rendered, _ = rules.draw(seed, range(settings.num_clips), ClipSplit.HELD_OUT)
    truth = to_unit_video(torch.from_numpy(rendered))
    decoded = torch.cat([vae.decode(vae.encode(part)) for part in truth.split(_DECODE_BATCH)])
    return QualityReport(
        guided=scores(settings, config.text.max_length),
        guided_long_text=scores(settings, config.text.long_length),
        unguided_4_steps=scores(few, config.text.max_length),
        vae_psnr_db=float(psnr_db(decoded, truth)),
        measurer=rules.score(truth, captions),
        reconstructed=rules.score(decoded, captions),
    )


def held_out_captions(world: EmbeddedWorld, num_clips: int, seed: int) -> list[str]:
    """Captions that training never sees, drawn as clips are."""
    return world.captions(seed, range(num_clips), ClipSplit.HELD_OUT)


@torch.no_grad()
def sample_videos(
    velocity: VelocityModel,
    embed: Embed,
    vae: Autoencoder,
    captions: Sequence[str],
    latent_shape: Sequence[int],
    settings: SamplingSettings,
    seed: int,
) -> Tensor:
    """Sample one video (B, 3, T, H, W) in [0, 1] for each caption."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(captions), *latent_shape, generator=generator)
    guidance = Guidance(embed([""]), settings.guidance_scale)
    schedule = FlowMatchSchedule(shift=settings.flow_shift)
    videos = [
        sample_video(
            velocity,
            vae,
            schedule,
            noise[start : start + settings.batch_size],
            embed(captions[start : start + settings.batch_size]),
            guidance,
            settings.num_steps,
        )
        for start in range(0, len(captions), settings.batch_size)
    ]
    return torch.cat(videos)
