"""Request of a job: a command, its arguments, and the files of this machine that it needs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from cluster.paths import kind_of_path
from sgmd_core.errors import ConfigError

COMMANDS = ("distill", "sweep", "study", "pretrain", "encode", "evaluate")
"""Commands that can be a job."""

TRAVELLING = PurePosixPath("submitted")
"""Folder of the package for files that lie elsewhere on this machine."""

RESUMED_BY: dict[str, tuple[str, ...]] = {
    "distill": ("--resume", "auto"),
    "sweep": ("--resume-auto",),
}
"""Options by which a command goes on where it was; the others do by themselves."""

_MOST_BYTES = 480 * 2**20
"""Of all files together: Ray takes packages below 512 MiB, not compressed, the source tree too."""
_LEASE_PAUSE_S = 75
"""By then the lease of a killed process on a folder in an object store has run out."""


@dataclass(frozen=True, slots=True)
class TravellingFile:
    """A file of this machine that goes along with a job.

    Attributes:
        source: Where it is here.
        content: Its bytes.
    """

    source: str
    content: bytes


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A command as it is to run on the cluster.

    Attributes:
        command: Its name.
        arguments: Its positional arguments: a recipe and settings, a run, or two folders.
        options: Its options, each one word: `--name=value` or `--flag`.
        results: Where its results will be: a run's folder or a set; empty where that is not known.
        files: Files of this machine that it needs, by their paths in the package.
    """

    command: str
    arguments: tuple[str, ...]
    options: tuple[str, ...] = ()
    results: str = ""
    files: dict[str, TravellingFile] = field(default_factory=dict)

    def argv(self, retries: int = 0) -> list[str]:
        """The job's command line.

        Args:
            retries: Times that it is run again where it fails.
        """
        own = [self.command, *self.arguments, *self.options]
        around = [f"--retries={retries}"] if retries else []
        if retries and "://" in self.results:
            around.append(f"--pause={_LEASE_PAUSE_S}")
        if self.command == "distill" and self.results:
            around.append(f"--report={self.results}")
        if not around:
            return ["python", "-m", "pipelines.cli", *own]
        return ["python", "-m", "pipelines.submitting.in_job", *around, "--", *own]

    def with_file(self, file: TravellingFile, what: str) -> "tuple[JobRequest, str]":
        """The request with one more file to take along, and the file's path in the package.

        Args:
            file: The file.
            what: What it is for; the name of its folder.

        Raises:
            ConfigError: All files together do not fit into a package.
        """
        inside = str(TRAVELLING / what / Path(file.source).name)
        files = {**self.files, inside: file}
        total = sum(len(each.content) for each in files.values())
        if total > _MOST_BYTES:
            largest = max(files.values(), key=lambda each: len(each.content))
            raise ConfigError(
                f"sending files along with {self.command}",
                f"the first {len(files)} have {total / 2**20:.0f} MiB together, the largest, "
                f"{largest.source}, {len(largest.content) / 2**20:.0f}",
                f"at most {_MOST_BYTES // 2**20} MiB in a job's package",
                "Put them into a folder that the cluster has, or at s3://, and name them there",
            )
        return replace(self, files=files), inside

    def with_setting(self, key: str, value: str) -> "JobRequest":
        """The request with another value of a setting of its recipe."""
        others = [each for each in self.arguments[1:] if each.partition("=")[0].strip() != key]
        return replace(self, arguments=(*self.arguments[:1], *others, f"{key}={value}"))

    def option(self, name: str) -> str:
        """Value of an option; empty where it is not given."""
        values = [each.partition("=")[2] for each in self.options if each.startswith(f"{name}=")]
        return values[-1] if values else ""

    def with_option(self, name: str, value: str) -> "JobRequest":
        """The request with another value of an option."""
        others = [each for each in self.options if not each.startswith(f"{name}=")]
        return replace(self, options=(*others, f"{name}={value}"))

    @property
    def settings(self) -> tuple[str, ...]:
        """The `KEY=VALUE` arguments after the recipe, as they were given."""
        return self.arguments[1:]


def is_lasting(path: str) -> bool:
    """Returns True for a path or address that means the same place in every folder."""
    return "://" in path or Path(path).expanduser().is_absolute()


def rooted(path: str, root: str | None) -> str:
    """A path as seen from a folder of the cluster; one that is absolute stays."""
    if root is None or is_lasting(path):
        return path
    return f"{root.rstrip('/')}/{PurePosixPath(path)}"


def require_request(address: str, working_dir: Path, command: str, forward: Sequence[str]) -> None:
    """Checks what needs no recipe, before anything is sent.

    Raises:
        ConfigError: The command, the address, the source tree or a variable is wrong.
    """
    if command not in COMMANDS:
        expected = f"one of {', '.join(COMMANDS)}"
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
    wrong = [name for name in forward if not name.isidentifier()]
    if wrong:
        raise ConfigError(
            "submitting a job",
            f"--env {wrong[0].partition('=')[0]}, with more than a name"
            if "=" in wrong[0]
            else f"--env {wrong[0]}",
            "the name of a variable that is set here",
            "Export the variable, then give its name alone",
        )
