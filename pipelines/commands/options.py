"""Arguments that several commands share."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from sgmd_core.errors import ConfigError

_MAY_BE_EMPTY = ("--negative-prompt",)
LARGEST_SEED = 2**63 - 1

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe that ships, or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings, such as objective.lambda_nr=0.05"),
]


def _require_single(settings: Sequence[str], attempted: str) -> None:
    from pipelines.config.overrides import parse_override, require_single

    require_single([parse_override(each) for each in settings], attempted)


class PlainCommand(TyperCommand):
    """A command whose flags are shown without a type: they take no value.

    An empty argument, as an unset variable of the shell leaves it, is refused: an empty path would
    be the present folder.
    """

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
        return left

    def get_params(self, ctx: Any) -> list[Any]:  # noqa: ANN401  (typer's own context)
        """Parameters, `--help` included."""
        return _without_types(super().get_params(ctx))


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
