"""Options of a command: taken as records, and paths in a home."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from pipelines.commands.options import OptionGroup, PlainCommand, RemoteCommand, expand_groups


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


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (PlainCommand, ("/home/me/set", "/home/me", "/home/me/clips", "~/ is a home")),
        (RemoteCommand, ("~/set", "~", "~/clips", "~/ is a home")),
    ],
)
def test_a_path_in_a_home_is_that_of_this_user_wherever_it_stands_and_words_are_words(
    monkeypatch: pytest.MonkeyPatch, kind: type[PlainCommand], expected: tuple[str, ...]
):
    monkeypatch.setenv("HOME", "/home/me")
    taken: list[str] = []

    def command(
        target: Annotated[str, typer.Argument()],
        cache: Annotated[Path, typer.Option()] = Path("x"),
        output: Annotated[Path | None, typer.Option()] = None,
        prompt: Annotated[str, typer.Option()] = "",
    ) -> None:
        taken.extend(map(str, (target, cache, output, prompt)))

    app = typer.Typer()
    app.command("make", cls=kind)(command)
    words = ["~/set", "--cache", "~", "--output=~/clips", "--prompt", "~/ is a home"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert tuple(taken) == expected


def test_a_repeatable_option_or_argument_has_paths_in_a_home_but_for_words():
    taken: list[str] = []

    def command(
        runs: Annotated[list[Path], typer.Argument()],
        lora: Annotated[list[str] | None, typer.Option()] = None,
        negative: Annotated[list[str] | None, typer.Option()] = None,
    ) -> None:
        taken.extend(map(str, (*runs, *(lora or ()), *(negative or ()))))

    app = typer.Typer()
    app.command("make", cls=PlainCommand)(command)
    words = ["~/one", "two", "--lora=~/x.safetensors@0.5", "--lora=y", "--negative=~/ is a home"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", "/home/me")
        assert CliRunner().invoke(app, words).exit_code == 0
    home = "/home/me"
    assert taken == [f"{home}/one", "two", f"{home}/x.safetensors@0.5", "y", "~/ is a home"]
