"""The modules of the check of a GPU, which lie beside the packages."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
from on_gpu import cases, memory_settings, report, role_stages, step, truths, wheels  # noqa: E402

__all__ = [
    "ROOT",
    "cases",
    "gpu_check",
    "memory_settings",
    "report",
    "role_stages",
    "step",
    "truths",
    "wheels",
]
