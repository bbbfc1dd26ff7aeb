"""Versions of the code that a run is made with: packages, and the revision of the tree."""

import os
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TRACKED_PACKAGES = ("sgmd", "torch", "ray", "diffusers", "transformers", "pyarrow", "numpy")
REVISION_VARIABLE = "SGMD_GIT_REVISION"
"""Environment variable of submitted jobs: the revision of the tree that was uploaded."""


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers of a run.

    They are looked up once: what a process has imported stays, whatever is installed meanwhile.
    """
    return {name: _version_of(name) for name in TRACKED_PACKAGES}


@cache
def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def git_revision(source: Path | None = None) -> str:
    """Revision of a source tree, marked `+changes` when it has any; empty outside of git.

    A submitted job has no `.git`; `sgmd submit` sends the revision along.

    Args:
        source: A folder of the tree; None: this one, which is looked at until git answers once, as
            its modules are imported once. Changes after that, also to modules that are imported
            later, are not seen.
    """
    if REVISION_VARIABLE in os.environ:
        return os.environ[REVISION_VARIABLE]
    try:
        return _own_revision() if source is None else _revision_of(source)
    except (OSError, subprocess.SubprocessError):
        return ""


@cache  # Errors are not kept.
def _own_revision() -> str:
    return _revision_of(Path(__file__).parent)


def _revision_of(source: Path) -> str:
    revision = _git(source, "rev-parse", "HEAD")
    changes = _git(source, "status", "--porcelain", "--untracked-files=no")
    return f"{revision}+changes" if changes else revision


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
    return result.stdout.strip()
