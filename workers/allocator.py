"""Keeps memory that a pass has freed for the next one, on a CPU.

A pass of a small network frees all that it has taken. glibc returns the end of the heap to the
system from 128 KB on, or from twice the largest block that was freed, and the next pass takes the
same pages again, with a fault for each: none or thousands in an iteration, by the start.

The process stays at the largest size that it has had, or up to 1 GB above what it uses. Its peak is
the same, so plans, which are about GPUs and their hosts, count nothing for it.
"""

import ctypes
import logging
from contextlib import suppress

import torch

_BLOCK_BYTES = 2**25 - 2**13
"""The largest block that glibc learns from is one of 32 MiB, header and alignment included."""
_TRIM_THRESHOLD, _KEPT_BYTES = -1, 2**30
"""Number of a limit, as <malloc.h> has it, and its value: pages of a GB cost a pass a tenth of its
time, and a role whose passes take more spends it on the products of large matrices."""
_log = logging.getLogger(__name__)


def keep_freed_memory(device: torch.device) -> None:
    """Makes glibc keep up to 1 GB of freed memory; other allocators stay as they are.

    Frees one large block that was never touched: from then on glibc takes blocks of up to 32 MB
    from the heap. By itself it would return what exceeds twice that.

    Args:
        device: The role's; nothing is done for another than a CPU.
    """
    if device.type != "cpu":
        return
    # First: glibc learns from no block any more once a limit is set.
    torch.empty(_BLOCK_BYTES, dtype=torch.uint8, device="cpu")
    with suppress(AttributeError, OSError, TypeError):  # A C library without these limits.
        if not ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, _KEPT_BYTES):
            _log.warning("The C library keeps 64 MB of freed memory: it took no other limit")
