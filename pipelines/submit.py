"""Runs a command of ours as a Ray job: `sgmd submit RECIPE --address http://head:8265`.

The working directory travels with the job, without runs, data and virtual environments, and the
command runs there as `python -m pipelines.cli`; so the cluster needs our dependencies, not us.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel

from cluster.files import kind_of_path
from cluster.jobs import follow_job, forwarded_environment, submit_job
from pipelines.config.model_folders import PROJECT_ROOT
from pipelines.config.recipe import DistillConfig
from pipelines.config.recipe_files import find_recipe, load, recipe_sections, shipped_recipes
from pipelines.pretraining.config import PretrainConfig
from pipelines.run.folder import REVISION_VARIABLE, git_revision, require_lasting_folder
from sgmd_core.errors import ConfigError

_COMMANDS: dict[str, type[BaseModel] | None] = {
    "distill": DistillConfig,
    "sweep": DistillConfig,
    "study": DistillConfig,
    "pretrain": PretrainConfig,
    "evaluate": None,
}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def submit(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    address: str,
    working_dir: Path = PROJECT_ROOT,
    command: str = "distill",
    forward: Sequence[str] = (),
    follow: bool = True,
    on_log: Callable[[str], None] = lambda text: None,
) -> str:
    """Submits a run and follows what it prints.

    Args:
        recipe: Name of a recipe that ships, or path of one inside the working directory.
        overrides: `a.b=c`, or options of the command such as --resume.
        address: The cluster's dashboard.
        working_dir: The source tree that travels.
        command: Which command runs there: distill, sweep, evaluate, ...
        forward: Environment variables to send along besides those without secrets.
        follow: Wait for the end; otherwise return once the job is accepted.
        on_log: Called with what the job prints.

    Returns:
        The job's id.

    Raises:
        ConfigError: The recipe would not travel with the job, or the command, its settings, the
            address, the working directory or a variable is wrong; asked before the cluster is.
        JobError: The cluster cannot be reached or refuses the job, or the job failed.
    """
    portable = _portable(recipe, working_dir)
    _require_request(address, working_dir, command, forward)
    _require_settings(recipe, overrides, command)
    if command != "evaluate":
        _require_absolute_output(recipe, overrides)
    argv = ["python", "-m", "pipelines.cli", command, portable, *overrides]
    variables = forwarded_environment(forward) | {REVISION_VARIABLE: git_revision()}
    job = submit_job(address, argv, working_dir, variables)
    if follow:
        follow_job(address, job, on_log)
    return job


def _require_request(address: str, working_dir: Path, command: str, forward: Sequence[str]) -> None:
    """Checks what can be checked here, before anything is sent."""
    if command not in _COMMANDS:
        expected = f"one of {', '.join(_COMMANDS)}"
        raise ConfigError("submitting a job", f"--command {command}", expected, "Correct it")
    if urlsplit(address).scheme not in ("http", "https", "ray"):
        raise ConfigError(
            "submitting a job",
            f"--address {address}",
            "the URL of a dashboard, such as http://127.0.0.1:8265",
            "`ray start --head --dashboard-host=...` prints it",
        )
    if not (working_dir / "pipelines" / "cli.py").is_file():
        kind = kind_of_path(working_dir)
        found = "no pipelines/cli.py in it" if kind == "a folder" else kind or "no such folder"
        raise ConfigError(
            f"submitting the folder {working_dir}",
            found,
            "a source tree of sgmd, which runs on the cluster",
            "Correct --working-dir, or leave it out to send this one",
        )
    wrong = [name for name in forward if not _VARIABLE.fullmatch(name)]
    if wrong:
        raise ConfigError(
            "submitting a job",
            f"--env {wrong[0].partition('=')[0]}, with more than a name"
            if "=" in wrong[0]
            else f"--env {wrong[0]}",
            "the name of a variable that is set here",
            "Export the variable, then give its name alone",
        )


def _require_settings(recipe: str, overrides: Sequence[str], command: str) -> None:
    """Reads the recipe with its settings as the job will; options of the command pass by."""
    kind = _COMMANDS[command]
    if kind is None:
        return
    after_option = any(value.startswith("-") for value in overrides)
    settings = [
        value
        for value in overrides
        if not value.startswith("-") and ("=" in value or not after_option)
    ]
    load(kind, recipe, settings)


def _require_absolute_output(recipe: str, overrides: Sequence[str]) -> None:
    """Refuses an output that would lie in the job's package, which Ray deletes with the job."""
    given = [value.partition("=")[2] for value in overrides if value.startswith("output=")]
    written = given[-1:] or [_output_of(recipe)]
    for output in written:
        require_lasting_folder(output, "output")
        if not Path(output).is_absolute() and "--resume" not in overrides:
            raise ConfigError(
                f"submitting {recipe}",
                f"output is {output!r}, which would lie in the job's package and go with the job",
                "an absolute path on a disk that every node of the cluster reaches",
                f"Add it: sgmd submit {recipe} ... output=/mnt/runs",
            )


def _output_of(recipe: str) -> str:
    """The recipe's output; recipes of other commands have one of their own kind."""
    return str(recipe_sections(find_recipe(recipe), DistillConfig).get("output", "runs"))


def _portable(recipe: str, working_dir: Path) -> str:
    """The recipe as the job will find it."""
    if recipe in {shipped.name for shipped in shipped_recipes()}:
        return recipe
    path = find_recipe(recipe).resolve()
    if not path.is_relative_to(working_dir.resolve()):
        raise ConfigError(
            f"submitting the recipe {recipe}",
            f"it is at {path}, outside of {working_dir}",
            "a recipe inside the folder that travels with the job",
            "Copy it there, or choose another --working-dir",
        )
    return str(path.relative_to(working_dir.resolve()))
