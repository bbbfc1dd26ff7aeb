"""Tokens of one sample over several ranks: diffusers' context parallelism, by Ulysses.

    layers      rank 0 has the first part of the tokens, rank 1 the next one, and so on
    attention   rank 0 has all tokens of the first heads: exchanged before and after
    outside     every rank is called with the same samples, and returns their whole velocity

Each rank makes the gradients of its own tokens. At parameters FSDP2 adds them up, as it does those
of other samples; at the network's input they are added up here.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ModelMixin
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ParallelConfig
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from workers.sharding import num_ranks, own_rank

_SAMPLES, _RING, _ULYSSES = "samples", "ring", "ulysses"


def split_over_ranks(network: ModelMixin, degree: int, skipped: tuple[str, ...]) -> Any:  # noqa: ANN401
    """Splits a network's tokens over each `degree` ranks in a row of this process's role.

    Args:
        network: Changed in place; its heads and tokens divide among the ranks.
        degree: Ranks.
        skipped: Modules of its own plan whose inputs are left whole.

    Returns:
        The process group of the ranks that this one works with.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh = init_device_mesh(
        device.type,
        (num_ranks() // degree, 1, degree),
        mesh_dim_names=(_SAMPLES, _RING, _ULYSSES),
    )
    own = mesh[_RING, _ULYSSES]
    split = ContextParallelConfig(ulysses_degree=degree, mesh=own)
    config = ParallelConfig(context_parallel_config=split)
    # As `enable_parallelism`, which wants an accelerator to be there.
    config.setup(own_rank(), num_ranks(), device, mesh=own)
    network._parallel_config = config
    for processor in network.attn_processors.values():
        processor._parallel_config = config
    plan = cast(Mapping[str, Any], network._cp_plan)
    apply_context_parallel(
        network,
        split,
        {name: part for name, part in plan.items() if name not in skipped},
    )
    return own[_ULYSSES].get_group()


def with_summed_gradient(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same tensor, whose gradient is the sum of those of a group's ranks."""
    return cast(Tensor, _SummedGradient.apply(value, group))


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:  # noqa: ANN401  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
