"""Arguments that several commands share, and records of options that a command takes whole."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import wraps
from itertools import pairwise
from pathlib import PurePath
from typing import Annotated, Any, ClassVar, cast, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from sgmd_core.errors import ConfigError

_MAY_BE_EMPTY = ("--negative-prompt",)
_NO_PATHS = ("prompt", "negative_prompt", "negative")
LARGEST_SEED = 2**63 - 1

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Name of a shipped recipe, a YAML file, or a run whose settings are used.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings of the recipe, such as output=runs"),
]


class OptionGroup:
    """Base of frozen dataclasses whose fields are options, annotated as typer wants them.

    A field may be a group itself, whose options then stand in its place.
    """

    def given(self) -> dict[str, Any]:
        """Returns the values by their names."""
        return {each.name: getattr(self, each.name) for each in fields(cast(Any, self))}


def expand_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command that has an option for each field of its parameters of `OptionGroup`.

    So typer sees single options, in the order of parameters and fields, and the command takes them
    as records.
    """
    hints = get_type_hints(command, include_extras=True)
    shown: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        shown += _options(name, hints[name], parameter.default)

    @wraps(command)
    def with_single_options(**values: Any) -> None:  # noqa: ANN401  (of as many types as options)
        command(**{name: _taken(name, hints[name], values) for name in hints if name != "return"})

    # Typer reads both.
    cast(Any, with_single_options).__signature__ = inspect.Signature(shown)
    with_single_options.__annotations__ = {each.name: each.annotation for each in shown}
    return with_single_options


def _options(name: str, hint: Any, default: Any) -> Iterator[inspect.Parameter]:  # noqa: ANN401
    """Parameters that a parameter or a field stands for."""
    if not _is_group(hint):
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint
        )
        return
    hints = get_type_hints(hint, include_extras=True)
    for each in fields(hint):
        missing = each.default is MISSING
        own = inspect.Parameter.empty if missing else each.default
        yield from _options(each.name, hints[each.name], own)


def _taken(name: str, hint: Any, values: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Value of a parameter or a field, of the single options."""
    if not _is_group(hint):
        return values[name]
    hints = get_type_hints(hint, include_extras=True)
    return hint(**{each.name: _taken(each.name, hints[each.name], values) for each in fields(hint)})


def _is_group(hint: Any) -> bool:  # noqa: ANN401
    return isinstance(hint, type) and issubclass(hint, OptionGroup)


def _require_single(settings: Sequence[str], attempted: str) -> None:
    from pipelines.config.overrides import parse_override, require_single

    require_single([parse_override(each) for each in settings], attempted)


class PlainCommand(TyperCommand):
    """A command whose flags are shown without a type: they take no value.

    An empty argument, as an unset variable of the shell leaves it, is refused: an empty path would
    be the present folder. A path that begins with `~` is one in this user's home: a shell replaces
    it alone in an argument, and leaves it in `--output=~/clips`.
    """

    is_here: ClassVar[bool] = True
    """False if paths are those of another machine, whose homes are not known."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  (typer's context)
        """Arguments as typer reads them.

        Raises:
            ConfigError: One of them is empty, or a setting is given twice.
        """
        for before, given in pairwise(["", *args]):
            option = before if before.startswith("--") else ""
            if given.startswith("--") and given.endswith("="):
                option, given = given[:-1], ""
            if not given and option not in _MAY_BE_EMPTY:
                raise ConfigError(
                    f"reading the arguments of sgmd {self.name}",
                    f"{option} is empty" if option else "an empty argument",
                    "a value",
                    "Give one, or leave it out; a variable of the shell may be unset",
                )
        left = super().parse_args(ctx, args)
        given = [ctx.params.get("recipe"), *(ctx.params.get("overrides") or ())]
        given += ctx.params.get("arguments") or ()
        settings = [each for each in given if each and "=" in each and not each.startswith("-")]
        if len(settings) > 1:
            _require_single(settings, f"reading the settings of sgmd {self.name}")
        if self.is_here:
            ctx.params |= _in_home(ctx.params)
        return left

    def get_params(self, ctx: Any) -> list[Any]:  # noqa: ANN401  (typer's own context)
        """Parameters, `--help` included."""
        return _without_types(super().get_params(ctx))


class RemoteCommand(PlainCommand):
    """As `PlainCommand`, of a command for another machine."""

    is_here = False


def _in_home(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those values that are paths in a home, with this user's written out."""
    given = {name: value for name, value in values.items() if name not in _NO_PATHS}
    if not any(_is_in_home(each) for value in given.values() for each in _each(value)):
        return {}
    from pipelines.config.recipe_files import own_home

    def written_out(value: Any) -> Any:  # noqa: ANN401  (of any option)
        return own_home(str(value)) if _is_in_home(value) else value

    return {
        name: [written_out(each) for each in value]
        if isinstance(value, list | tuple)
        else written_out(value)
        for name, value in given.items()
    }


def _each(value: Any) -> Iterable[Any]:  # noqa: ANN401  (of any option)
    """The values of an option or an argument, which may be repeatable."""
    return value if isinstance(value, list | tuple) else (value,)


def _is_in_home(value: Any) -> bool:  # noqa: ANN401  (of any option)
    return isinstance(value, str | PurePath) and str(value)[:1] == "~"


class PlainGroup(TyperGroup):
    """As `PlainCommand`, of several commands."""

    def get_params(self, ctx: Any) -> list[Any]:  # noqa: ANN401  (typer's own context)
        """Parameters, `--help` included."""
        return _without_types(super().get_params(ctx))


def _without_types(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params
