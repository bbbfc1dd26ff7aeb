"""Refuses numbers that are not finite where they first appear, and names what they came from.

A role checks what it was handed and what it has made of it before anybody learns from it. Later it
may be too late: a loss can hide a broken prediction, and an update cannot be taken back.
"""

import math
from collections.abc import Mapping

from torch import Tensor

from sgmd_core.errors import NonFiniteError
from sgmd_core.types import MicroBatchKey

UNCHANGED = "No weight was updated from this micro-batch"
"""What a role that refuses one says about its state."""


def micro_batch_in_words(key: MicroBatchKey) -> str:
    """The micro-batch, for messages."""
    return f"iteration {key.iteration}, micro-batch {key.micro_batch} ({key.purpose})"


def require_finite(
    attempted: str,
    sources: Mapping[str, Tensor],
    remedy: str,
    figures: Mapping[str, float] | None = None,
) -> None:
    """Checks all numbers of a call before anybody learns from them.

    Args:
        attempted: What the role was doing, and for which micro-batch.
        sources: What it was handed and what it made, by name, in the order of their making.
        remedy: What to do about it.
        figures: Losses and norms that were computed from them.

    Raises:
        NonFiniteError: Something is not finite; names figures and sources that are not.
    """
    wrong = ", ".join(f"{n} = {x}" for n, x in (figures or {}).items() if not math.isfinite(x))
    broken = [name for name, value in sources.items() if not _is_finite(value)]
    cause = f"{' and '.join(broken)} not finite" if broken else ""
    if wrong or cause:
        found = "; ".join(part for part in (wrong, cause) if part)
        raise NonFiniteError(attempted, found, "finite numbers", f"{UNCHANGED}; {remedy}")


def _is_finite(value: Tensor) -> bool:
    """Returns True if no entry is infinite or NaN.

    A sum that is finite has only finite terms, and costs a third of looking at every entry; where
    large terms make it overflow, every entry is looked at.
    """
    return math.isfinite(value.detach().sum().item()) or bool(value.isfinite().all())
