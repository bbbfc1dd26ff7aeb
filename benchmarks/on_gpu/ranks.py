"""Generator and fake score sharded over ranks, one a device, against one process on the CPU.

With one device there is one rank: its collectives run on NCCL all the same, and it says so.
"""

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from on_gpu.step import Context
from on_gpu.tiny_roles import BATCH, Roles, exact_float32, relative_errors

BOUND = 1e-4
_TIMEOUT_S = 60.0


def run(context: Context) -> None:
    """Starts the ranks and compares what they made."""
    on_card = context.device != "cpu"
    size = min(2, torch.cuda.device_count()) if on_card else 2
    note = "one device: a world of one rank" if size == 1 else f"{size} ranks"
    context.record(
        ranks=size, backend="nccl" if on_card else "gloo", note=note, host=socket.gethostname()
    )
    expected = Roles("cpu").gather()
    wanted = {name: value for name, value in expected.items() if name.startswith("gradient")}
    with tempfile.TemporaryDirectory() as scratch:
        arguments = (size, on_card, scratch, 2**20 if context.small else 2**28)
        # On a CPU one process imports for all; of one with a driver loaded none should be forked.
        multiprocessing.set_forkserver_preload(["workers.build", "workers.models.wan"])
        method = "spawn" if on_card else "forkserver"
        multiprocessing.start_processes(_enter, arguments, nprocs=size, start_method=method)
        found = torch.load(Path(scratch) / "gradients.pt", weights_only=True)
        rates = torch.load(Path(scratch) / "rates.pt", weights_only=True)
    errors = relative_errors(found, wanted)
    holds = all(error <= BOUND for error in errors.values())
    context.record(errors=errors, bound=BOUND, holds=holds, **rates)


@contextmanager
def join(rank: int, size: int, on_card: bool, scratch: str) -> Iterator[str]:
    """Makes this process one of some ranks on this machine; yields its device.

    Args:
        rank: Number of this one.
        size: Of all of them.
        on_card: Each has a GPU of its own; otherwise all are on the CPU.
        scratch: Folder in which they meet.
    """
    # All ranks are on this machine, which may have no other network.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1 if not on_card else torch.get_num_threads())
    device = f"cuda:{rank}" if on_card else "cpu"
    if on_card:
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(Path(scratch) / "meeting"), size)
    backend = "cpu:gloo,cuda:nccl" if on_card else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _enter(rank: int, size: int, on_card: bool, scratch: str, num_bytes: int) -> None:
    exact_float32()
    with join(rank, size, on_card, scratch) as device:
        roles = Roles(device, sharded=True)
        own = tuple(BATCH[0][rank::size])
        roles.gather((own,), total=len(BATCH[0]))
        # Every rank takes part in putting the gradients together.
        found = {name: value.cpu() for name, value in roles.gradients().items()}
        rates = {"all_reduce_gb_s": _all_reduce(device, num_bytes)}
        if rank == 0:
            torch.save(found, Path(scratch) / "gradients.pt")
            torch.save(rates, Path(scratch) / "rates.pt")


def _all_reduce(device: str, num_bytes: int) -> float:
    values: Any = torch.ones(num_bytes // 4, device=device)
    for turn in range(4):
        if turn == 1:
            started = time.perf_counter()
        dist.all_reduce(values)
        if device != "cpu":
            torch.cuda.synchronize()
    return 3 * num_bytes / (time.perf_counter() - started) / 1e9
