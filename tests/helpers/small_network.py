"""A network whose Jacobian is full and smooth, and queries small enough for finite differences."""

import torch
from torch import nn

from sgmd_core.types import NoisedBatch, detached, per_sample
from tests.helpers.queries import make_query

SHAPE = (3, 1, 2, 2, 2)


class SmallNetwork(nn.Module):
    """A smooth velocity model that mixes all elements of a sample."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [(12, 9), (8, 12)]
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.randn(*size, generator=generator).to(dtype) / 3) for size in sizes]
        )

    def forward(self, x_t, sigma, text):
        inputs = torch.cat([x_t.flatten(1), sigma[:, None]], dim=1)
        return (torch.tanh(inputs @ self.weights[0].T) @ self.weights[1].T).reshape(x_t.shape)


def random_query(dtype=torch.float64, seed=0) -> NoisedBatch:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return make_query(x0, noise, torch.tensor([0.1, 0.5, 0.9], dtype=dtype))


def with_leaf(query: NoisedBatch) -> NoisedBatch:
    return detached(query, x0=query.x0.clone().requires_grad_())


def predict(network: SmallNetwork, query: NoisedBatch) -> torch.Tensor:
    return network(query.x_t, query.sigma, query.text)


def x0_prediction(network: SmallNetwork, query: NoisedBatch) -> torch.Tensor:
    return query.x_t - per_sample(query.sigma, query.x_t) * predict(network, query)
