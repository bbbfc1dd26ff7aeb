"""`sgmd bench`: the benchmarks of the source tree."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pipelines.commands.options import Json
from pipelines.commands.output import show
from sgmd_core.errors import ConfigError


def bench_command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Name of the benchmark; without it, all are listed."),
    ] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARGUMENT", help="Arguments of the benchmark; options follow --"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a benchmark, or list them; each prints JSON, or writes it with -- --output FILE."""
    from pipelines.config.model_folders import PROJECT_ROOT

    found = _benchmarks(PROJECT_ROOT / "benchmarks")
    if name is None:
        table = Table(title="sgmd bench NAME -- --help", title_justify="left")
        table.add_column("name")
        table.add_column("measures", overflow="fold")
        for one, words in found.items():
            table.add_row(one, words)
        show([{"name": one, "measures": words} for one, words in found.items()], as_json, table)
        return
    if name not in found:
        raise ConfigError(
            "running a benchmark",
            f"none called {name}",
            f"one of {', '.join(found)}" if found else "the source tree, which holds them",
            "Install with `pip install -e .` from the source tree" if not found else "",
        )
    script = PROJECT_ROOT / "benchmarks" / f"{name}.py"
    ended = subprocess.run([sys.executable, str(script), *(arguments or [])], check=False)
    raise typer.Exit(ended.returncode)


def _benchmarks(folder: Path) -> dict[str, str]:
    """Returns the description of each script by its name, without helpers that cannot be run."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in text:
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found
