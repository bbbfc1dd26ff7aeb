"""Runs a command of ours as a Ray job: `sgmd submit RECIPE --address http://head:8265`.

The working directory travels with the job, without runs, data and virtual environments, and the
command runs there as `python -m pipelines.cli`; so the cluster needs our dependencies, not us.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.jobs import follow_job, forwarded_environment, submit_job
from pipelines.config.overrides import read_yaml
from pipelines.config.recipe import PROJECT_ROOT
from pipelines.config.recipe_files import find_recipe, shipped_recipes
from pipelines.run.folder import REVISION_VARIABLE, git_revision, require_lasting_folder
from sgmd_core.errors import ConfigError


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
        ConfigError: The recipe would not travel with the job.
        JobError: The cluster cannot be reached or refuses the job, or the job failed.
    """
    portable = _portable(recipe, working_dir)
    if command != "evaluate":
        _require_absolute_output(recipe, overrides)
    argv = ["python", "-m", "pipelines.cli", command, portable, *overrides]
    variables = forwarded_environment(forward) | {REVISION_VARIABLE: git_revision()}
    job = submit_job(address, argv, working_dir, variables)
    if follow:
        follow_job(address, job, on_log)
    return job


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
    content = read_yaml(find_recipe(recipe).read_text(encoding="utf-8"))
    return str(content.get("output", "runs")) if isinstance(content, dict) else "runs"


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
