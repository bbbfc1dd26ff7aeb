"""The GPU of a process among those that it sees."""

import os

import ray
import torch


def take_own_gpu() -> None:
    """Makes the GPU that Ray gave to this process the current one, where all are in sight."""
    own = ray.get_gpu_ids()
    if own:
        torch.cuda.set_device(device_index(str(own[0]), os.environ.get("CUDA_VISIBLE_DEVICES")))


def device_index(gpu: str, visible: str | None) -> int:
    """CUDA's index of a GPU: its place among those in sight, where not all of them are.

    Args:
        gpu: As Ray names it: its number on the machine, or its UUID.
        visible: CUDA_VISIBLE_DEVICES of this process.
    """
    names = [name.strip() for name in visible.split(",")] if visible else []
    return names.index(gpu) if gpu in names else int(gpu)
