"""Checks of types and shapes in `sgmd_core`, each made once: the tests call it two million times.

With the option `--jaxtyping-packages` every function of `sgmd_core` is decorated by
`jaxtyping.jaxtyped`, which asks beartype at each call. What it answers depends on types, dtypes and
shapes alone, of arguments and result together, so an answer is remembered for as long as the
process lives. A combination that has not been seen is checked in full, and so is each one again
that was refused.
"""

import dataclasses
import inspect
import threading
import types
from collections.abc import Callable, Hashable
from enum import Enum
from functools import cache, wraps
from typing import Any

import jaxtyping

_MOST = 16
"""Entries of a container that are told apart; beartype itself looks at one of a list."""

_check_always = jaxtyping.jaxtyped


def remember_checks() -> None:
    """Takes the place of jaxtyping's decorator in modules that are imported from now on."""
    jaxtyping.jaxtyped = remembering


def remembering(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """As `jaxtyping.jaxtyped`, for the functions and classes that its import hook decorates.

    Args:
        typechecker: What checks a function, such as `beartype.beartype`.
    """

    def decorate(decorated: Any) -> Any:
        if not inspect.isclass(decorated):
            return _remembered(decorated, typechecker)
        if dataclasses.is_dataclass(decorated) and "__init__" in vars(decorated):
            decorated.__init__ = _remembered(decorated.__init__, typechecker)
        return decorated

    return decorate


def _remembered(function: Callable[..., Any], typechecker: Callable[..., Any]) -> Any:
    checked = _check_always(function, typechecker=typechecker)
    if inspect.isgeneratorfunction(function):
        return checked
    results: dict[Hashable, set[Hashable]] = {}

    @cache
    def result_check() -> Callable[..., Any]:
        return _check_always(_standing_for(function), typechecker=typechecker)

    @wraps(function)
    def remembered(*arguments: Any, **named: Any) -> Any:
        asked = (*map(_kind, arguments), *((name, _kind(value)) for name, value in named.items()))
        seen = results.get(asked)
        if seen is None:
            result = checked(*arguments, **named)
            results.setdefault(asked, set()).add(_kind(result))
            return result
        result = function(*arguments, **named)
        kind = _kind(result)
        if kind not in seen:
            _OF_THREAD.result = result
            try:
                result_check()(*arguments, **named)
            finally:
                _OF_THREAD.result = None
            seen.add(kind)
        return result

    return remembered


_OF_THREAD = threading.local()


def _standing_for(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the same signature that returns what the thread has put aside."""

    def stand_in(*arguments: Any, _aside: Any = _OF_THREAD, **named: Any) -> Any:
        return _aside.result

    # Its annotations are read among the names of the function's own module.
    copy = types.FunctionType(stand_in.__code__, function.__globals__)  # type: ignore[attr-defined]
    copy.__kwdefaults__ = stand_in.__kwdefaults__
    return wraps(function)(copy)


def _kind(value: Any) -> Hashable:
    """All of a value that its check depends on."""
    found = _READERS.get(type(value), _UNKNOWN)
    if found is _UNKNOWN:
        found = _READERS[type(value)] = _reader(type(value))
    return type(value) if found is None else found(value)


_UNKNOWN: Any = object()
_READERS: dict[type, Callable[[Any], Hashable] | None] = {}


def _reader(kind: type) -> Callable[[Any], Hashable] | None:
    """Reads what tells values of a type apart; None where the type says it all.

    An object's own entries are checked where it is made.
    """
    # Not before variables that torch reads are set.
    import numpy as np
    from torch import Tensor

    if issubclass(kind, Tensor | np.ndarray):
        return lambda value: (kind, value.dtype, *value.shape)
    if issubclass(kind, str | Enum | type):
        return lambda value: (kind, value)
    if issubclass(kind, dict):
        return lambda value: (
            kind,
            len(value),
            *((_kind(name), _kind(entry)) for name, entry in [*value.items()][:_MOST]),
        )
    if issubclass(kind, tuple | list | set | frozenset):
        return lambda value: (kind, len(value), *map(_kind, [*value][:_MOST]))
    return None
