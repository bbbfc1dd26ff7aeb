"""Keeps memory that a pass has freed for the next one, on a CPU.

A pass of a small network frees all that it has taken. glibc returns the end of the heap to the
system from 128 KB on, or from twice the largest block that was freed, and the next pass takes the
same pages again, with a fault for each: none or thousands in an iteration, by the start.
"""

import torch

_BLOCK_BYTES = 2**25 - 2**13
"""The largest block that glibc learns from is one of 32 MiB, header and alignment included."""


def keep_freed_memory() -> None:
    """Makes glibc keep up to 64 MB of freed memory; other allocators stay as they are.

    Frees one large block that was never touched: from then on glibc takes blocks of up to 32 MB
    from the heap, and returns what exceeds twice that. A process that freed such a block before
    does so already.
    """
    torch.empty(_BLOCK_BYTES, dtype=torch.uint8, device="cpu")
