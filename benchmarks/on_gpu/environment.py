"""The machine: card, driver, versions, and the rates that nothing on it can exceed.

copy_gb_s         from the card's memory to itself, bytes read and written
product_tflops    a square product in bfloat16, random numbers
to_card_gb_s, from_card_gb_s    pinned and pageable memory
"""

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from on_gpu.step import Context


def run(context: Context) -> None:
    """Writes all of it down."""
    context.record(
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cores=os.cpu_count(),
        c_compiler=next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None),
        modules={name: find_spec(name) is not None for name in ("triton", "ray", "nixl", "pytest")},
        started=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    )
    context.record(card=_card(context.device), driver=_driver(context.device))
    small = context.small
    context.record(copy_gb_s=_copy(context.device, 2**22 if small else 2**31))
    context.record(product_tflops=_product(context.device, 64 if small else 8192))
    context.record(**_transfers(context.device, 2**22 if small else 2**28))


def _card(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"name": f"none: {platform.machine()}", "count": 0}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "count": torch.cuda.device_count(),
        "memory_gb": found.total_memory / 1e9,
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
    }


def _driver(device: str) -> str | None:
    """The driver's version, or why it is not known."""
    if device == "cpu":
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=15, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"no driver version: {error}", file=sys.stderr)
        return None
    return done.stdout.splitlines()[0].strip()


def _copy(device: str, num_bytes: int) -> float:
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds(device, lambda: target.copy_(source)) / 1e9


def _product(device: str, size: int) -> float:
    first, second = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / seconds(device, lambda: first @ second) / 1e12


def _transfers(device: str, num_bytes: int) -> dict[str, dict[str, float]]:
    on_card = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    found: dict[str, dict[str, float]] = {"to_card_gb_s": {}, "from_card_gb_s": {}}
    for kind, pinned in (("pageable", False), ("pinned", device != "cpu")):
        here = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        to_s = seconds(device, lambda here=here: on_card.copy_(here), 5)
        from_s = seconds(device, lambda here=here: here.copy_(on_card), 5)
        found["to_card_gb_s"][kind] = num_bytes / to_s / 1e9
        found["from_card_gb_s"][kind] = num_bytes / from_s / 1e9
    return found


def seconds(device: str, work: Callable[[], Any], repeats: int = 10) -> float:
    """Median seconds of some work on a device, after two turns that warm up."""
    for _ in range(2):
        work()
    found: list[float] = []
    for _ in range(repeats):
        if device == "cpu":
            started = time.perf_counter()
            work()
            found.append(time.perf_counter() - started)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1000)
    return statistics.median(found)
