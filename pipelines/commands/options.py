"""Arguments that several commands share."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe that ships, or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings, such as objective.lambda_nr=0.05"),
]


class PlainCommand(TyperCommand):
    """A command whose flags are shown without a type: they take no value."""

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
