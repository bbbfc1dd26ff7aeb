"""Refuses numbers that are not finite where they first appear, and names what they came from.

A role checks what it was handed and what it has made of it before anybody learns from it. Later it
may be too late: a loss can hide a broken prediction, and an update cannot be taken back.

In a run a role does not raise, because other ranks would wait for it in a collective. It records
the cause and returns NaN, which reaches the gradient of every rank that learns from it; the
controller then skips the update of all roles (`pipelines.distillation.guards`).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sgmd_core.errors import NonFiniteError
from sgmd_core.types import MicroBatchKey

UNCHANGED = "No weight was updated from this micro-batch"
"""State of a role that has refused a micro-batch, in words."""


@dataclass(frozen=True, slots=True)
class NumericalFault:
    """First number of an iteration that a role found not to be finite.

    Attributes:
        micro_batch: Micro-batch of the call, counted over the whole iteration.
        stages_before: Stages that the micro-batch passed before; a fault passes on to later ones.
        attempted: Work of the role, for the error.
        found: Names of the numbers that are not finite.
        remedy: Remedy for it.
    """

    micro_batch: int
    stages_before: int
    attempted: str
    found: str
    remedy: str

    def error(self) -> NonFiniteError:
        """The error that the role would have raised."""
        return NonFiniteError(self.attempted, self.found, "finite numbers", self.remedy)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Facts that a role knows about an iteration whose gradient is not finite.

    Attributes:
        fault: First fault that the role recorded; None where it recorded none.
        broken_weight: Name of a weight that is not finite; None where all are finite.
    """

    fault: NumericalFault | None
    broken_weight: str | None


class FiniteChecks:
    """Checks of one role: raises at a number that is not finite, or returns NaN in its place.

    Args:
        raises: Raise; False records the first fault of each iteration.
    """

    def __init__(self, *, raises: bool = True) -> None:
        self._raises = raises
        self._first: dict[int, NumericalFault] = {}

    def for_another_run(self) -> "FiniteChecks":
        """The same checks with no fault recorded."""
        return FiniteChecks(raises=self._raises)

    def checked(
        self,
        value: Tensor,
        key: MicroBatchKey,
        attempted: str,
        sources: Mapping[str, Tensor],
        remedy: str,
        figures: Mapping[str, float] | None = None,
        *,
        stages_before: int = 0,
    ) -> Tensor:
        """Returns the value, or NaN in its place where something it came from is not finite.

        Args:
            value: Result that others learn from.
            key: Micro-batch of the call, which the error names after `attempted`.
            attempted: As in `require_finite`, as all that follow.
            sources: See there.
            remedy: See there.
            figures: See there.
            stages_before: As in `NumericalFault`.

        Raises:
            NonFiniteError: Something is not finite, and this role raises.
        """
        place = f"iteration {key.iteration}, micro-batch {key.micro_batch} ({key.purpose})"
        try:
            require_finite(f"{attempted} in {place}", sources, remedy, figures)
        except NonFiniteError as error:
            if self._raises:
                raise
            fault = NumericalFault(
                key.micro_batch, stages_before, error.attempted, error.found, error.remedy
            )
            self._first.setdefault(key.iteration, fault)
            # Times NaN and not filled with it: a loss keeps its graph, so every rank gathers.
            return value * float("nan")
        return value

    def diagnose(self, iteration: int, network: nn.Module) -> Diagnosis:
        """Reports an iteration, and forgets it and earlier ones.

        Args:
            iteration: The iteration.
            network: Network of the role; of a sharded one the parts of this rank are looked at.
        """
        fault = self._first.get(iteration)
        self._first = {key: value for key, value in self._first.items() if key > iteration}
        return Diagnosis(fault, broken_weight(network))


@torch.no_grad()
def broken_weight(network: nn.Module) -> str | None:
    """Name of the first parameter that is not finite, on this rank; None where all are finite."""
    return broken_tensor(network.named_parameters())


@torch.no_grad()
def broken_tensor(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor that is not finite, on this rank; None where all are finite.

    Args:
        tensors: Names and tensors; of a sharded one the part of this rank is looked at.
    """
    for name, value in tensors:
        own = value.to_local() if isinstance(value, DTensor) else value
        # Weights in 8 bits have no sums of their own.
        own = own.float() if own.element_size() == 1 else own
        if not _is_finite(own):
            return name
    return None


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
