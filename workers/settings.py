"""Settings of each role, as plain records; they are sections of a recipe too.

    ModelSettings      which networks
    GeneratorSettings, DiversitySettings, FakeScoreSettings, TeacherSettings
    DiscriminatorSettings
    ExportSettings     how the generator is written

Which clips are made: `workers.clip_settings`. How networks are updated and computed:
`workers.network_settings`.

Every record checks itself when it is made, so that a wrong number is met before a network is read.
"""

from dataclasses import dataclass, field
from typing import Literal

from sgmd_core.objectives.shuffled import Gap
from sgmd_core.phases import Expert
from sgmd_core.schedule import MAX_STEPS, WHY_MAX_STEPS, RandomSteps
from sgmd_core.velocity import GuidanceNorm
from workers.attention import KERNELS
from workers.network_settings import (
    ComputeSettings,
    LoraSettings,
    OptimizerSettings,
    require_place,
    require_setting,
)


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The networks that all roles start from.

    Attributes:
        folder: Diffusers folder of a text-to-video model of a known family.
        text_length: Text positions that the denoiser sees; longer captions are cut.
        negative_prompt: What guidance leads away from.
        encoder_dtype: Type of the weights of text encoder and autoencoder, which are frozen: `bf16`
            or `fp32`. A UMT5-XXL takes 11 GB in bf16.
        expert: Of a model with two experts, which of them the roles have: `both`, or `high` or
            `low` alone, with its noise levels. The export has the other one as it was.
        boundary: Noise level that the experts change at, that of Wan2.2-T2V-A14B. It is read where
            one expert is trained alone, and has to be the model's own.
    """

    folder: str
    text_length: int = 512
    negative_prompt: str = ""
    encoder_dtype: Literal["bf16", "fp32"] = "bf16"
    # Not in its text, under which clips are kept: a teacher's are made by both experts.
    expert: Literal["both", "high", "low"] = field(default="both", repr=False)
    boundary: float = field(default=0.875, repr=False)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_setting(self.text_length >= 1, "model.text_length", self.text_length, "at least 1")
        require_setting(
            self.encoder_dtype in ("bf16", "fp32"),
            "model.encoder_dtype",
            self.encoder_dtype,
            "'bf16' or 'fp32'",
        )
        require_setting(
            self.expert in ("both", "high", "low"),
            "model.expert",
            self.expert,
            "'both', 'high' or 'low'",
        )
        require_setting(
            0 < self.boundary < 1, "model.boundary", self.boundary, "above 0 and below 1"
        )

    @property
    def alone(self) -> Expert | None:
        """The expert that the roles have alone; None: all of the model."""
        return None if self.expert == "both" else self.expert


@dataclass(frozen=True, slots=True)
class DiversitySettings:
    """An extra loss that ties the generator's first step to the teacher's path; see its file.

    Attributes:
        weight: Weight of the loss; 0 leaves it out. The released 1.3B training has 0.05.
        teacher_steps: Steps of the teacher's whole path.
        anchor_step: Steps of it that are taken.
    """

    weight: float = 0.0
    teacher_steps: int = 30
    anchor_step: int = 5

    def __post_init__(self) -> None:
        """Checks the values."""
        require_setting(self.weight >= 0, "generator.diversity.weight", self.weight, "0 or more")
        _require_steps("generator.diversity.teacher_steps", self.teacher_steps)
        require_setting(
            1 <= self.anchor_step <= self.teacher_steps,
            "generator.diversity.anchor_step",
            self.anchor_step,
            f"from 1 to teacher_steps, which is {self.teacher_steps}",
        )

    @property
    def enabled(self) -> bool:
        """True if the loss is on."""
        return self.weight > 0

    @property
    def num_anchor_steps(self) -> int:
        """Steps of the teacher that are taken for a micro-batch; 0 where the loss is off."""
        return self.anchor_step if self.enabled else 0

    @property
    def first_exit(self) -> int:
        """First step at which a rollout may exit: the loss alone trains the very first."""
        return int(self.enabled)


@dataclass(frozen=True, slots=True)
class GeneratorSettings:
    """The network that learns to sample in a few steps.

    Attributes:
        num_steps: Steps it samples in.
        ema_decay: Decay of the averaged weights that are validated and exported; 0 keeps none.
        ema_start: Updates before the averaging begins; until then the average is the weights.
        ema_device: Where the average is kept and made: on the network's `device`, or on the `cpu`.
        diversity: An extra loss on the first step.
        optimizer: How it is updated; the rate of the released 14B training unless set.
        compute: How it is computed.
        lora: Adapters to train in place of all weights; null trains all.
        random_steps: Rollouts of training take a random number of steps over random noise levels;
            null: `num_steps` on the grid that the generator is sampled on.
    """

    num_steps: int = 4
    ema_decay: float = 0.99
    ema_start: int = 0
    ema_device: Literal["device", "cpu"] = "device"
    diversity: DiversitySettings = field(default_factory=DiversitySettings)
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=2e-6))
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    lora: LoraSettings | None = None
    random_steps: RandomSteps | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        _require_steps("generator.num_steps", self.num_steps)
        require_setting(0 <= self.ema_decay < 1, "generator.ema_decay", self.ema_decay, "in [0, 1)")
        require_setting(self.ema_start >= 0, "generator.ema_start", self.ema_start, "0 or more")
        require_place("generator.ema_device", self.ema_device)
        require_setting(
            self.num_steps >= 2 or not self.diversity.enabled,
            "generator.num_steps",
            self.num_steps,
            "at least 2, because generator.diversity keeps the first one for itself",
        )
        require_setting(
            self.random_steps is None
            or self.random_steps.min_steps >= 2
            or not self.diversity.enabled,
            "generator.random_steps.min_steps",
            self.random_steps and self.random_steps.min_steps,
            "at least 2, because generator.diversity keeps the first step for itself",
        )
        _require_trained_in_fp32("generator", self.compute, self.lora)

    @property
    def mean_steps(self) -> float:
        """Mean number of steps of the grids that training rolls out on."""
        return self.num_steps if self.random_steps is None else self.random_steps.mean_steps


@dataclass(frozen=True, slots=True)
class FakeScoreSettings:
    """The network that learns the score of what the generator makes.

    Attributes:
        tracking: `shared` learns from the rollout and the forward pass that also teach the
            generator (one graph, the paper's Algorithm 1); `fresh` from new samples of the
            generator after its update (the authors' released trainer). Objectives with several
            fake-score updates an iteration need `fresh`.
        start: Model that it starts from, where they differ: the `teacher`'s, or the `generator`'s.
        optimizer: How it is updated; the rate of the released 14B training unless set.
        ida_decay: Share of its own weights that the fake score keeps when, after each update of the
            generator, it is mixed with the generator's; 1 does not mix. DMD recipes have 0.97.
        compute: How it is computed.
        lora: Adapters to train in place of all weights; null trains all.
        gap: The gap between the scores that a sample teaches the generator: its `own`, or
            `shuffled`, that of its neighbour in the batch, which is the control of a study.
        walk: Backward passes through the shared forward pass: `apart`, one for the generator's
            signal and one for tracking, or `joint`, one for both, in which checkpointed layers are
            recomputed once, and gathered once less where ranks share them; the signal is then sent
            after tracking.
    """

    tracking: Literal["shared", "fresh"] = "shared"
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=4e-7))
    ida_decay: float = 1.0
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    lora: LoraSettings | None = None
    start: Literal["teacher", "generator"] = "teacher"
    gap: Gap = "own"
    walk: Literal["apart", "joint"] = "apart"

    def __post_init__(self) -> None:
        """Checks the values."""
        require_setting(
            self.gap in ("own", "shuffled"), "fake_score.gap", self.gap, "'own' or 'shuffled'"
        )
        require_setting(
            self.tracking in ("shared", "fresh"),
            "fake_score.tracking",
            self.tracking,
            "'shared' or 'fresh'",
        )
        require_setting(
            self.start in ("teacher", "generator"),
            "fake_score.start",
            self.start,
            "'teacher' or 'generator'",
        )
        require_setting(
            0 < self.ida_decay <= 1, "fake_score.ida_decay", self.ida_decay, "in (0, 1]"
        )
        require_setting(
            self.walk in ("apart", "joint"), "fake_score.walk", self.walk, "'apart' or 'joint'"
        )
        if self.walk == "joint":
            self._require_joint()
        _require_trained_in_fp32("fake_score", self.compute, self.lora)

    def _require_joint(self) -> None:
        compute, alone = self.compute, "which one walk for both gradients (fake_score.walk) needs"
        for name, found, fits, wanted in (
            ("tracking", self.tracking, self.tracking == "shared", "'shared'"),
            (
                "compute.checkpointing",
                compute.checkpointing,
                bool(compute.checkpointing),
                "true, 'selective' or 'offload'",
            ),
            ("compute.compile", compute.compile, not compute.compile, "false"),
        ):
            expected = f"{wanted}, {alone}; or fake_score.walk=apart"
            require_setting(fits, f"fake_score.{name}", found, expected)


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """Form of the model folders that a run writes: `generator/` and `best/`.

    Attributes:
        dtype: Type of the denoiser's weights: `bf16`, `fp16` or `fp32`. What diffusers computes in
            float32 (norms, modulation, time embedding) stays float32.
        components: Autoencoder and text encoder: `link` takes the base folder's own files (hard
            links, or symbolic ones to another disk), `copy` copies them.
    """

    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    components: Literal["link", "copy"] = "link"

    def __post_init__(self) -> None:
        """Checks the values."""
        dtypes = ("bf16", "fp16", "fp32")
        require_setting(self.dtype in dtypes, "export.dtype", self.dtype, f"one of {dtypes}")
        require_setting(
            self.components in ("link", "copy"),
            "export.components",
            self.components,
            "'link' or 'copy'",
        )


@dataclass(frozen=True, slots=True)
class TeacherSettings:
    """The frozen network that is distilled.

    Attributes:
        model: Model folder of another size than the generator's, with the same latents and text;
            null: `model.folder`.
        guidance_scale: s in `uncond + s * (cond - uncond)`; 1 is the conditional prediction alone.
        batched_guidance: Compute both predictions as one batch; false: one after the other, which
            needs half the memory for activations.
        sharded: Spread the weights over the ranks of a copy; false: every rank holds all of them
            and gathers nothing.
        compute: How it is computed.
        cfg_norm: Ties the length of the guided velocity to the conditional one's: `layer_norm`
            along the last axis, `scalar` as a whole and from above; `none` leaves it.
    """

    model: str | None = None
    guidance_scale: float = 3.0
    batched_guidance: bool = True
    sharded: bool = True
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    cfg_norm: GuidanceNorm = "none"

    def __post_init__(self) -> None:
        """Checks the values."""
        norms = ("none", "layer_norm", "scalar")
        require_setting(
            self.cfg_norm in norms, "teacher.cfg_norm", self.cfg_norm, f"one of {norms}"
        )
        require_setting(
            self.guidance_scale >= 1,
            "teacher.guidance_scale",
            self.guidance_scale,
            "at least 1 (1 means no guidance)",
        )


@dataclass(frozen=True, slots=True)
class DiscriminatorSettings:
    """Heads on features of a frozen copy of the teacher, for methods that have a discriminator.

    Attributes:
        layers: Layers of the teacher whose outputs have a head each, counted from 1; none: every
            third one, or the last where there are fewer.
        width: Channels of the heads' convolutions: a multiple of 8, and of 32 above 256.
        num_strides: Convolutions of a head that halve rows and columns. The published heads have 3,
            for maps of at least 8x8.
        optimizer: How the heads are updated.
        compute: How the copy of the teacher is computed; the heads are in float32.
    """

    layers: tuple[int, ...] = ()
    width: int = 256
    num_strides: int = 3
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=1e-5))
    compute: ComputeSettings = field(default_factory=ComputeSettings)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_setting(
            all(layer >= 1 for layer in self.layers)
            and list(self.layers) == sorted({*self.layers}),
            "discriminator.layers",
            self.layers,
            "numbers of layers from 1 on, rising",
        )
        require_setting(
            self.width >= 8 and self.width % (8 if self.width <= 256 else 32) == 0,
            "discriminator.width",
            self.width,
            "a multiple of 8, and of 32 above 256: group norms share them",
        )
        require_setting(
            0 <= self.num_strides <= 8, "discriminator.num_strides", self.num_strides, "0 to 8"
        )
        require_setting(
            not self.compute.compile,
            "discriminator.compute.compile",
            self.compute.compile,
            "false: features are taken between layers",
        )
        require_setting(
            self.compute.weights != "fp8",
            "discriminator.compute.weights",
            self.compute.weights,
            "'bf16' or 'fp32'",
        )
        _require_differentiable("discriminator", self.compute)
        require_setting(
            self.compute.ulysses == 1,
            "discriminator.compute.ulysses",
            self.compute.ulysses,
            "1: its heads look at all tokens of a sample",
        )

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """The layers that have heads, of a teacher of so many."""
        return self.layers or tuple(range(3, num_layers + 1, 3)) or (num_layers,)


def _require_trained_in_fp32(
    role: str, compute: ComputeSettings, lora: LoraSettings | None
) -> None:
    require_setting(
        lora is not None or compute.weights == "fp32",
        f"{role}.compute.weights",
        compute.weights,
        f"'fp32', because {role}.lora is null and all weights are trained",
    )
    require_setting(
        compute.weights != "fp8",
        f"{role}.compute.weights",
        compute.weights,
        "'bf16' or 'fp32' under adapters",
    )
    _require_differentiable(role, compute)


def _require_differentiable(role: str, compute: ComputeSettings) -> None:
    require_setting(
        KERNELS[compute.attention].differentiable,
        f"{role}.compute.attention",
        compute.attention,
        "a kernel that has gradients, which are taken through this role",
    )


def _require_steps(name: str, found: int) -> None:
    expected = "at least 1" if found < 1 else f"at most {MAX_STEPS}: {WHY_MAX_STEPS}"
    require_setting(1 <= found <= MAX_STEPS, name, found, expected)
