"""Checks of types and shapes in `sgmd_core`, each made once: the tests call it two million times.

With the option `--jaxtyping-packages` every function of `sgmd_core` is decorated by
`jaxtyping.jaxtyped`, which asks beartype at each call. Mostly the answer depends on types, dtypes
and shapes alone, of arguments and result together, and is then remembered for as long as the
process lives. Checked in full at each call is all the rest:

* a combination that has not been seen, or that was refused;
* functions whose annotations are about values: lengths in braces, literals that are not text;
* containers that are large or not built in, and those with entries of several kinds, of which
  beartype looks at one by chance.
"""

import dataclasses
import inspect
import threading
import types
from collections.abc import Callable, Collection, Hashable
from enum import Enum
from functools import cache, wraps
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import jaxtyping

_MOST = 16
"""Entries of a container that are read; checks of larger ones are not remembered."""

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
    if inspect.isgeneratorfunction(function) or _is_about_values(function):
        return _check_always(function, typechecker=typechecker)
    results: dict[Hashable, set[Hashable]] = {}

    # Not before the first call: a process of tests imports four hundred functions and calls some.
    @cache
    def checked() -> Callable[..., Any]:
        return _check_always(function, typechecker=typechecker)

    @cache
    def result_check() -> Callable[..., Any]:
        return _check_always(_standing_for(function), typechecker=typechecker)

    @wraps(function)
    def remembered(*arguments: Any, **named: Any) -> Any:
        try:
            asked = (*map(_kind, arguments), *((name, _kind(each)) for name, each in named.items()))
        except _OpenError:
            return checked()(*arguments, **named)
        seen = results.get(asked)
        if seen is None:
            result = checked()(*arguments, **named)
            results.setdefault(asked, set()).update(_kinds(result))
            return result
        result = function(*arguments, **named)
        kinds = _kinds(result)
        if not kinds or not kinds <= seen:
            _OF_THREAD.result = result
            try:
                result_check()(*arguments, **named)
            finally:
                _OF_THREAD.result = None
            seen |= kinds
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


def _is_about_values(annotated: Any) -> bool:
    """True if a check by these annotations may depend on more than kinds."""
    if isinstance(annotated, types.FunctionType):
        return any(map(_is_about_values, annotated.__annotations__.values()))
    if isinstance(annotated, str):  # Read at the first call only.
        return "{" in annotated or "Literal" in annotated
    if isinstance(annotated, TypeVar):
        return any(map(_is_about_values, (annotated.__bound__, *annotated.__constraints__)))
    if get_origin(annotated) is Literal:
        return not all(isinstance(each, str | Enum | None) for each in get_args(annotated))
    if get_origin(annotated) is Annotated or "{" in getattr(annotated, "dim_str", ""):
        return True
    if isinstance(annotated, list):  # The arguments of a Callable.
        return any(map(_is_about_values, annotated))
    return any(map(_is_about_values, get_args(annotated)))


class _OpenError(Exception):
    """A check of a value depends on more than its kind."""


def _kinds(value: Any) -> set[Hashable]:
    """The kind of a value; none where it does not decide the check."""
    try:
        return {_kind(value)}
    except _OpenError:
        return set()


def _kind(value: Any) -> Hashable:
    """All of a value that its check depends on.

    Raises:
        _OpenError: It depends on more.
    """
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
        return lambda value: (kind, _same(value), _same(value.values()))
    if issubclass(kind, tuple | list | set | frozenset):
        return lambda value: (kind, len(value), _same(value))
    if issubclass(kind, Collection):
        return _refused
    return None


def _same(entries: Collection[Any]) -> tuple[Hashable, ...]:
    """The kinds of entries that differ in their text at most."""
    if len(entries) > _MOST:
        raise _OpenError
    kinds = (*map(_kind, entries),)
    if (
        len(
            {
                str if isinstance(each, str) else kind
                for each, kind in zip(entries, kinds, strict=True)
            }
        )
        > 1
    ):
        raise _OpenError
    return kinds


def _refused(value: Any) -> Hashable:
    raise _OpenError
