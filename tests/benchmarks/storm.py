"""The modules of storm and soak, which lie beside the packages."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import chaos
import chaos_page
import soak
from chaos_faults import Storm, StormyRun, order_faults

__all__ = ["Storm", "StormyRun", "chaos", "chaos_page", "order_faults", "soak"]
