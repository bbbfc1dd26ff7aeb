"""The garbage collector, paused while libraries are imported."""

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Generator[None]:
    """Pause Python's collector of reference cycles; for imports, which make nothing to collect.

    Importing diffusers makes a million objects that stay, and the collector looks at all of them
    again and again: a seventh of the CPU time of these imports (docs/benchmarks.md, Start).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
