"""One role on several ranks: FSDP2, applied from outside.

    every rank      the same network, of which it keeps 1/n of each parameter (a DTensor)
    forward         a block's parameters are gathered, used, and freed again; in bfloat16 where the
                    network computes in it, from parts in float32
    backward        gradients are *summed* over the ranks, and each rank keeps its 1/n of the sum

The sum, not FSDP's usual mean: each rank's loss carries its samples' share of the whole batch
already, so the sum is the gradient of the batch, whatever the number of ranks.

A process that was not placed in a process group has the network to itself, and nothing here does
anything.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def num_ranks() -> int:
    """Ranks of the role that this process belongs to."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rank() -> int:
    """Rank of this process in its role."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first_rank() -> bool:
    """Returns True in the process that writes for its role."""
    return own_rank() == 0


def shard(
    network: nn.Module,
    blocks: Iterable[nn.Module],
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    alone: bool = False,
    frozen: bool = False,
) -> None:
    """Spreads a network's parameters over the ranks of this process's role.

    Call it on every rank, with the same weights or with all of them on the meta device, before an
    optimizer is made.

    Args:
        network: Changed in place.
        blocks: Parts that are gathered one at a time, such as the transformer's layers.
        device: Type of the device that the weights will be on; None: the one that they are on.
        dtype: Type that parameters are gathered in; gradients are summed in float32, and inputs
            stay as they are: a noise level would lose digits. None: the parameters' own.
        alone: Shard also where this process is the only rank, to try the collectives of a device.
        frozen: Spread parameters that require no gradient, too.
    """
    if num_ranks() == 1 and not alone:
        return
    mesh = init_device_mesh(device or next(network.parameters()).device.type, (num_ranks(),))
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None, cast_forward_inputs=False
    )
    # Weights under adapters stay whole on every rank: other roles of its process use them too.
    whole = {value for value in network.parameters() if not (value.requires_grad or frozen)}
    for part in (*blocks, network):
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=whole)
    for part in network.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            # Without it a factor is folded into the collective, in a way that only NCCL knows.
            part.set_force_sum_reduction_for_comms(True)


def is_sharded(network: nn.Module) -> bool:
    """Returns True if this process keeps only a part of the network."""
    return isinstance(network, FSDPModule)


def reshard(network: nn.Module) -> None:
    """Frees the copies of parameters that forward passes have gathered, on this rank alone.

    FSDP keeps those of the outermost module after a pass without a graph, and until they are freed
    the module holds them in place of the parts: a change to them would be lost, and after a change
    to the parts the next pass would still compute with them. Graphs that are kept gather again in
    their backward pass.
    """
    if not is_sharded(network):
        return
    for part in network.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def parameters_of(network: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, to be changed or read; on several ranks, their own parts."""
    reshard(network)
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


@torch.no_grad()
def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor; every rank must ask, in the same order. Not a copy where nothing is shared.

    Args:
        tensor: A parameter, or what was computed from parameters alone.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_to_rank0(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies of whole tensors on the first rank; every rank must ask, the others get nothing.

    One tensor at a time and, where something is shared, to main memory: no rank ever holds two
    whole networks on its device.

    Args:
        tensors: Names and tensors, in the same order on every rank.
    """
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors:
        value = full_tensor(tensor.detach())
        if is_first_rank():
            copies[name] = value.cpu() if isinstance(tensor, DTensor) else value.clone()
    return copies


def as_shard(part: Tensor, like: Tensor) -> Tensor:
    """A tensor of which each rank keeps a part in main memory, laid out like another one.

    Args:
        part: This rank's part, wherever it lies; or a whole tensor, returned as it is.
        like: Parameter that it belongs to.
    """
    if not isinstance(like, DTensor) or isinstance(part, DTensor):
        return part
    return DTensor.from_local(
        part.to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, as a plain one: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_main_memory(tensor: Tensor) -> Tensor:
    """This rank's part in main memory, pinned where it comes from a GPU; itself if it is there."""
    part = local_part(tensor)
    if part.device.type == "cpu":
        return part
    return torch.empty_like(part, device="cpu", pin_memory=part.is_cuda).copy_(part)


def local_shard(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that every rank knows, laid out like another one."""
    if not isinstance(like, DTensor):
        return value
    placed = value.to(like.device)
    # Every rank cuts its own part out; nothing is sent.
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a tensor, to be written, and the index of its first row in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    # The rows of a column of indices go where those of the tensor went.
    rows = local_shard(torch.arange(tensor.shape[0], device=tensor.device), tensor)
    assert isinstance(rows, DTensor)
    indices = rows.to_local()
    return tensor.to_local(), int(indices[0]) if len(indices) else 0
