"""The command line: `sgmd`, or `python -m pipelines.cli`, which needs no installation.

Heavy imports stand inside the commands, so that `--help` is there at once.

    exit code 0   done
              1   a run failed on the way, something necessary is missing (doctor), or a set of
                  shards is not usable (check)
              2   the request was wrong: a setting, a folder, a shard
              130 or 143   a run was stopped by Ctrl-C or SIGTERM, after its state was saved
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from cluster.errors import ClusterError
from pipelines.commands import (
    bench,
    comparing,
    data,
    machine,
    planning,
    recipes,
    results,
    runs,
)
from pipelines.commands.output import show_error
from sgmd_core.errors import (
    AlarmError,
    NonFiniteError,
    SgmdError,
    StaleCallError,
    StopRequestedError,
)

_RUN_FAILURES = (AlarmError, ClusterError, NonFiniteError, StaleCallError)


class _TeachingGroup(TyperGroup):
    """Shows our errors in words; `--debug` lets the traceback through."""

    # Typer brings click along, from 0.2x on as a part of itself, so the context has two names.
    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        try:
            return super().invoke(ctx)
        except SgmdError as error:
            if ctx.params["debug"]:
                raise
            show_error(error)
            if isinstance(error, StopRequestedError):
                raise typer.Exit(error.exit_code) from None
            raise typer.Exit(1 if isinstance(error, _RUN_FAILURES) else 2) from None


app = typer.Typer(
    name="sgmd",
    cls=_TeachingGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turns a many-step text-to-video diffusion model into a four-step one, on Ray.",
)
for command in (
    machine.doctor,
    runs.shapes,
    data.prepare,
    data.check,
    data.encode,
    runs.pretrain,
    runs.distill,
    runs.sweep,
    comparing.study,
    runs.submit,
    planning.plan,
    bench.bench,
    results.evaluate,
    results.generate,
    results.report,
    results.ledger,
):
    app.command()(command)
app.add_typer(recipes.app, name="recipes")


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"sgmd {version('sgmd')}")
        except PackageNotFoundError:
            typer.echo("sgmd, run from its source tree")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of all commands."""


def main() -> None:
    """Runs the command line."""
    app()


if __name__ == "__main__":
    main()
