"""Types and shapes are still checked when a check like it was made before."""

import inspect
from collections.abc import Iterator, Mapping, ValuesView
from dataclasses import dataclass
from importlib import import_module
from pkgutil import walk_packages
from types import MappingProxyType
from typing import Any, Literal

import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeException
from jaxtyping import Float
from torch import Tensor

import sgmd_core
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


def test_lengths_and_literals_that_are_about_numbers_are_checked_at_each_call():
    @remembering(typechecker=beartype)
    def levels(num_steps: int) -> Float[Tensor, " {num_steps}+1"]:
        return torch.ones(5)

    @remembering(typechecker=beartype)
    def one_or_two(number: tuple[Literal[1, 2], ...]) -> None:
        return None

    levels(4)
    one_or_two((2,))
    for _ in range(2):
        with pytest.raises(Exception, match="return value"):
            levels(5)
        with pytest.raises(Exception, match="number"):
            one_or_two((7,))


LARGE = [*[1.0] * 19, "text"]


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ([1.0] * 20, LARGE),
        ({place: 1.0 for place in range(20)}, dict(reversed([*enumerate(LARGE)]))),
        (MappingProxyType({"name": 1.0}), MappingProxyType({"name": "text"})),
        ({"name": 1.0}.values(), {"name": "text"}.values()),
        ([1.0, 2.0], [1.0, "text"]),
        ({"a": 1.0, "b": 2.0}, {"b": "text", "a": 1.0}),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("is_result", [False, True])
def test_containers_of_which_an_entry_may_be_wrong_are_checked_at_each_call(good, bad, is_result):
    """Beartype looks at one entry, by chance: it finds the wrong one of twenty in 500 calls."""

    @remembering(typechecker=beartype)
    def taken(value: Mapping[Any, float] | list[float] | ValuesView[float]) -> None:
        return None

    @remembering(typechecker=beartype)
    def given(value: Any) -> Mapping[Any, float] | list[float] | ValuesView[float]:
        return told[0]

    told = [good]

    def call(value: Any, times: int) -> None:
        told[0] = value
        for _ in range(times):
            given(None) if is_result else taken(value)

    call(good, 2)
    with pytest.raises(Exception, match="return value" if is_result else "value"):
        call(bad, 500)


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


def functions_of(home: Any) -> Iterator[Any]:
    """Functions that a module or a class defines itself, and those of its classes."""
    module = home.__name__ if inspect.ismodule(home) else home.__module__
    for value in vars(home).values():
        found = getattr(value, "fget", None) or inspect.unwrap(getattr(value, "__func__", value))
        if getattr(found, "__module__", None) != module:
            continue
        if inspect.isclass(found) and inspect.ismodule(home):
            yield from functions_of(found)
        elif inspect.isfunction(found):
            yield inspect.unwrap(found)


def test_annotations_of_functions_that_no_test_calls_can_be_checked():
    with pytest.raises(BeartypeException):
        beartype(lambda_of(3))
    modules = [import_module(each.name) for each in walk_packages(sgmd_core.__path__, "sgmd_core.")]
    functions = [function for module in modules for function in functions_of(module)]
    assert len(functions) > 400
    for function in functions:
        beartype(function)


def lambda_of(hint: Any) -> Any:
    """A function with an annotation."""

    def function(value):
        return value

    function.__annotations__["value"] = hint
    return function
