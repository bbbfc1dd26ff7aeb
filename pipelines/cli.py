"""The command line: `sgmd`, or `python -m pipelines.cli`, which needs no installation.

Heavy imports stand inside the commands, so that `--help` is there at once. Exit codes and what is
shown of errors: `pipelines.commands.failures`.
"""

import os
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from pipelines.commands import (
    bench,
    comparing,
    data,
    exporting,
    machine,
    planning,
    recipes,
    results,
    runs,
    submitting,
    sweeping,
)
from pipelines.commands.failures import report_failure
from pipelines.commands.options import PlainCommand, PlainGroup, RemoteCommand
from pipelines.commands.stops import (
    CommandStops,
    hold_messages,
    hold_standard_files,
    leave_process,
    take_stops,
)

# Typer brings click along, from 0.2x on as a part of itself, so its base of wrong options has two
# names. A closed pipe is click's to end in silence.
_CLICK_ERROR: type[BaseException] = typer.BadParameter.mro()[2]
_NOT_OURS: tuple[type[BaseException], ...] = (
    typer.Exit,
    typer.Abort,
    BrokenPipeError,
    _CLICK_ERROR,
)


class _TeachingGroup(PlainGroup):
    """Shows errors in words; `--debug` lets the traceback through."""

    def make_context(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401
        try:
            return super().make_context(*args, **options)
        except BrokenPipeError:
            raise
        except OSError as error:
            # Of help and version, which are shown before a command begins.
            shown = sys.argv[1] if sys.argv[1:] else "--help"
            raise typer.Exit(report_failure(error, shown, sys.argv[1:])) from None

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        stops: CommandStops = ctx.obj or CommandStops()
        stops.is_working = True
        try:
            return super().invoke(ctx)
        except _NOT_OURS:
            raise
        except (Exception, KeyboardInterrupt) as error:
            if ctx.params["debug"]:
                if not stops.received:
                    raise
                traceback.print_exception(error)
            command = ctx.invoked_subcommand or ""
            code = report_failure(error, command, sys.argv[1:], stops.received)
            raise typer.Exit(code) from None
        finally:
            stops.is_working = False


app = typer.Typer(
    name="sgmd",
    cls=_TeachingGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turns a many-step text-to-video diffusion model into a four-step one, on Ray.",
)
_COMMANDS = {
    "doctor": machine.doctor_command,
    "shapes": runs.shapes_command,
    "prepare": data.prepare_command,
    "check": data.check_command,
    "encode": data.encode_command,
    "pretrain": runs.pretrain_command,
    "distill": runs.distill_command,
    "sweep": sweeping.sweep_command,
    "study": comparing.study_command,
    "submit": submitting.submit_command,
    "plan": planning.plan_command,
    "bench": bench.bench_command,
    "evaluate": results.evaluate_command,
    "generate": results.generate_command,
    "export": exporting.export_command,
    "experts": exporting.experts_command,
    "transition": exporting.transition_command,
    "report": results.report_command,
    "ledger": results.ledger_command,
    "import": exporting.import_command,
}
for name, command in _COMMANDS.items():
    app.command(name, cls=RemoteCommand if name == "submit" else PlainCommand)(command)
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
    hold_standard_files()
    hold_messages()
    if os.environ.get("COLUMNS") == "0":
        del os.environ["COLUMNS"]  # Rich would print nothing in this width.
    stops = take_stops()
    try:
        app(obj=stops)
    except SystemExit as end:
        words = end.code if isinstance(end.code, str) else ""
        if words:
            # As Python shows them, where a library ends the process with words.
            typer.echo(words, err=True)
        stops.exit_code = end.code if isinstance(end.code, int) else int(bool(words))
        leave_process(stops.exit_code, is_whole=not stops.received)


if __name__ == "__main__":
    main()
