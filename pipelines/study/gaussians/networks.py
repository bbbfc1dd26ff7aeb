"""Small networks of many runs in one: seeds and learning rates side by side as one batched product.

    member    one run: a seed and a pair of learning rates
    stack     the weights of all members, (members, in, out); samples (members * b, dim, 1, 1, 1)

    MemberNetworks    a velocity: generator and fake score
    MemberExperts     two of them, one above a noise level and one below: Phased DMD's generator
    MemberTransition  a sample of the velocity, by a few inner steps: TMD's generator
    MemberHeads       a logit, from what the exact teacher says of a state: ADM's discriminator

No number of a member depends on another's: products are batched over members, losses are means over
the samples and weigh every member alike, and Adam is elementwise.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sgmd_core.inner_flow import InnerGrid, InnerHead, inner_sample
from sgmd_core.seeds import random_generator
from sgmd_core.types import Latents, PerSample, Text, per_sample
from sgmd_core.velocity import VelocityModel


class MemberLayers(nn.Module):
    """Fully connected layers of all members; the last one starts at 0.

    Args:
        sizes: Units of input, hidden layers and output.
        seeds: Seed of each member; equal seeds start with equal weights.
        role: Names the random stream of the initial weights.
    """

    def __init__(self, sizes: Sequence[int], seeds: Sequence[int], role: str) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for layer, (before, after) in enumerate(itertools.pairwise(sizes)):
            drawn = [_initial(seed, role, layer, before, after) for seed in seeds]
            is_last = layer == len(sizes) - 2
            stack = torch.zeros(len(seeds), before, after) if is_last else torch.stack(drawn)
            self.weights.append(nn.Parameter(stack))
            self.biases.append(nn.Parameter(torch.zeros(len(seeds), 1, after)))

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps (members, n, in) to (members, n, out)."""
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            hidden = torch.baddbmm(bias, hidden, weight)
            hidden = nn.functional.silu(hidden) if layer < last else hidden
        return hidden


@dataclass(frozen=True, slots=True)
class NetworkShape:
    """Size of the networks, and the members that they are of.

    Attributes:
        dim: Dimensions of a sample.
        width: Units of each hidden layer.
        hidden_layers: Hidden layers; without any a correction is affine.
        seeds: Seed of each member; equal seeds start with equal weights.
    """

    dim: int
    width: int
    hidden_layers: int
    seeds: Sequence[int]

    def layers(self, inputs: int, outputs: int, role: str) -> MemberLayers:
        """Layers of so many inputs and outputs; `role` names their initial weights."""
        return MemberLayers([inputs, *[self.width] * self.hidden_layers, outputs], self.seeds, role)


class MemberNetworks(nn.Module):
    """A base velocity and a learned correction of it, one a member; the correction starts at 0.

        velocity(x_t, sigma) = base(x_t, sigma) + matrix x_t + network(x_t, sigma)

    Without the matrix, hidden layers narrower than a sample could not move most directions at all.

    Args:
        base: What the networks start as; None starts at velocity 0.
        shape: Their size.
        role: Names the random stream of the initial weights.
    """

    def __init__(self, base: VelocityModel | None, shape: NetworkShape, role: str) -> None:
        super().__init__()
        self._base = base
        self.layers = shape.layers(shape.dim + 1, shape.dim, role)
        self.skip = nn.Parameter(torch.zeros(len(shape.seeds), shape.dim, shape.dim))

    def forward(self, x_t: Latents, sigma: PerSample, text: Text) -> Latents:
        """Predicts the velocity at `x_t`; samples of one member lie next to each other."""
        members, dim = self.skip.shape[:2]
        points = x_t.reshape(members, -1, dim)
        hidden = self.layers(torch.cat([points, sigma.reshape(members, -1, 1)], dim=2))
        correction = torch.baddbmm(hidden, points, self.skip).reshape(x_t.shape)
        return correction if self._base is None else self._base(x_t, sigma, text) + correction


class MemberExperts(nn.Module):
    """Two velocities a member: the first one's above a noise level, the second one's below.

    Args:
        experts: The two.
        boundary: Noise level above which the first is asked. Samples of a call share theirs.
    """

    def __init__(self, experts: tuple[MemberNetworks, MemberNetworks], boundary: float) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self._boundary = boundary

    def forward(self, x_t: Latents, sigma: PerSample, text: Text) -> Latents:
        """Predicts the velocity at `x_t`."""
        return self.experts[int(sigma[0] <= self._boundary)](x_t, sigma, text)


class MemberTransition(nn.Module):
    """A sample of the velocity a member: the whole network is a flow head, see `inner_flow`.

        head(y_s, s, r) = base(x_t, sigma) + matrix (x_t, y_s) + network(x_t, y_s, sigma, s, r)

    Args:
        base: What the networks start as; None starts at velocity 0.
        shape: Their size.
        inner_levels: Levels of the inner flow.
        role: Names the random stream of the initial weights.
    """

    def __init__(
        self,
        base: VelocityModel | None,
        shape: NetworkShape,
        inner_levels: InnerGrid,
        role: str,
    ) -> None:
        super().__init__()
        self._base = base
        self.inner_levels, self.inner_steps = inner_levels, len(inner_levels) - 1
        self.layers = shape.layers(2 * shape.dim + 3, shape.dim, role)
        self.skip = nn.Parameter(torch.zeros(len(shape.seeds), 2 * shape.dim, shape.dim))

    def forward(
        self, x_t: Latents, sigma: PerSample, text: Text, inner_noise: Latents, /
    ) -> Latents:
        """Samples the velocity at `x_t`."""
        return inner_sample(self.head(x_t, sigma, text), inner_noise, self.inner_levels)

    def head(self, x_t: Latents, sigma: PerSample, text: Text) -> InnerHead:
        """The head at one state, which it looks at once."""
        members, _, dim = self.skip.shape
        start = 0.0 if self._base is None else self._base(x_t, sigma, text)

        def answer(y_s: Latents, s: PerSample, r: PerSample) -> Latents:
            states = [each.reshape(members, -1, dim) for each in (x_t, y_s)]
            levels = [each.reshape(members, -1, 1) for each in (sigma, s, r)]
            hidden = self.layers(torch.cat([*states, *levels], dim=2))
            return start + torch.baddbmm(hidden, torch.cat(states, dim=2), self.skip).reshape(
                x_t.shape
            )

        return answer


class MemberHeads(nn.Module):
    """A logit a sample, from the features that an exact teacher has: the state, and its x0 there.

    Args:
        teacher: The exact teacher, which is not trained.
        shape: Size of the networks.
    """

    def __init__(self, teacher: VelocityModel, shape: NetworkShape) -> None:
        super().__init__()
        self._teacher, self._members = teacher, len(shape.seeds)
        self.layers = shape.layers(2 * shape.dim + 1, 1, "discriminator")

    def forward(self, x_t: Latents, sigma: PerSample, text: Text) -> Tensor:
        """Logits of the states, one each: (members * b,)."""
        x0 = x_t - per_sample(sigma, x_t) * self._teacher(x_t, sigma, text)
        seen = torch.cat([x_t.flatten(1), x0.flatten(1), sigma[:, None]], dim=1)
        return self.layers(seen.reshape(self._members, -1, seen.shape[1])).flatten()


class MemberAdam:
    """Adam of all members, each with a learning rate of its own, without a first moment.

    Adam's step is proportional to its rate, so it is made with rate 1 and then scaled.

    Args:
        networks: The stacked networks.
        rates: Learning rate of each member.
        beta2: Of Adam.
    """

    def __init__(self, networks: nn.Module, rates: Sequence[float], beta2: float) -> None:
        self._parameters = list(networks.parameters())
        self._adam = torch.optim.Adam(self._parameters, lr=1.0, betas=(0.0, beta2))
        self._rates = torch.tensor(rates)[:, None, None]

    def step(self, multiple: float = 1.0) -> None:
        """Takes one step along the accumulated gradients, and drops them.

        Args:
            multiple: Of every member's rate.
        """
        before = [parameter.detach().clone() for parameter in self._parameters]
        self._adam.step()
        self._adam.zero_grad()
        with torch.no_grad():
            for old, parameter in zip(before, self._parameters, strict=True):
                parameter.copy_(old + multiple * self._rates * (parameter - old))

    def restart(self, weights: Sequence[Tensor]) -> None:
        """Takes weights in place of the present ones, and forgets all moments."""
        with torch.no_grad():
            for parameter, value in zip(self._parameters, weights, strict=True):
                parameter.copy_(value)
        self._adam.state.clear()

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
