"""Activation checkpointing of a layer: what its forward pass keeps for the backward pass.

    true        the layer's inputs
    selective   the same, and the outputs of self-attention, which are not computed again
    offload     the layer's stream of tokens, in main memory; its other inputs on the device

Each is a function that computes a layer, as diffusers takes it. All repeat every bit, and a graph
may be walked more than once: the fake score's serves a gradient at its input and another one at its
parameters. torch's own selective checkpointing frees what it kept on the first backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sgmd_core.errors import ConfigError
from workers.joint_walk import cut_layer, on_host

LayerFunction = Callable[..., Any]
"""Computes a layer: the module, then its inputs, the stream of tokens first."""

_ATEN = torch.ops.aten
_ATTENTION = frozenset(
    getattr(_ATEN, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)
"""Fused attention of torch; without a fused kernel there is no output of attention to be kept."""


def layer_function(checkpointing: bool | str) -> LayerFunction:
    """The function that computes a layer, by a `compute.checkpointing` other than False."""
    return {True: _again, "selective": _selective, "offload": _offload}[checkpointing]


def _again(layer: nn.Module, *inputs: Any) -> Any:  # noqa: ANN401  (a layer's own arguments)
    cut = cut_layer(layer, *inputs)
    return cut if cut is not None else checkpoint(layer.__call__, *inputs, use_reentrant=False)


def _selective(layer: nn.Module, *inputs: Any) -> Any:  # noqa: ANN401
    kept = _KeptOutputs()
    modes = (_Keeping(kept), _Replaying(kept))
    output = cut_layer(layer, *inputs, contexts=modes)
    if output is None:
        output = checkpoint(layer.__call__, *inputs, use_reentrant=False, context_fn=lambda: modes)
    if torch.is_grad_enabled() and not kept:
        raise ConfigError(
            "keeping the outputs of attention",
            f"no fused attention in {type(layer).__name__} on {inputs[0].device.type}",
            "one of torch's fused kernels of scaled_dot_product_attention",
            "Set compute.checkpointing=true",
        )
    return output


def _offload(layer: nn.Module, *inputs: Any) -> Any:  # noqa: ANN401
    cut = cut_layer(layer, *inputs, offload=True)
    if cut is not None:
        return cut
    stream = inputs[0]

    def to_host(value: Tensor) -> tuple[torch.device, Tensor]:
        # Captions and noise levels are small, and the same tensors for all layers.
        own = value.data_ptr() == stream.data_ptr()
        return value.device, on_host(value) if own else value

    def to_device(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, value = packed
        return value.to(device, non_blocking=True)

    # Inside the layer checkpointing's own hooks are in force: these see the layer's inputs.
    with torch.autograd.graph.saved_tensors_hooks(to_host, to_device):
        return _again(layer, *inputs)


class _KeptOutputs(list[Any]):
    """Outputs of self-attention of one pass through a layer, in order."""


class _Keeping(TorchDispatchMode):
    """Keeps the outputs of self-attention of a forward pass."""

    def __init__(self, kept: _KeptOutputs) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        output = func(*args, **(kwargs or {}))
        if _is_self_attention(func, args):
            self._kept.append(_detached(output))
        return output


class _Replaying(TorchDispatchMode):
    """Returns the outputs that were kept, in each walk from the first one on."""

    def __init__(self, kept: _KeptOutputs) -> None:
        super().__init__()
        self._kept = kept
        self._next = 0

    def __enter__(self) -> "_Replaying":
        self._next = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        if not _is_self_attention(func, args):
            return func(*args, **(kwargs or {}))
        self._next += 1
        return _detached(self._kept[self._next - 1])


def _is_self_attention(func: Any, args: tuple[Any, ...]) -> bool:  # noqa: ANN401
    """Attention of the tokens to each other; that to a caption is cheap to make again."""
    return func in _ATTENTION and args[0].shape == args[1].shape


def _detached(output: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.detach() if isinstance(one, Tensor) else one for one in output)
