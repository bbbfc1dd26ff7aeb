"""Settings of `pretrain`, read from one recipe file."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Self

from pydantic import Field, PositiveFloat, PositiveInt

from pipelines.config.recipe_files import absolute_path, load
from pipelines.config.section import Section
from pipelines.shapes import FRAME_PX
from sgmd_core.schedule import MAX_STEPS
from sgmd_core.worlds import WorldName

TEMPORAL_FACTOR = 4
"""Frames that a trained autoencoder packs into one; the first frame stands alone."""
SPATIAL_FACTOR = 4
"""Pixels to a side that a trained autoencoder packs into one, those of its patches apart."""
ROPE_LENGTH = 64
"""Most positions along one axis that the denoiser tells apart."""
# Motion is measured over at least four.
_FEWEST_FRAMES = TEMPORAL_FACTOR + 1

Text = Annotated[str, Field(min_length=1)]
Size = Annotated[int, Field(ge=1, le=2**16)]
"""Of one side of a weight, or a number of layers."""
BatchSize = Annotated[int, Field(ge=1, le=2**20)]
TextLength = Annotated[int, Field(ge=1, le=2**14)]
"""Text positions; the text encoder's memory grows with their square."""
Beta = Annotated[float, Field(ge=0, lt=1)]


class WorldSettings(Section):
    """Clips: their folder and their size.

    `train` and `held_out` are folders of Parquet shards, local or `s3://`: of captioned videos, or
    `train` of what `sgmd encode` has made of them. `name` is the embedded world whose held-out
    captions the teacher is sampled with, and by whose reading of pixels it is scored.
    """

    train: Text
    held_out: Text
    num_frames: PositiveInt = 13
    frame_px: PositiveInt = 32
    fps: int = Field(default=8, ge=1, le=2**16 - 1)
    max_clips: PositiveInt | None = None
    name: WorldName = WorldName.SHAPES


class VaeSettings(Section):
    """The video autoencoder and its training.

    With `folder`, a model folder, its autoencoder is taken and none is trained. Encoded clips need
    it: they hold no videos to train one on.
    """

    folder: Text | None = None
    base_dim: Size = 16
    latent_channels: Size = 16
    patch_size: PositiveInt = 2
    dim_mult: tuple[Size, Size, Size] = (1, 2, 2)
    residual_resampling: bool = True
    num_res_blocks: Size = 1
    num_steps: PositiveInt = 2500
    batch_size: BatchSize = 8
    learning_rate: PositiveFloat = 2e-3
    warmup_steps: PositiveInt = 50
    kl_weight: float = Field(default=1e-5, ge=0)
    short_clip_frames: PositiveInt = 5
    short_clip_share: float = Field(default=0.75, ge=0, le=1)


class TextSettings(Section):
    """The caption encoder, trained jointly with the denoiser.

    `max_length` is the text length of training and of our own sampling; in one of
    `long_every_steps` steps captions are padded to `long_length`, the default of diffusers'
    pipeline, whose padding takes part in cross-attention.
    """

    hidden_dim: Size = 64
    num_layers: Size = 2
    num_heads: Size = 4
    ffn_dim: Size = 128
    max_length: TextLength = 16
    long_length: TextLength = 512
    long_every_steps: PositiveInt = 16


class DenoiserSettings(Section):
    """The denoiser, its training, and when its learning rate may fall.

    The rate is held until the direction score of guided samples has reached `hold_until_score`
    (looked at every `watch_every_steps`), at most for `max_hold_steps`; then it falls to zero
    over `decay_steps`. Directions are learnt late and suddenly, and only at a high rate.
    """

    num_layers: Size = 4
    num_heads: Size = 4
    head_dim: int = Field(default=32, ge=2, le=2**16, multiple_of=2)
    ffn_dim: Size = 384
    freq_dim: Size = 64
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 1, 1)
    batch_size: BatchSize = 24
    learning_rate: PositiveFloat = 1.5e-3
    warmup_steps: PositiveInt = 200
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    ema_decay: float = Field(default=0.998, ge=0, lt=1)
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    sigma_shift: PositiveFloat = 3.0
    hold_until_score: float = Field(default=0.9, ge=0, le=1)
    max_hold_steps: PositiveInt = 9000
    decay_steps: PositiveInt = 2500
    watch_every_steps: PositiveInt = 500
    watch_clips: BatchSize = 64
    watch_sampling_steps: int = Field(default=12, ge=1, le=MAX_STEPS)


class SamplingSettings(Section):
    """Sampling of clips to watch and measure the teacher."""

    num_steps: int = Field(default=30, ge=1, le=MAX_STEPS)
    guidance_scale: float = Field(default=2.0, ge=1, le=1e4)
    flow_shift: PositiveFloat = 3.0
    num_clips: BatchSize = 256
    batch_size: BatchSize = 64


class RayTrainSettings(Section):
    """Ray Train's settings for the stages.

    An interrupted stage continues from its last checkpoint: at once after a failure (at most
    `max_failures` times), or when the same command is given again.
    """

    num_workers: PositiveInt = 1
    cpus_per_worker: PositiveInt = 1
    checkpoint_every_steps: PositiveInt = 500
    checkpoints_to_keep: PositiveInt = 2
    report_every_steps: PositiveInt = 50
    max_failures: int = Field(default=2, ge=0)


class PretrainConfig(Section):
    """A whole `pretrain` recipe.

    Attributes:
        name: Name of the run.
        run_dir: Folder of the run: checkpoints, stages, figures.
        output: The diffusers folder that the run makes.
        seed: Seed of every draw; small enough that the seed of a step has 64 bits.
        partial_output: Where unfinished teachers are exported at every checkpoint, if anywhere.
    """

    name: Text
    run_dir: Text
    output: Text
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    partial_output: Text | None = None
    world: WorldSettings
    vae: VaeSettings = VaeSettings()
    text: TextSettings = TextSettings()
    denoiser: DenoiserSettings = DenoiserSettings()
    sampling: SamplingSettings = SamplingSettings()
    ray: RayTrainSettings = RayTrainSettings()

    def contradictions(self) -> Iterator[str]:
        """Sentences on settings that do not fit together."""
        world, vae, text = self.world, self.vae, self.text
        if world.num_frames < _FEWEST_FRAMES:
            yield f"world.num_frames is {world.num_frames}, expected at least {_FEWEST_FRAMES}"
        if text.num_heads > text.hidden_dim:
            yield (
                f"text.num_heads {text.num_heads} is more than text.hidden_dim {text.hidden_dim}, "
                "whose channels they share"
            )
        if vae.folder is not None:
            return
        side = SPATIAL_FACTOR * vae.patch_size
        fits = True
        if (world.num_frames - 1) % TEMPORAL_FACTOR:
            fits = False
            expected = _frames_near(world.num_frames)
            yield f"world.num_frames is {world.num_frames}, expected {expected}"
        if world.frame_px % side:
            fits = False
            yield (
                f"world.frame_px is {world.frame_px}, expected a multiple of {side}: "
                f"vae.patch_size {vae.patch_size} times the {SPATIAL_FACTOR} that the autoencoder "
                "packs into one"
            )
        yield from _autoencoder_problems(vae)
        if fits:
            frames = 1 + (world.num_frames - 1) // TEMPORAL_FACTOR
            latents = (vae.latent_channels, frames, world.frame_px // side, world.frame_px // side)
            yield from latent_problems(latents, self.denoiser.patch_size)

    def with_absolute_paths(self) -> Self:
        """The same run for Ray Train's workers, each of which works in a folder of its own."""
        world = {name: absolute_path(getattr(self.world, name)) for name in ("train", "held_out")}
        outputs = {
            name: absolute_path(path)
            for name in ("run_dir", "output", "partial_output")
            if (path := getattr(self, name)) is not None
        }
        vae = {"folder": self.vae.folder and absolute_path(self.vae.folder)}
        return self.model_copy(
            update={
                **outputs,
                "world": self.world.model_copy(update=world),
                "vae": self.vae.model_copy(update=vae),
            }
        )


def load_pretraining(name_or_path: str, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Loads and checks a recipe of `pretrain`.

    Args:
        name_or_path: Name of a recipe that ships, or path of a YAML file.
        overrides: Changes in the form `section.key=value`.

    Raises:
        ConfigError: There is no such recipe, or a setting is wrong; names every one.
    """
    return load(PretrainConfig, name_or_path, overrides)


def latent_problems(latent_shape: Sequence[int], patch_size: Sequence[int]) -> Iterator[str]:
    """Returns why a denoiser cannot take latents.

    Args:
        latent_shape: (channels, frames, rows, columns) of a clip.
        patch_size: Frames, rows and columns of a token: `denoiser.patch_size`.
    """
    sizes = tuple(latent_shape[1:])
    if any(size % patch for size, patch in zip(sizes, patch_size, strict=True)):
        patch = list(patch_size)
        yield f"denoiser.patch_size {patch} does not divide the latents of a clip, {sizes}"
    elif any(size // patch > ROPE_LENGTH for size, patch in zip(sizes, patch_size, strict=True)):
        yield (
            f"world.num_frames and world.frame_px give latents of {sizes}, more than {ROPE_LENGTH} "
            f"patches of {list(patch_size)} along one axis"
        )


def _autoencoder_problems(vae: VaeSettings) -> Iterator[str]:
    """Returns why an autoencoder of these settings cannot be trained."""
    short = vae.short_clip_frames
    if (short - 1) % TEMPORAL_FACTOR:
        yield f"vae.short_clip_frames is {short}, expected {_frames_near(short)}"
    if FRAME_PX % (SPATIAL_FACTOR * vae.patch_size):
        sizes = [each for each in range(1, FRAME_PX) if FRAME_PX % (SPATIAL_FACTOR * each) == 0]
        yield (
            f"vae.patch_size is {vae.patch_size}, expected one of {sizes}: the teacher is measured "
            f"with clips of {FRAME_PX} px"
        )
    first, second, third = vae.dim_mult
    gain = 2**3  # A level halves frames, rows and columns.
    if vae.residual_resampling and (gain % first or gain * first % second or second % third):
        yield (
            f"vae.dim_mult {[first, second, third]} has no shortcuts (vae.residual_resampling): the"
            f" first must divide {gain}, the second {gain} times the first, the third the second"
        )


def _frames_near(found: int) -> str:
    below = found - (found - 1) % TEMPORAL_FACTOR
    near = [each for each in (below, below + TEMPORAL_FACTOR) if each >= 1]
    numbers = " or ".join(map(str, near))
    return f"1 + a multiple of {TEMPORAL_FACTOR}, such as {numbers}"
