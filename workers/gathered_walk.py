"""Weights of several ranks in a backward pass that is made layer by layer: gathered once a layer.

    forward    a layer's parts are gathered, used, and freed again            as in any pass
    backward   gathered once more, kept for the recomputed layer and all that is pulled back through
               it; meanwhile the next layer's are on their way; then its gradients are summed

FSDP takes each of the two gradients of a layer for a backward pass of its own, after which it would
free the weights, forget its requests, and prefetch in the order of the last forward passes, which
is not that of this pass. So for its length FSDP is given the next layer and the last gradient.

Where a process has the network to itself nothing here does anything.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule

from workers.sharding import reshard


class GatheredWalk:
    """The weights of a network, for the length of one backward pass through it.

    Args:
        network: Whose layers are walked through; itself what holds all weights outside of them.
        layers: In the order of the backward pass.
    """

    def __init__(self, network: nn.Module, layers: Sequence[nn.Module]) -> None:
        self._network = network
        self._layers = layers

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Keeps what is gathered until it is freed; outside, FSDP has its usual order again."""
        network = self._network
        if not isinstance(network, FSDPModule):
            yield
            return
        parts = [network, *(part for part in self._layers if isinstance(part, FSDPModule))]
        # A part whose weights are there stands for none: FSDP would look for one by itself.
        for part, following in zip(parts, [*parts[1:], network], strict=True):
            part.set_modules_to_backward_prefetch([following])
        for part in parts:
            part.set_reshard_after_backward(False, recurse=False)
        network.set_is_last_backward(False)
        try:
            yield
        finally:
            for part in parts:
                part.set_modules_to_backward_prefetch([])
                part.set_reshard_after_backward(True, recurse=False)
            network.set_is_last_backward(True)
            reshard(network)

    @contextmanager
    def through(self, layer: nn.Module) -> Iterator[None]:
        """Keeps a layer's weights from the moment when it is made again until the end."""
        if not isinstance(layer, FSDPModule):
            yield
            return
        if layer is self._layers[-1] and isinstance(self._network, FSDPModule):
            # What comes after is the network's own: sums are waited for, no layer is asked for.
            self._network.set_is_last_backward(True)
            self._network.set_modules_to_backward_prefetch([self._network])
        layer.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()
