"""Functions run on several ranks of a gloo group: real processes, real collectives, no Ray.

The ranks are forked from a process that has imported what they need, once for all tests of a
session: each would otherwise spend 7 s of a core on it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.helpers.forked_python import starting_forks
from workers.models.wan_family import WAN_TRAITS

PRELOADED = ("workers.build", "torch.distributed.fsdp", *WAN_TRAITS.modules)


def on_ranks(size: int, function: Callable[..., Any], folder: Path, *args: object) -> list[Any]:
    """What `function(rank, size, *args)` returned on every rank.

    Args:
        size: Ranks.
        function: Module-level; its results must be what `torch.save` and a safe load carry.
        folder: Empty; for the ranks' meeting and their results.
        args: Further arguments.
    """
    # Modules of the tests are not found by the process that forks: it knows installed ones alone.
    multiprocessing.set_forkserver_preload([*PRELOADED])
    arguments = (size, function, folder, args)
    with starting_forks():
        multiprocessing.start_processes(_enter, arguments, nprocs=size, start_method="forkserver")
    return [torch.load(_result(folder, rank), weights_only=True) for rank in range(size)]


def _enter(
    rank: int, size: int, function: Callable[..., Any], folder: Path, args: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "meeting"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        torch.save(function(rank, size, *args), _result(folder, rank))
    finally:
        dist.destroy_process_group()


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.pt"
