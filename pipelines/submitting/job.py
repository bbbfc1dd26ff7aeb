"""Runs a command of sgmd as a Ray job: `sgmd submit RECIPE --address http://head:8265`.

    request -> checked here, own files found -> package: source tree + files -> job -> its log

The source tree travels with the job, without runs, data, models, secrets and virtual environments;
so the cluster needs our dependencies, not us. The command runs there as `python -m pipelines.cli`.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cluster.files import write_whole
from cluster.job_files import stays_at_home
from cluster.jobs import forwarded_environment, submit_job
from pipelines.config.model_folders import PROJECT_ROOT
from pipelines.run.origin import COMMAND_VARIABLE, command_line
from pipelines.run.revision import REVISION_VARIABLE, git_revision
from pipelines.submitting.checks import Preparation
from pipelines.submitting.request import TRAVELLING, JobRequest, TravellingFile, require_request
from sgmd_core.errors import ConfigError

_RESULTS, _COMMAND = "results", "command"


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that the cluster has accepted.

    Attributes:
        job_id: Its id.
        request: Its command as it was sent.
        checked: Checks that were made here, by subject.
        left: Checks that are left to the job, by subject.
    """

    job_id: str
    request: JobRequest
    checked: Mapping[str, str]
    left: Mapping[str, str]


def submit(
    request: JobRequest,
    *,
    address: str,
    working_dir: Path = PROJECT_ROOT,
    output_root: str | None = None,
    forward: Sequence[str] = (),
    retries: int = 0,
    tell: Callable[[str], None] = lambda words: None,
) -> Submission:
    """Checks a command here, and starts it as a job.

    Args:
        request: The command.
        address: The cluster's dashboard.
        working_dir: The source tree that travels.
        output_root: Folder or address on the cluster at which relative outputs begin.
        forward: Environment variables to send along besides those without secrets.
        retries: Times that the job runs the command again where it fails.
        tell: Called with lines about the progress.

    Raises:
        ConfigError: The command, its settings, the address, the source tree or a variable is wrong;
            asked before the cluster is.
        SgmdError: Networks or data that this machine sees do not fit.
        JobError: The cluster cannot be reached or refuses the job.
    """
    require_request(address, working_dir, request.command, forward)
    variables = forwarded_environment(forward) | {
        REVISION_VARIABLE: git_revision((working_dir / "pipelines").resolve()),
        COMMAND_VARIABLE: command_line(),
    }
    tell("checking settings, model and data as far as they can be seen from here")
    preparation = Preparation(request, working_dir, output_root)
    request = preparation.prepare()
    for subject, words in preparation.checked.items():
        tell(f"  checked here      {subject}: {words}")
    for subject, words in preparation.left.items():
        tell(f"  left to the job   {subject}: {words}")
    for inside, file in request.files.items():
        tell(f"  goes along        {file.source} as {inside}")
    metadata = {_COMMAND: request.command, _RESULTS: request.results}
    with package(working_dir, request.files) as folder:
        job_id = submit_job(address, request.argv(retries), folder, variables, metadata=metadata)
    return Submission(job_id, request, preparation.checked, preparation.left)


def results_words(metadata: Mapping[str, str]) -> str:
    """Place of a job's results, from the words beside it; empty where that is not known."""
    results = metadata.get(_RESULTS, "")
    if results and metadata.get(_COMMAND) in ("distill", "sweep"):
        return f"report: {results}/report.html"
    return f"results: {results}" if results else ""


@contextmanager
def package(working_dir: Path, files: Mapping[str, TravellingFile]) -> Iterator[Path]:
    """Yields a folder that looks like the source tree, with further files in it.

    Args:
        working_dir: The source tree; the folder has links to what is in it.
        files: Written into it, by their paths there.

    Raises:
        ConfigError: The tree has a folder of the name of theirs.
    """
    if not files:
        yield working_dir
        return
    if (working_dir / TRAVELLING).exists():
        raise ConfigError(
            f"packing {working_dir}",
            f"it has a folder {TRAVELLING}",
            "no such folder: files from elsewhere are put there",
            "Rename it",
        )
    with tempfile.TemporaryDirectory(prefix="sgmd-job-") as name:
        folder = Path(name)
        for path in working_dir.resolve().iterdir():
            if not stays_at_home(PurePosixPath(path.name)):
                (folder / path.name).symlink_to(path)
        for inside, file in files.items():
            target = folder / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, file.content)
        yield folder
