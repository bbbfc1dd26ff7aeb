"""Small networks of many runs in one: seeds and learning rates side by side as one batched product.

    member    one run: a seed and a pair of learning rates
    stack     the weights of all members, (members, in, out); samples (members * b, dim, 1, 1, 1)

No number of a member depends on another's: products are batched over members, losses are means over
the samples and weigh every member alike, and Adam is elementwise.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sgmd_core.seeds import random_generator
from sgmd_core.types import Latents, PerSample, Text
from sgmd_core.velocity import VelocityModel


class MemberNetworks(nn.Module):
    """A base velocity and a learned correction of it, one a member; the correction starts at 0.

        velocity(x_t, sigma) = base(x_t, sigma) + matrix x_t + network(x_t, sigma)

    Without the matrix, hidden layers narrower than a sample could not move most directions at all.

    Args:
        base: What the networks start as; None starts at velocity 0.
        dim: Dimensions of a sample.
        width: Units of each hidden layer.
        hidden_layers: Hidden layers; without any the correction is affine.
        seeds: Seed of each member; equal seeds start with equal weights.
        role: Names the random stream of the initial weights.
    """

    def __init__(
        self,
        base: VelocityModel | None,
        dim: int,
        width: int,
        hidden_layers: int,
        seeds: Sequence[int],
        role: str,
    ) -> None:
        super().__init__()
        self._base = base
        sizes = [dim + 1, *[width] * hidden_layers, dim]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.skip = nn.Parameter(torch.zeros(len(seeds), dim, dim))
        for layer, (before, after) in enumerate(itertools.pairwise(sizes)):
            drawn = [_initial(seed, role, layer, before, after) for seed in seeds]
            is_last = layer == hidden_layers
            stack = torch.zeros(len(seeds), before, after) if is_last else torch.stack(drawn)
            self.weights.append(nn.Parameter(stack))
            self.biases.append(nn.Parameter(torch.zeros(len(seeds), 1, after)))

    def forward(self, x_t: Latents, sigma: PerSample, text: Text) -> Latents:
        """Predicts the velocity at `x_t`; samples of one member lie next to each other."""
        members, dim = self.skip.shape[:2]
        points = x_t.reshape(members, -1, dim)
        hidden = torch.cat([points, sigma.reshape(members, -1, 1)], dim=2)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, hidden, weight)
            hidden = nn.functional.silu(hidden) if layer < last else hidden
        correction = torch.baddbmm(hidden, points, self.skip).reshape(x_t.shape)
        return correction if self._base is None else self._base(x_t, sigma, text) + correction


class MemberAdam:
    """Adam of all members, each with a learning rate of its own, without a first moment.

    Adam's step is proportional to its rate, so it is made with rate 1 and then scaled.

    Args:
        networks: The stacked networks.
        rates: Learning rate of each member.
    """

    def __init__(self, networks: MemberNetworks, rates: Sequence[float]) -> None:
        self._parameters = list(networks.parameters())
        self._adam = torch.optim.Adam(self._parameters, lr=1.0, betas=(0.0, 0.999))
        self._rates = torch.tensor(rates)[:, None, None]

    def step(self, multiple: float = 1.0) -> None:
        """Takes one step along the gathered gradients, and drops them.

        Args:
            multiple: Of every member's rate.
        """
        before = [parameter.detach().clone() for parameter in self._parameters]
        self._adam.step()
        self._adam.zero_grad()
        with torch.no_grad():
            for old, parameter in zip(before, self._parameters, strict=True):
                parameter.copy_(old + multiple * self._rates * (parameter - old))

    @contextmanager
    def taken_back(self) -> Iterator[None]:
        """Goes back to the weights and moments of now, bit for bit, when the block ends."""
        weights = [parameter.detach().clone() for parameter in self._parameters]
        moments = deepcopy(self._adam.state_dict())
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, weights, strict=True):
                    parameter.copy_(value)
            self._adam.load_state_dict(moments)


def _initial(
    seed: int, role: str, layer: int, before: int, after: int
) -> Float[Tensor, "before after"]:
    stream = random_generator(seed, f"gaussians/weights/{role}", layer)
    return torch.randn(before, after, generator=stream) / before**0.5
