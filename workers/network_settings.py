"""Settings of any network that is trained or asked: records that check themselves when made.

OptimizerSettings  how its weights are updated
ComputeSettings    how it is computed
LoraSettings       low-rank adapters in place of all weights
"""

from dataclasses import dataclass
from typing import Literal, get_args

from sgmd_core.errors import ConfigError
from workers.attention import KERNELS, AttentionName
from workers.rate_courses import CONSTANT, Course


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
    decay: Course = CONSTANT
    decay_iterations: int = 0
    final_lr_ratio: float = 0.0
    log_block_norms: bool = False
    moments: Literal["device", "cpu"] = "device"
    moment_bits: Literal[8, 32] = 32

    def __post_init__(self) -> None:
        """Checks the values."""
        require_setting(self.lr > 0, "optimizer.lr", self.lr, "above 0")
        require_setting(
            all(0 <= beta < 1 for beta in self.betas),
            "optimizer.betas",
            self.betas,
            "two numbers in [0, 1)",
        )
        require_setting(
            self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more"
        )
        require_setting(self.eps > 0, "optimizer.eps", self.eps, "above 0")
        require_setting(
            self.max_grad_norm > 0, "optimizer.max_grad_norm", self.max_grad_norm, "above 0"
        )
        require_setting(
            self.warmup_iterations >= 0,
            "optimizer.warmup_iterations",
            self.warmup_iterations,
            "0 or more",
        )
        self._require_decay()
        require_place("optimizer.moments", self.moments)
        require_setting(
            self.moment_bits in (8, 32), "optimizer.moment_bits", self.moment_bits, "8 or 32"
        )
        require_setting(
            self.moment_bits == 32 or (self.betas[0] == 0 and self.moments == "device"),
            "optimizer.moment_bits",
            self.moment_bits,
            "32, or betas of [0, ...] and moments: device",
        )

    def _require_decay(self) -> None:
        kinds = get_args(Course)
        require_setting(self.decay in kinds, "optimizer.decay", self.decay, f"one of {kinds}")
        require_setting(
            self.decay == CONSTANT or self.decay_iterations > self.warmup_iterations,
            "optimizer.decay_iterations",
            self.decay_iterations,
            f"more than the {self.warmup_iterations} updates of the warm-up, for decay: "
            f"{self.decay}",
        )
        require_setting(
            self.decay != CONSTANT or self.decay_iterations == 0,
            "optimizer.decay_iterations",
            self.decay_iterations,
            "0 for decay: constant, which does not fall",
        )
        require_setting(
            0 <= self.final_lr_ratio <= 1, "optimizer.final_lr_ratio", self.final_lr_ratio, "[0, 1]"
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
        require_setting(
            self.precision in ("fp32", "bf16"),
            "compute.precision",
            self.precision,
            "'fp32' or 'bf16'",
        )
        require_setting(
            self.checkpointing in (False, True, "selective", "offload"),
            "compute.checkpointing",
            self.checkpointing,
            "true, false, 'selective' or 'offload'",
        )
        require_setting(
            not (self.compile and self.checkpointing == "selective"),
            "compute.checkpointing",
            self.checkpointing,
            "true or 'offload' beside compute.compile=true, which hides attention from it",
        )
        kinds = ("fp32", "bf16", "fp8")
        require_setting(self.weights in kinds, "compute.weights", self.weights, f"one of {kinds}")
        require_setting(
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
        require_setting(number >= 1, "compute.ulysses", number, "at least 1")
        alone = "1, which leaves every sample to one rank, beside compute."
        require_setting(
            not self.compile or number == 1, "compute.ulysses", number, f"{alone}compile=true"
        )
        require_setting(
            self.checkpointing != "selective" or number == 1,
            "compute.ulysses",
            number,
            f"{alone}checkpointing: selective, whose kept outputs its backward pass makes again",
        )
        require_setting(
            self.weights != "fp8" or number == 1, "compute.ulysses", number, f"{alone}weights: fp8"
        )
        require_setting(
            KERNELS[self.attention].splits_heads or number == 1,
            "compute.ulysses",
            number,
            f"{alone}attention: {self.attention}; "
            + ", ".join(name for name, one in KERNELS.items() if one.splits_heads)
            + " can split it",
        )

    def _require_attention(self) -> None:
        names, name = tuple(KERNELS), self.attention
        require_setting(name in names, "compute.attention", name, f"one of {', '.join(names)}")
        kernel = KERNELS[name]
        require_setting(
            not kernel.in_bf16 or self.precision == "bf16",
            "compute.attention",
            name,
            "a kernel that takes float32, or compute.precision=bf16",
        )
        require_setting(
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
        require_setting(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        require_setting(self.alpha > 0, "lora.alpha", self.alpha, "above 0")
        require_setting(
            all(self.targets) and len(set(self.targets)) == len(self.targets),
            "lora.targets",
            self.targets,
            "names of projections, each once",
        )

    @property
    def scale(self) -> float:
        """Factor of the product `B A`."""
        return self.alpha / self.rank


def require_setting(holds: bool, name: str, found: object, expected: str) -> None:
    """Checks one setting.

    Args:
        holds: Whether its value is allowed.
        name: Its dotted name.
        found: Its value.
        expected: Values that are allowed.

    Raises:
        ConfigError: It is not.
    """
    if not holds:
        raise ConfigError(
            "checking the settings", f"{name} is {found!r}", expected, f"Correct {name}"
        )


def require_place(name: str, found: str) -> None:
    """Checks a setting that says where tensors are kept.

    Raises:
        ConfigError: It is neither `device` nor `cpu`.
    """
    require_setting(found in ("device", "cpu"), name, found, "'device' or 'cpu'")
