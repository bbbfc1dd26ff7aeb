"""Functions run on several ranks of a gloo group: real processes, real collectives, no Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def on_ranks(size: int, function: Callable[..., Any], folder: Path, *args: object) -> list[Any]:
    """What `function(rank, size, *args)` returned on every rank.

    Args:
        size: Ranks.
        function: Module-level; its results must be what `torch.save` and a safe load carry.
        folder: Empty; for the ranks' meeting and their results.
        args: Further arguments.
    """
    multiprocessing.spawn(_enter, (size, function, folder, args), nprocs=size)
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
