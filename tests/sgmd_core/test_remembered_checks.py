"""Types and shapes are still checked when a check like it was made before."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import Float
from torch import Tensor

from sgmd_core.seeds import random_generator
from sgmd_core.types import per_sample
from tests.helpers import remembered_checks
from tests.helpers.remembered_checks import remembering


@remembering(typechecker=beartype)
def product(left: Float[Tensor, "a b"], right: Float[Tensor, "b c"]) -> Float[Tensor, "a c"]:
    return left @ right


@remembering(typechecker=beartype)
def as_told(told: Any, value: Float[Tensor, " n"] | float) -> Float[Tensor, " n"]:
    return told[0]


@remembering(typechecker=beartype)
@dataclass(frozen=True)
class Pair:
    left: Float[Tensor, " n"]
    right: Float[Tensor, " n"]
    name: str = ""


def test_a_wrong_shape_is_refused_before_and_after_a_right_one():
    for _ in range(2):
        with pytest.raises(Exception, match="b c"):
            product(torch.ones(2, 3), torch.ones(4, 5))
        for _ in range(3):
            assert torch.equal(product(torch.ones(2, 3), torch.ones(3, 5)), torch.full((2, 5), 3.0))


def test_a_type_or_a_name_that_was_not_seen_is_checked():
    product(torch.ones(2, 2), torch.ones(2, 2))
    for right in (torch.ones(2, 2, dtype=torch.int64), [[1.0]], None):
        with pytest.raises(Exception, match="right"):
            product(torch.ones(2, 2), right)
        with pytest.raises(Exception, match="right"):
            product(torch.ones(2, 2), right=right)


def test_a_result_is_checked_also_where_the_arguments_were_seen():
    told: list[Any] = [torch.ones(3)]
    for _ in range(2):
        assert as_told(told, torch.zeros(3)) is told[0]
    opaque = type("Told", (), {"__getitem__": lambda self, place: told[0]})()
    assert as_told(opaque, torch.zeros(3)) is told[0]
    for wrong in (torch.ones(4), torch.ones(3, 1), "text", None):
        told[0] = wrong
        for _ in range(2):
            with pytest.raises(Exception, match="return value"):
                as_told(opaque, torch.zeros(3))
    told[0] = torch.ones(4)
    assert as_told(opaque, torch.zeros(4)) is told[0]


def test_a_record_is_checked_when_it_is_made():
    for _ in range(2):
        assert Pair(torch.ones(2), torch.ones(2)).name == ""
        with pytest.raises(Exception, match="right"):
            Pair(torch.ones(2), torch.ones(3))
        with pytest.raises(Exception, match="name"):
            Pair(torch.ones(2), torch.ones(2), 1)


def test_an_answer_that_was_remembered_asks_nobody(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def counting(checked: Any) -> Any:
        def count(*arguments: Any, **named: Any) -> Any:
            asked.append(checked.__name__)
            return checked(*arguments, **named)

        return count

    @remembering(typechecker=counting)
    def double(value: float) -> float:
        return 2 * value

    assert [double(value) for value in (1.0, 2.0, 3.0)] == [2.0, 4.0, 6.0]
    once = len(asked)
    assert once > 0
    double(4.0)
    assert len(asked) == once
    double(4)
    assert len(asked) > once


def test_the_functions_of_the_core_are_checked_by_it(request: pytest.FixtureRequest):
    if not request.config.getoption("jaxtyping_packages"):
        pytest.skip("runs with --jaxtyping-packages only")
    for function in (per_sample, random_generator):
        assert function.__code__.co_filename == remembered_checks.__file__
        with pytest.raises(Exception, match="Type-check error"):
            function(None, None)
