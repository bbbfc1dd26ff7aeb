"""One backward pass for two gradients, in which checkpointed layers are recomputed once.

    forward    x0 -> stem -> layer -> ... -> layer -> head -> velocity, cut before and after layers
    backward   head, layers from the last to the first, stem; at each of them

                   to the input    pulls the generator's cotangent back to the piece's input
                   to the weights  pulls tracking's back to its input, and gathers in parameters

A layer runs without a graph in the forward pass and is recomputed with one in the backward pass,
for both cotangents. The generator's is only ever asked for at an input, so nothing of it reaches a
parameter. What all layers share (embeddings of captions and of noise levels) accumulates tracking's
gradients from layer to layer in the order in which autograd would, so the sums have the bits of two
backward passes through one graph.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sgmd_core.errors import ConfigError
from sgmd_core.types import Latents, NoisedBatch, Scalar
from workers.gathered_walk import GatheredWalk

_REMEDY = "Set fake_score.walk=apart"


def on_host(value: Tensor) -> Tensor:
    """A tensor in main memory, on its way there from a GPU; itself if it is there."""
    if value.device.type == "cpu":
        return value
    kept = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return kept.copy_(value, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A layer of a forward pass, between two cuts.

    Attributes:
        layer: The layer.
        stream: Its stream of tokens, in main memory where that is asked for.
        device: Of the stream that it ran on.
        others: Its other inputs.
        autocast: Arguments of `torch.autocast` under which it ran.
        again: Entered where it is made again.
    """

    layer: nn.Module
    stream: Tensor
    device: torch.device
    others: tuple[Any, ...]
    autocast: dict[str, Any]
    again: AbstractContextManager[Any]


@dataclass(slots=True)
class _Cut:
    """A forward pass that is being cut.

    Attributes:
        pieces: Its layers so far.
        stem: Input of the first one, with its graph.
        last: Output of the last one, a leaf.
    """

    pieces: list[_Piece] = field(default_factory=list)
    stem: Tensor | None = None
    last: Tensor | None = None


_CUT: ContextVar[_Cut | None] = ContextVar("cut", default=None)


def cut_layer(
    layer: nn.Module,
    *inputs: Any,  # noqa: ANN401
    offload: bool = False,
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]] | None = None,
) -> Tensor | None:
    """Computes a layer of a forward pass that is being cut.

    Args:
        layer: The layer.
        *inputs: Its inputs, the stream of tokens first.
        offload: Keep the stream in main memory.
        contexts: Entered in the forward pass, and where the layer is made again.

    Returns:
        Its output, a leaf; None where no forward pass is being cut.

    Raises:
        ConfigError: The layers are not one chain.
    """
    cut = _CUT.get()
    if cut is None:
        return None
    stream, *others = inputs
    if cut.pieces and stream is not cut.last:
        raise ConfigError(
            "walking back through a network once for two gradients",
            f"a {type(layer).__name__} whose input is not the output of the layer before",
            "layers in one chain",
            _REMEDY,
        )
    kind = stream.device.type
    autocast = {
        "device_type": kind,
        "enabled": torch.is_autocast_enabled(kind),
        "dtype": torch.get_autocast_dtype(kind),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }
    forward, again = contexts or (nullcontext(), nullcontext())
    with torch.no_grad(), forward:
        output = layer(*inputs)
    kept = on_host(stream.detach()) if offload else stream.detach()
    cut.pieces.append(_Piece(layer, kept, stream.device, (*others,), autocast, again))
    cut.stem = stream if cut.stem is None else cut.stem
    cut.last = output.requires_grad_()
    return output


@contextmanager
def _cutting() -> Iterator[_Cut]:
    cut = _Cut()
    token = _CUT.set(cut)
    try:
        yield cut
    finally:
        _CUT.reset(token)


class JointWalk:
    """A forward pass, and the one backward pass through it.

    Args:
        network: Computed under `compute.checkpointing`.
        query: Query, whose `x0` is a leaf.

    Attributes:
        velocity: The prediction, a leaf that both losses are computed from.

    Raises:
        ConfigError: The network's layers are not made again, or not one chain.
    """

    velocity: Latents

    def __init__(self, network: nn.Module, query: NoisedBatch) -> None:
        self._x0 = query.x0
        with _cutting() as cut:
            self._head = network(query.x_t, query.sigma, query.text)
        if cut.stem is None or cut.last is None:
            raise ConfigError(
                "walking back through a network once for two gradients",
                f"no layer of {type(network).__name__} that is made again",
                "a network whose layers are made again in the backward pass",
                f"Set fake_score.compute.checkpointing=true, or {_REMEDY[4:]}",
            )
        self._pieces, self._stem, self._last = cut.pieces, cut.stem, cut.last
        self.velocity = self._head.detach().requires_grad_()
        self._gathered = GatheredWalk(network, [piece.layer for piece in reversed(self._pieces)])
        own = {id(value) for piece in self._pieces for value in piece.layer.parameters()}
        # Of stem and head, and of what makes the embeddings.
        self._outside = [
            value for value in network.parameters() if value.requires_grad and id(value) not in own
        ]

    def back(self, generator: Scalar, tracking: Scalar) -> Latents:
        """Runs the backward pass; accumulates the gradient of tracking's loss in the parameters.

        Args:
            generator: The generator's loss of `velocity`.
            tracking: Tracking's loss of `velocity`.

        Returns:
            Gradient of the generator's loss at `x0`.
        """
        with self._gathered.under_way():
            return self._back(generator, tracking)

    def _back(self, generator: Scalar, tracking: Scalar) -> Latents:
        (at_head,) = torch.autograd.grad(generator, self.velocity, retain_graph=True)
        (tracked,) = torch.autograd.grad(tracking, self.velocity)
        to_input, to_weights = (
            torch.autograd.grad(self._head, self._last, each, retain_graph=True)[0]
            for each in (at_head, tracked)
        )
        shared = _SharedInputs()
        for piece in reversed(self._pieces):
            with self._gathered.through(piece.layer):
                to_input, to_weights = shared.through(piece, to_input, to_weights)
        stem = self._stem
        # The loss again, and below the head again: both are small, and so terms are added up in
        # the order of one graph.
        (at_x0,) = torch.autograd.grad(
            [generator, stem], [self._x0], [torch.ones_like(generator), to_input], retain_graph=True
        )
        if self._outside:
            roots = [(self._head, tracked), (stem, to_weights), *shared.gathered]
            torch.autograd.backward(
                [root for root, _ in roots],
                [gradient for _, gradient in roots],
                inputs=self._outside,
            )
        return at_x0


class _SharedInputs:
    """Gradients of tracking's loss at what all layers take beside the stream of tokens."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def gathered(self) -> list[tuple[Tensor, Tensor]]:
        """Each of them, with its gradient."""
        return list(self._found.values())

    def through(self, piece: _Piece, to_input: Tensor, to_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Makes a layer again, and pulls both cotangents from its output to its input."""
        leaf = piece.stream.to(piece.device, non_blocking=True).detach().requires_grad_()
        beside = {
            id(value): (value, value.detach().requires_grad_())
            for value in piece.others
            if isinstance(value, Tensor) and value.requires_grad
        }
        # Views, as autocast keeps its casts of leaves; and roots of the walk, so that the sum so
        # far comes first.
        views = {name: own.view_as(own) for name, (_, own) in beside.items()}
        with torch.enable_grad(), torch.autocast(**piece.autocast), piece.again:
            output = piece.layer(leaf.view_as(leaf), *(views.get(id(v), v) for v in piece.others))
        (at_input,) = torch.autograd.grad(output, leaf, to_input, retain_graph=True)
        begun = [name for name in beside if name in self._found]
        own_parameters = [value for value in piece.layer.parameters() if value.requires_grad]
        torch.autograd.backward(
            [output, *(views[name] for name in begun)],
            [to_weights, *(self._found[name][1] for name in begun)],
            inputs=[leaf, *(own for _, own in beside.values()), *own_parameters],
        )
        for name, (value, own) in beside.items():
            if own.grad is not None:
                self._found[name] = (value, own.grad)
        return at_input, _gradient_of(leaf)


def _gradient_of(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
