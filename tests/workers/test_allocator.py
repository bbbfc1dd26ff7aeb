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
keep_freed_memory(torch.device("cuda"))
again = took()
keep_freed_memory(torch.device("cpu"))
print(first, again, took())
"""
"""Blocks of 30 MB that are mapped from the system: at first, for a role on a GPU, on a CPU."""

_FAULTS = """
import ctypes
import resource
import torch
from workers.allocator import keep_freed_memory


def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**18) for _ in range(300)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


PR_SET_THP_DISABLE = 41
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
faults()
print(faults())
keep_freed_memory(torch.device("cpu"))
faults()
print(faults())
"""
"""Pages of 4 KB that are faulted in for 300 MB a second time, before and after."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other limits")
@pytest.mark.slow
def test_large_blocks_come_from_memory_that_is_kept() -> None:
    made = subprocess.run(
        [sys.executable, "-c", _BLOCKS], capture_output=True, text=True, check=True, timeout=60
    )
    assert made.stdout.split() == ["1", "1", "0"]


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other limits")
def test_a_pass_that_frees_hundreds_of_megabytes_finds_them_again() -> None:
    made = subprocess.run(
        [sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True, timeout=60
    )
    before, after = map(int, made.stdout.split())
    assert before > 1_000  # torch 2.14 takes its memory in larger pieces than 2.13.
    assert after < before / 10
