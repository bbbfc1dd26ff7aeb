"""Weights of several ranks in a walk back that is made layer by layer: gathered once a layer.

    forward    a layer's parts are gathered, used, and let go again            as in any pass
    walk       gathered once more, kept for the layer made again and all that is pulled back through
               it; meanwhile the next layer's are on their way; then its gradients are summed

FSDP takes each pull for a backward pass of its own, after which it would let the weights go, forget
what it has asked for, and look ahead by the order of the last forward passes, which is not that of
a walk. So for its length it is told what comes next and when the last pull is made.

Where a process has the network to itself nothing here does anything.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule

from workers.sharding import reshard


class GatheredWalk:
    """The weights of a network, for the length of one walk back through it.

    Args:
        network: Whose layers are walked through; itself what holds all weights outside of them.
        layers: In the order of the walk.
    """

    def __init__(self, network: nn.Module, layers: Sequence[nn.Module]) -> None:
        self._network = network
        self._layers = layers

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Keeps what is gathered until it is let go; outside, FSDP has its usual order again."""
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
