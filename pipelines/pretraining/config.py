"""Settings of `pretrain`, read from one recipe file."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from pipelines.config.recipe_files import absolute_path
from sgmd_core.schedule import MAX_STEPS


class Settings(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class WorldSettings(Settings):
    """Clips: their folder and their size.

    `train` and `held_out` are folders of Parquet shards, local or `s3://`: of captioned videos, or
    `train` of what `sgmd encode` has made of them.
    """

    train: str
    held_out: str
    num_frames: PositiveInt = 13
    frame_px: PositiveInt = 32
    fps: PositiveInt = 8
    max_clips: PositiveInt | None = None


class VaeSettings(Settings):
    """The video autoencoder and its training.

    With `folder`, a model folder, its autoencoder is taken and none is trained. Encoded clips need
    it: they hold no videos to train one on.
    """

    folder: str | None = None
    base_dim: PositiveInt = 16
    latent_channels: PositiveInt = 16
    patch_size: PositiveInt = 2
    dim_mult: tuple[PositiveInt, ...] = (1, 2, 2)
    residual_resampling: bool = True
    num_res_blocks: PositiveInt = 1
    num_steps: PositiveInt = 2500
    batch_size: PositiveInt = 8
    learning_rate: PositiveFloat = 2e-3
    warmup_steps: PositiveInt = 50
    kl_weight: float = Field(default=1e-5, ge=0)
    short_clip_frames: PositiveInt = 5
    short_clip_share: float = Field(default=0.75, ge=0, le=1)


class TextSettings(Settings):
    """The caption encoder, trained jointly with the denoiser.

    `max_length` is the text length of training and of our own sampling; in one of
    `long_every_steps` steps captions are padded to `long_length`, the default of diffusers'
    pipeline, whose padding takes part in cross-attention.
    """

    hidden_dim: PositiveInt = 64
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4
    ffn_dim: PositiveInt = 128
    max_length: PositiveInt = 16
    long_length: PositiveInt = 512
    long_every_steps: PositiveInt = 16


class DenoiserSettings(Settings):
    """The denoiser, its training, and when its learning rate may fall.

    The rate is held until the direction score of guided samples has reached `hold_until_score`
    (looked at every `watch_every_steps`), at most for `max_hold_steps`; then it falls to zero
    over `decay_steps`. Directions are learnt late and suddenly, and only at a high rate.
    """

    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 4
    head_dim: PositiveInt = 32
    ffn_dim: PositiveInt = 384
    freq_dim: PositiveInt = 64
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 1, 1)
    batch_size: PositiveInt = 24
    learning_rate: PositiveFloat = 1.5e-3
    warmup_steps: PositiveInt = 200
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    ema_decay: float = Field(default=0.998, ge=0, lt=1)
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    sigma_shift: PositiveFloat = 3.0
    hold_until_score: float = Field(default=0.9, ge=0, le=1)
    max_hold_steps: PositiveInt = 9000
    decay_steps: PositiveInt = 2500
    watch_every_steps: PositiveInt = 500
    watch_clips: PositiveInt = 64
    watch_sampling_steps: int = Field(default=12, ge=1, le=MAX_STEPS)


class SamplingSettings(Settings):
    """Sampling of clips to watch and measure the teacher."""

    num_steps: int = Field(default=30, ge=1, le=MAX_STEPS)
    guidance_scale: float = Field(default=2.0, ge=1)
    flow_shift: PositiveFloat = 3.0
    num_clips: PositiveInt = 256
    batch_size: PositiveInt = 64


class RayTrainSettings(Settings):
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


class PretrainConfig(Settings):
    """A whole `pretrain` recipe.

    Attributes:
        name: Name of the run.
        run_dir: Folder of the run: checkpoints, stages, figures.
        output: The diffusers folder that the run makes.
        seed: Seed of every draw.
        partial_output: Where unfinished teachers are exported at every checkpoint, if anywhere.
    """

    name: str
    run_dir: str
    output: str
    seed: int = 0
    partial_output: str | None = None
    world: WorldSettings
    vae: VaeSettings = VaeSettings()
    text: TextSettings = TextSettings()
    denoiser: DenoiserSettings = DenoiserSettings()
    sampling: SamplingSettings = SamplingSettings()
    ray: RayTrainSettings = RayTrainSettings()

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
