"""Kernels of attention that a network can be computed with, by diffusers' names for them.

    native               torch chooses; the only one that every family has
    _native_...          torch, this kernel and no other
    flash, xformers      libraries with gradients
    _flash_3, sage       libraries without gradients: for passes that nothing is learned through

Not among them are kernels that diffusers downloads as code while it runs, and those that need masks
or devices which no role here has.
"""

import importlib.util
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from sgmd_core.errors import ConfigError

AttentionName = Literal[
    "native",
    "flash",
    "_flash_3",
    "sage",
    "xformers",
    "_native_flash",
    "_native_efficient",
    "_native_cudnn",
    "_native_math",
]

NATIVE: AttentionName = "native"


@dataclass(frozen=True, slots=True)
class AttentionKernel:
    """Conditions of a kernel.

    Attributes:
        module: Module that has to be importable; empty for torch's own.
        on_cpu: Runs on a CPU, too.
        in_bf16: Takes 16-bit inputs alone.
        differentiable: Has a backward pass.
        forward_mode: Has derivatives in forward mode.
        recorded: `compute.checkpointing: selective` sees its outputs.
        all_pairs: Holds a matrix of all pairs of tokens.
        splits_heads: Goes with `compute.ulysses`, forward and backward.
    """

    module: str = ""
    on_cpu: bool = False
    in_bf16: bool = False
    differentiable: bool = True
    forward_mode: bool = False
    recorded: bool = False
    all_pairs: bool = False
    splits_heads: bool = False


KERNELS = MappingProxyType[AttentionName, AttentionKernel](
    {
        NATIVE: AttentionKernel(on_cpu=True, forward_mode=True, recorded=True, splits_heads=True),
        "flash": AttentionKernel("flash_attn", in_bf16=True, splits_heads=True),
        "_flash_3": AttentionKernel("flash_attn_interface", in_bf16=True, differentiable=False),
        "sage": AttentionKernel("sageattention", in_bf16=True, differentiable=False),
        "xformers": AttentionKernel("xformers"),
        "_native_flash": AttentionKernel(on_cpu=True, recorded=True),
        "_native_efficient": AttentionKernel(recorded=True),
        "_native_cudnn": AttentionKernel(in_bf16=True, recorded=True, splits_heads=True),
        "_native_math": AttentionKernel(on_cpu=True, forward_mode=True, all_pairs=True),
    }
)


def require_kernel(attention: AttentionName, device: str) -> None:
    """Checks that a kernel can run in this process.

    Args:
        attention: The kernel.
        device: Type of the device that the network is on.

    Raises:
        ConfigError: Its library is not installed here, or it does not run on such a device.
    """
    kernel = KERNELS[attention]
    others = ", ".join(
        other
        for other, one in KERNELS.items()
        if (one.on_cpu or device != "cpu") and _is_importable(one)
    )
    if not kernel.on_cpu and device == "cpu":
        found = "the role is computed on a CPU"
    elif not _is_importable(kernel):
        found = f"the module {kernel.module} is not installed here"
    else:
        return
    raise ConfigError(
        f"computing attention by {attention}",
        found,
        f"a kernel that runs here: {others}",
        f"Set compute.attention={NATIVE}"
        + (f", or install {kernel.module} on every machine of the role" if kernel.module else ""),
    )


def _is_importable(kernel: AttentionKernel) -> bool:
    return not kernel.module or importlib.util.find_spec(kernel.module) is not None
