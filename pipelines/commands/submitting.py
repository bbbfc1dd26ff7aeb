"""`sgmd submit`: a command as a job on a Ray cluster, and coming back to one."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipelines.commands import comparing, data, results, runs, sweeping
from pipelines.commands.options import Json, OptionGroup, RemoteCommand, expand_groups
from pipelines.commands.output import plain_printer, show, working
from sgmd_core.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.submitting.request import JobRequest

_CALLBACKS: dict[str, Callable[..., None]] = {
    "distill": runs.distill_command,
    "sweep": sweeping.sweep_command,
    "study": comparing.study_command,
    "pretrain": runs.pretrain_command,
    "encode": data.encode_command,
    "evaluate": results.evaluate_command,
}
_DEFAULT_ADDRESS = "http://127.0.0.1:8265"


SubmittedArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE KEY=VALUE",
        help="Arguments of the command: a recipe and settings; RUN for evaluate, SRC DST for "
        "encode. Options of the command follow --.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobArguments(OptionGroup):
    """Options of how a job is sent."""

    output_root: Annotated[
        str | None,
        typer.Option(
            envvar="SGMD_OUTPUT_ROOT",
            help="Folder or s3://bucket/prefix of the cluster at which relative outputs begin",
        ),
    ] = None
    working_dir: Annotated[
        Path | None, typer.Option(help="Source tree to send; default: this one")
    ] = None
    env: Annotated[
        list[str] | None,
        typer.Option(help="Name of an environment variable to send; may be repeated"),
    ] = None
    retries: Annotated[
        int, typer.Option(min=0, max=1000, help="Number of times to restart a failed job")
    ] = 0


@expand_groups
def submit_command(
    arguments: SubmittedArguments = None,
    *,
    command: Annotated[
        str, typer.Option(help="distill, sweep, study, pretrain, encode or evaluate")
    ] = "distill",
    address: Annotated[
        str | None,
        typer.Option(help=f"The cluster's dashboard; default: RAY_ADDRESS, or {_DEFAULT_ADDRESS}"),
    ] = None,
    sent: JobArguments,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once the cluster has accepted the job.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the end without printing what the job prints.")
    ] = False,
    follow: Annotated[
        str | None, typer.Option(metavar="JOB", help="Follow a job that was submitted before.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a command as a job on a Ray cluster: the same recipe, the same settings.

    Follows the job's log to the end and exits with its exit code. Ctrl-C leaves the job running.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or _dashboard_of_ray()
    with working() as console:
        if follow is not None:
            job_id = follow
        else:
            job_id = _submitted(console, _requested(command, arguments or []), address, sent)
        if not detach:
            _followed(address, job_id, quiet=wait)
        asks_only = detach and follow is not None
        words = _results(console, address, job_id, must_answer=asks_only)
    show({"job_id": job_id, "address": address, "results": words}, as_json, job_id, words)


def _dashboard_of_ray() -> str:
    """RAY_ADDRESS where it names a dashboard, else Ray's usual one of this machine."""
    given = os.environ.get("RAY_ADDRESS", "")
    return given if given.startswith("http") else _DEFAULT_ADDRESS


def _submitted(console: Console, request: "JobRequest", address: str, sent: JobArguments) -> str:
    from pipelines.config.model_folders import PROJECT_ROOT
    from pipelines.submitting import job

    say = plain_printer(console)
    accepted = job.submit(
        request,
        address=address,
        working_dir=sent.working_dir or PROJECT_ROOT,
        output_root=sent.output_root,
        forward=sent.env or [],
        retries=sent.retries,
        tell=say,
    )
    say(f"submitted {accepted.job_id} to {address}; come back to it with:")
    say(f"  sgmd submit --follow {accepted.job_id} --address {address}")
    return accepted.job_id


def _followed(address: str, job_id: str, *, quiet: bool) -> None:
    """Follows a job to its end; Ctrl-C ends the following alone."""
    from cluster.jobs import follow_job, wait_for_job

    try:
        if quiet:
            wait_for_job(address, job_id)
        else:
            follow_job(address, job_id, _print_as_it_is)
    except KeyboardInterrupt as stop:
        for line in (
            f"{job_id} goes on without this terminal.",
            f"  come back   sgmd submit --follow {job_id} --address {address}",
            f"  its log     ray job logs {job_id} --address {address}",
            f"  end it      ray job stop {job_id} --address {address}",
        ):
            stop.add_note(line)
        raise


def _print_as_it_is(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _results(console: Console, address: str, job_id: str, *, must_answer: bool) -> str:
    """Place of a job's results; empty if unknown: a job that is sent or done does not fail."""
    from cluster.errors import JobError
    from cluster.jobs import job_metadata
    from pipelines.submitting.job import results_words

    try:
        return results_words(job_metadata(address, job_id))
    except JobError as error:
        if must_answer:
            raise
        plain_printer(console)(f"where its results are is not known: {error.found}")
        return ""


def _requested(command: str, arguments: list[str]) -> "JobRequest":
    """The command with its arguments, read as the command itself reads them.

    Raises:
        ConfigError: There is no such command.
    """
    from pipelines.submitting.request import COMMANDS, JobRequest

    if command not in _CALLBACKS:
        expected = f"one of {', '.join(COMMANDS)}"
        raise ConfigError("submitting a job", f"--command {command}", expected, "Correct it")
    app = typer.Typer()
    app.command(command, cls=RemoteCommand)(_CALLBACKS[command])
    reader = typer.main.get_command(app)
    context = reader.make_context(f"sgmd {command}", list(arguments))
    words: list[str] = []
    options: list[str] = []
    for parameter in reader.params:
        given = context.params.get(parameter.name or "")
        source = context.get_parameter_source(parameter.name or "")
        if given is None or source is None or source.name == "DEFAULT":
            continue
        values = list(given) if isinstance(given, list | tuple) else [given]
        if parameter.param_type_name == "argument":
            words += map(_word, values)
        elif isinstance(given, bool):
            names = parameter.opts if given else parameter.secondary_opts
            options.append(names[0])
        else:
            options += [f"{parameter.opts[0]}={_word(value)}" for value in values]
    return JobRequest(command, tuple(words), tuple(options))


def _word(value: object) -> str:
    return str(getattr(value, "value", value))
