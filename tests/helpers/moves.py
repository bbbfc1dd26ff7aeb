"""Tests of equivalence that can fail: what they test must move the numbers they compare."""

from collections.abc import Mapping

import torch
from torch import Tensor

FAR_MORE = 10.0
"""How many tolerances what is tested must move a result by."""

_ROUNDING = 1e-6
"""What a bitwise test counts as its tolerance here: float32 rounding."""


def relative_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference over the largest entry, over all tensors together."""
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in found) / largest


def assert_moves(
    expected: Mapping[str, Tensor] | Mapping[str, float],
    without: Mapping[str, Tensor] | Mapping[str, float],
    tolerance: float = 0.0,
) -> None:
    """Checks that a comparison with `expected` would notice if what is tested did nothing.

    Args:
        expected: The result that others are compared with: tensors or numbers, by name.
        without: The same result where what is tested was left out.
        tolerance: Relative difference that the comparison allows; 0 compares bits.
    """
    moved = relative_error(_tensors(without), _tensors(expected))
    least = FAR_MORE * max(tolerance, _ROUNDING)
    assert moved > least, (
        f"what is tested moves the result by {moved:.2g}, the comparison allows {tolerance:.2g}: "
        "the test could not fail"
    )


def assert_every_tensor_moves(expected: Mapping[str, Tensor], without: Mapping[str, Tensor]):
    """Checks that every single tensor was reached by what is tested."""
    still = [name for name, value in expected.items() if torch.equal(value, without[name])]
    assert not still, f"{len(still)} of {len(expected)} tensors did not move: {still[:3]}"


def _tensors(values: Mapping[str, Tensor] | Mapping[str, float]) -> dict[str, Tensor]:
    return {
        name: value.detach()
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=torch.float64)
        for name, value in values.items()
    }
