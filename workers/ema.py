"""Averaged weights: what is validated and exported.

    average <- average + (1 - d_n) * (weights - average)        d_n = min(decay, (1 + n) / (10 + n))

n counts the updates made before. The cap d_n lets the first averages forget the initial weights:
with a constant decay of 0.99 these would still make up 37 % of the average after 100 updates, with
the cap nothing is left of them. Until the cap meets the decay, the average reaches back over about
a ninth of the updates made. An average that starts later counts n from there, and is the weights
themselves before.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from workers.role_state import require_same_tensors
from workers.sharding import as_shard, local_part, parameters_of, reshard, to_main_memory


def effective_decay(decay: float, updates: int, start: int = 0) -> float:
    """Decay of the update that follows `updates` earlier ones; 0 before `start` of them."""
    counted = updates - start
    return min(decay, (1 + counted) / (10 + counted)) if counted >= 0 else 0.0


class AveragedWeights:
    """Exponential moving average of a network's parameters, in float32 or wider.

    Args:
        network: What is averaged; its present weights are the first average.
        decay: Share of the old average that an update keeps, in (0, 1).
        start: Updates before the averaging begins.
        offload: Keep the average in main memory, and make it there.
    """

    def __init__(
        self, network: nn.Module, decay: float, start: int = 0, *, offload: bool = False
    ) -> None:
        self._decay = decay
        self._offloads = offload
        self._place = to_main_memory if offload else _unmoved
        self._start = start
        self._network = network
        self._parameters = parameters_of(network)
        self._average = {
            name: self._place(_wide(value.detach())).clone()
            for name, value in self._parameters.items()
        }

    @property
    def average(self) -> Mapping[str, Tensor]:
        """The averaged parameters by name: views, and on several ranks parts."""
        return self._average

    def shards(self) -> Iterator[tuple[str, Tensor]]:
        """Names and averaged parameters, to be gathered one after another."""
        for name, value in self._average.items():
            yield name, as_shard(value, self._parameters[name])

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Takes the network's present weights in; `updates` were taken in before."""
        weight = 1 - effective_decay(self._decay, updates, self._start)
        reshard(self._network)
        if self._offloads:
            # One tensor after another: main memory never holds all weights beside their average.
            for name, value in self._parameters.items():
                self._average[name].lerp_(self._place(_wide(value.detach())), weight)
            return
        averages = list(self._average.values())
        weights = [_wide(value.detach()) for value in self._parameters.values()]
        # One call for all tensors, as in torch.optim.swa_utils.
        torch._foreach_lerp_(averages, weights, weight)

    def restore(self, parts: Mapping[str, Tensor]) -> None:
        """Goes on from this rank's parts of an average.

        Raises:
            CheckpointError: They were taken of another network.
        """
        own = {name: local_part(value) for name, value in self._average.items()}
        require_same_tensors(parts, own, "restoring the averaged weights")
        for name, value in own.items():
            value.copy_(parts[name])


def _unmoved(value: Tensor) -> Tensor:
    return value


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
