"""Settings of each role, as plain records; they are sections of a recipe too.

    ModelSettings      which networks
    VideoSettings      which clips
    OptimizerSettings  how a role's weights are updated
    ComputeSettings    how a role's network is computed
    LoraSettings       low-rank adapters in place of all weights
    GeneratorSettings, DiversitySettings, FakeScoreSettings, TeacherSettings
    DiscriminatorSettings
    ExportSettings     how the generator is written

Every record checks itself when it is made, so that a wrong number is met before a network is read.
"""

from dataclasses import dataclass, field
from typing import Literal

from sgmd_core.errors import ConfigError
from sgmd_core.schedule import MAX_STEPS, WHY_MAX_STEPS, RandomSteps
from sgmd_core.velocity import GuidanceNorm
from workers.attention import KERNELS, AttentionName


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The networks that all roles start from.

    Attributes:
        folder: Diffusers folder of a text-to-video model of a known family.
        text_length: Text positions that the denoiser sees; longer captions are cut.
        negative_prompt: What guidance leads away from.
        encoder_dtype: Type of the weights of text encoder and autoencoder, which are frozen: `bf16`
            or `fp32`. A UMT5-XXL takes 11 GB in bf16.
    """

    folder: str
    text_length: int = 512
    negative_prompt: str = ""
    encoder_dtype: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        """Checks the values."""
        _require(self.text_length >= 1, "model.text_length", self.text_length, "at least 1")
        _require(
            self.encoder_dtype in ("bf16", "fp32"),
            "model.encoder_dtype",
            self.encoder_dtype,
            "'bf16' or 'fp32'",
        )


@dataclass(frozen=True, slots=True)
class VideoSettings:
    """The clips that are made.

    Attributes:
        num_frames: Video frames a clip.
        height: Pixels.
        width: Pixels.
        fps: Frames a second.
    """

    num_frames: int
    height: int
    width: int
    fps: int

    def __post_init__(self) -> None:
        """Checks the values."""
        _require(self.num_frames >= 1, "video.num_frames", self.num_frames, "at least 1")
        _require(self.height >= 1, "video.height", self.height, "at least 1")
        _require(self.width >= 1, "video.width", self.width, "at least 1")
        _require(self.fps >= 1, "video.fps", self.fps, "at least 1")


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """AdamW with a clipped gradient, a linear warm-up and, on request, a decay of the rate.

    Attributes:
        lr: Learning rate after the warm-up.
        betas: Decay of the first and second moment. The first is 0 in score distillation: the two
            players chase each other, and momentum makes them overshoot.
        weight_decay: Decoupled decay, in units of the learning rate.
        eps: Added to the root of the second moment.
        max_grad_norm: Global L2 norm that gradients are clipped to.
        warmup_iterations: Updates over which the rate rises linearly; 0 starts at `lr`.
        decay: Course of the rate after the warm-up: `constant`, `linear` or `cosine`.
        decay_iterations: Updates, those of the warm-up included, after which the rate has fallen.
        final_lr_ratio: Rate from then on, over `lr`.
        log_block_norms: Log the gradient norm of every layer besides that of the whole.
        moments: Where AdamW keeps its moments: on the `device`, or on the `cpu`, from where an
            update takes them and where it puts them back. The numbers are the same.
        moment_bits: Bits of an entry of the second moments: 32, or 8, a quarter of the memory for
            steps that are off by a tenth at random, `workers.moment_codes`. 8 goes with a first
            decay of 0 and moments on the device.
    """

    lr: float
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    max_grad_norm: float = 10.0
    warmup_iterations: int = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_iterations: int = 0
    final_lr_ratio: float = 0.0
    log_block_norms: bool = False
    moments: Literal["device", "cpu"] = "device"
    moment_bits: Literal[8, 32] = 32

    def __post_init__(self) -> None:
        """Checks the values."""
        _require(self.lr > 0, "optimizer.lr", self.lr, "above 0")
        _require(
            all(0 <= beta < 1 for beta in self.betas),
            "optimizer.betas",
            self.betas,
            "two numbers in [0, 1)",
        )
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        _require(self.eps > 0, "optimizer.eps", self.eps, "above 0")
        _require(self.max_grad_norm > 0, "optimizer.max_grad_norm", self.max_grad_norm, "above 0")
        _require(
            self.warmup_iterations >= 0,
            "optimizer.warmup_iterations",
            self.warmup_iterations,
            "0 or more",
        )
        kinds = ("constant", "linear", "cosine")
        _require(self.decay in kinds, "optimizer.decay", self.decay, f"one of {kinds}")
        _require(
            self.decay == "constant" or self.decay_iterations > self.warmup_iterations,
            "optimizer.decay_iterations",
            self.decay_iterations,
            f"more than the {self.warmup_iterations} updates of the warm-up, for decay: "
            f"{self.decay}",
        )
        _require(
            self.decay != "constant" or self.decay_iterations == 0,
            "optimizer.decay_iterations",
            self.decay_iterations,
            "0 for decay: constant, which does not fall",
        )
        _require(
            0 <= self.final_lr_ratio <= 1, "optimizer.final_lr_ratio", self.final_lr_ratio, "[0, 1]"
        )
        _require_place("optimizer.moments", self.moments)
        _require(self.moment_bits in (8, 32), "optimizer.moment_bits", self.moment_bits, "8 or 32")
        _require(
            self.moment_bits == 32 or (self.betas[0] == 0 and self.moments == "device"),
            "optimizer.moment_bits",
            self.moment_bits,
            "32, or betas of [0, ...] and moments: device",
        )


@dataclass(frozen=True, slots=True)
class ComputeSettings:
    """Memory and speed of a network; see `workers.compute`.

    Attributes:
        precision: `fp32`, or `bf16` for matrix products in bfloat16 with float32 weights. Several
            ranks then gather weights in bfloat16, modulation and norms included.
        checkpointing: Keep no activations of the layers: a third more work, far less memory.
            `selective` keeps the outputs of self-attention, which need not be made again; `offload`
            keeps the layers' inputs in main memory.
        compile: Compile the layers with `torch.compile`; the first iteration takes minutes.
        weights: Type in which weights that are not trained are kept: the teacher's, and those
            under adapters. Weights that are trained are float32. `fp8`, for the teacher alone,
            keeps those of the layers' products in 8 bits and computes with them in bfloat16.
        attention: Kernel of attention, by diffusers' name: `native` (torch chooses), `flash`,
            `xformers`, `_native_flash`, `_native_efficient`, `_native_cudnn`, `_native_math`; for
            a teacher that nothing is learned through also `sage` and `_flash_3`, which have no
            gradients. See `workers.attention`.
        ulysses: Ranks in a row that work on each sample together: each has a part of its tokens,
            and inside self-attention a part of its heads. It divides the ranks, heads and tokens.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    checkpointing: bool | Literal["selective", "offload"] = False
    compile: bool = False
    weights: Literal["fp32", "bf16", "fp8"] = "fp32"
    attention: AttentionName = "native"
    ulysses: int = 1

    def __post_init__(self) -> None:
        """Checks the values."""
        _require(
            self.precision in ("fp32", "bf16"),
            "compute.precision",
            self.precision,
            "'fp32' or 'bf16'",
        )
        _require(
            self.checkpointing in (False, True, "selective", "offload"),
            "compute.checkpointing",
            self.checkpointing,
            "true, false, 'selective' or 'offload'",
        )
        _require(
            not (self.compile and self.checkpointing == "selective"),
            "compute.checkpointing",
            self.checkpointing,
            "true or 'offload' beside compute.compile=true, which hides attention from it",
        )
        kinds = ("fp32", "bf16", "fp8")
        _require(self.weights in kinds, "compute.weights", self.weights, f"one of {kinds}")
        _require(
            self.weights != "fp8"
            or (self.precision == "bf16" and not self.compile and not self.checkpointing),
            "compute.weights",
            self.weights,
            "'bf16' or 'fp32'; fp8 goes with precision: bf16 and neither compile nor checkpointing,"
            " which lose track of weights that change their type in a pass",
        )
        self._require_attention()
        self._require_ulysses()

    def _require_ulysses(self) -> None:
        number = self.ulysses
        _require(number >= 1, "compute.ulysses", number, "at least 1")
        alone = "1, which leaves every sample to one rank, beside compute."
        _require(not self.compile or number == 1, "compute.ulysses", number, f"{alone}compile=true")
        _require(
            self.checkpointing != "selective" or number == 1,
            "compute.ulysses",
            number,
            f"{alone}checkpointing: selective, whose kept outputs its backward pass makes again",
        )
        _require(
            self.weights != "fp8" or number == 1, "compute.ulysses", number, f"{alone}weights: fp8"
        )
        _require(
            KERNELS[self.attention].splits_heads or number == 1,
            "compute.ulysses",
            number,
            f"{alone}attention: {self.attention}; "
            + ", ".join(name for name, one in KERNELS.items() if one.splits_heads)
            + " can split it",
        )

    def _require_attention(self) -> None:
        names, name = tuple(KERNELS), self.attention
        _require(name in names, "compute.attention", name, f"one of {', '.join(names)}")
        kernel = KERNELS[name]
        _require(
            not kernel.in_bf16 or self.precision == "bf16",
            "compute.attention",
            name,
            "a kernel that takes float32, or compute.precision=bf16",
        )
        _require(
            kernel.recorded or self.checkpointing != "selective",
            "compute.attention",
            name,
            "one of torch's fused kernels beside compute.checkpointing: selective, which keeps "
            "their outputs",
        )


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adapters: a role trains A and B of `W + alpha / rank * B A`, and W stays as it is.

    Attributes:
        rank: Rows of A and columns of B.
        alpha: Scale of the change, over `rank`.
        targets: Projections of the layers that get adapters, by the end of their names, such as
            `to_q` or `attn1.to_q`; none: all of attention and feed-forward.
    """

    rank: int = 64
    alpha: float = 64.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the values."""
        _require(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        _require(self.alpha > 0, "lora.alpha", self.alpha, "above 0")
        _require(
            all(self.targets) and len(set(self.targets)) == len(self.targets),
            "lora.targets",
            self.targets,
            "names of projections, each once",
        )

    @property
    def scale(self) -> float:
        """Factor of the product `B A`."""
        return self.alpha / self.rank


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
        _require(self.weight >= 0, "generator.diversity.weight", self.weight, "0 or more")
        _require_steps("generator.diversity.teacher_steps", self.teacher_steps)
        _require(
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
        _require(0 <= self.ema_decay < 1, "generator.ema_decay", self.ema_decay, "in [0, 1)")
        _require(self.ema_start >= 0, "generator.ema_start", self.ema_start, "0 or more")
        _require_place("generator.ema_device", self.ema_device)
        _require(
            self.num_steps >= 2 or not self.diversity.enabled,
            "generator.num_steps",
            self.num_steps,
            "at least 2, because generator.diversity keeps the first one for itself",
        )
        _require(
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
    """

    tracking: Literal["shared", "fresh"] = "shared"
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(lr=4e-7))
    ida_decay: float = 1.0
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    lora: LoraSettings | None = None
    start: Literal["teacher", "generator"] = "teacher"

    def __post_init__(self) -> None:
        """Checks the values."""
        _require(
            self.tracking in ("shared", "fresh"),
            "fake_score.tracking",
            self.tracking,
            "'shared' or 'fresh'",
        )
        _require(
            self.start in ("teacher", "generator"),
            "fake_score.start",
            self.start,
            "'teacher' or 'generator'",
        )
        _require(0 < self.ida_decay <= 1, "fake_score.ida_decay", self.ida_decay, "in (0, 1]")
        _require_trained_in_fp32("fake_score", self.compute, self.lora)


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
        _require(self.dtype in dtypes, "export.dtype", self.dtype, f"one of {dtypes}")
        _require(
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
        _require(self.cfg_norm in norms, "teacher.cfg_norm", self.cfg_norm, f"one of {norms}")
        _require(
            self.guidance_scale >= 1,
            "teacher.guidance_scale",
            self.guidance_scale,
            "at least 1 (1 is no guidance)",
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
        _require(
            all(layer >= 1 for layer in self.layers)
            and list(self.layers) == sorted({*self.layers}),
            "discriminator.layers",
            self.layers,
            "numbers of layers from 1 on, rising",
        )
        _require(
            self.width >= 8 and self.width % (8 if self.width <= 256 else 32) == 0,
            "discriminator.width",
            self.width,
            "a multiple of 8, and of 32 above 256: group norms share them",
        )
        _require(
            0 <= self.num_strides <= 8, "discriminator.num_strides", self.num_strides, "0 to 8"
        )
        _require(
            not self.compute.compile,
            "discriminator.compute.compile",
            self.compute.compile,
            "false: features are taken between layers",
        )
        _require(
            self.compute.weights != "fp8",
            "discriminator.compute.weights",
            self.compute.weights,
            "'bf16' or 'fp32'",
        )
        _require_differentiable("discriminator", self.compute)
        _require(
            self.compute.ulysses == 1,
            "discriminator.compute.ulysses",
            self.compute.ulysses,
            "1: its heads look at all tokens of a sample",
        )

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """The layers that have heads, of a teacher of so many."""
        return self.layers or tuple(range(3, num_layers + 1, 3)) or (num_layers,)


def _require_place(name: str, found: str) -> None:
    _require(found in ("device", "cpu"), name, found, "'device' or 'cpu'")


def _require_trained_in_fp32(
    role: str, compute: ComputeSettings, lora: LoraSettings | None
) -> None:
    _require(
        lora is not None or compute.weights == "fp32",
        f"{role}.compute.weights",
        compute.weights,
        f"'fp32', because {role}.lora is null and all weights are trained",
    )
    _require(
        compute.weights != "fp8",
        f"{role}.compute.weights",
        compute.weights,
        "'bf16' or 'fp32' under adapters",
    )
    _require_differentiable(role, compute)


def _require_differentiable(role: str, compute: ComputeSettings) -> None:
    _require(
        KERNELS[compute.attention].differentiable,
        f"{role}.compute.attention",
        compute.attention,
        "a kernel that has gradients, which are taken through this role",
    )


def _require_steps(name: str, found: int) -> None:
    expected = "at least 1" if found < 1 else f"at most {MAX_STEPS}: {WHY_MAX_STEPS}"
    _require(1 <= found <= MAX_STEPS, name, found, expected)


def _require(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise ConfigError(
            "checking the settings", f"{name} is {found!r}", expected, f"Correct {name}"
        )
