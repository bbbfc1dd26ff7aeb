"""Versions of the code that a run is made with: packages, and the revision of the tree."""

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TRACKED_PACKAGES = ("sgmd", "torch", "ray", "diffusers", "transformers", "pyarrow", "numpy")
REVISION_VARIABLE = "SGMD_GIT_REVISION"
"""Environment variable of submitted jobs: the revision of the tree that was uploaded."""


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers of a run."""
    found: dict[str, str] = {}
    for name in TRACKED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_revision(source: Path = Path(__file__).parent) -> str:
    """Revision of a source tree, marked `+changes` when it has any; empty outside of git.

    A submitted job has no `.git`; `sgmd submit` sends the revision along.

    Args:
        source: A folder of the tree; by default of this one.
    """
    if REVISION_VARIABLE in os.environ:
        return os.environ[REVISION_VARIABLE]
    try:
        revision = _git(source, "rev-parse", "HEAD")
        changes = _git(source, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{revision}+changes" if changes else revision


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
    return result.stdout.strip()
