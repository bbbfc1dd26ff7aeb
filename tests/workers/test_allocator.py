"""Freed memory that a role's process keeps for its next pass."""

import platform
import subprocess
import sys

import pytest

_BLOCKS = """
import ctypes
import torch
from workers.allocator import keep_freed_memory


class Heap(ctypes.Structure):
    _fields_ = [(f"field_{place}", ctypes.c_size_t) for place in range(10)]


def mapped() -> int:
    look = ctypes.CDLL(None).mallinfo2
    look.restype = Heap
    return look().field_3


def took() -> int:
    before = mapped()
    kept.append(torch.empty(30 * 2**20, dtype=torch.uint8))
    return mapped() - before


kept = []
first = took()
keep_freed_memory()
print(first, took())
"""
"""Blocks of 30 MB that are mapped from the system, before and after."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other limits")
def test_large_blocks_come_from_memory_that_is_kept() -> None:
    made = subprocess.run(
        [sys.executable, "-c", _BLOCKS], capture_output=True, text=True, check=True, timeout=60
    )
    assert made.stdout.split() == ["1", "0"]
