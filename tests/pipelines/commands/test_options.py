"""Options of a command that are taken as records."""

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.testing import CliRunner

from pipelines.commands.options import OptionGroup, PlainCommand, expand_groups


@dataclass(frozen=True, kw_only=True)
class Size(OptionGroup):
    height: Annotated[int, typer.Option(min=1)] = 8
    width: Annotated[int, typer.Option("--wide")] = 16


@dataclass(frozen=True, kw_only=True)
class Clip(OptionGroup):
    name: Annotated[str, typer.Option()]
    size: Size
    loops: Annotated[bool, typer.Option("--loops")] = False


def test_a_group_stands_as_its_options_in_its_place_and_is_taken_whole():
    taken: list[object] = []

    @expand_groups
    def command(
        target: Annotated[str, typer.Argument()],
        clip: Clip,
        as_json: Annotated[bool, typer.Option("--json")] = False,
    ) -> None:
        """Make a clip."""
        taken.append((target, clip, as_json))

    app = typer.Typer()
    app.command("make", cls=PlainCommand)(command)
    names = [parameter.name for parameter in typer.main.get_command(app).params]
    assert names[:6] == ["target", "name", "height", "width", "loops", "as_json"]
    assert "Make a clip." in CliRunner().invoke(app, ["--help"]).output
    result = CliRunner().invoke(app, ["there", "--name", "a", "--wide", "4", "--json"])
    assert result.exit_code == 0
    assert taken == [("there", Clip(name="a", size=Size(height=8, width=4)), True)]
    assert CliRunner().invoke(app, ["there"]).exit_code == 2
    assert CliRunner().invoke(app, ["there", "--name", "a", "--height", "0"]).exit_code == 2
    assert len(taken) == 1
