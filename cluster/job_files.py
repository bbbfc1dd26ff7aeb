"""Files of a job's package: what of the working directory travels, and what stays at home."""

import logging
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from ray._private.runtime_env import packaging

# It reports every ignore file of a package.
logging.getLogger(packaging.__name__).setLevel(logging.WARNING)

SECRET_FILES = (
    ".env",
    ".env.*",
    "*.env",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.jks",
    "*.kdbx",
    "*.ovpn",
    "id_rsa*",
    "id_ecdsa*",
    "id_ed25519*",
    ".netrc",
    "_netrc",
    ".npmrc",
    ".pypirc",
    ".git-credentials",
    ".htpasswd",
    ".aws/",
    ".azure/",
    ".ssh/",
    ".gnupg/",
    ".kube/",
    ".docker/",
    ".config/gcloud/",
    "*credentials*.json",
    "*service-account*.json",
    "*service_account*.json",
    "secrets/",
    "secrets.*",
)
"""Names of files that hold keys or passwords; a job never takes them along."""

EXCLUDED = (
    ".git/",
    ".venv/",
    "/runs/",
    "/data/",
    "/models/",
    "/wandb/",
    "/site/",
    "__pycache__/",
    "*.egg-info/",
    *SECRET_FILES,
)
"""Patterns of files that stay at home, besides those of .gitignore and .rayignore.

A leading slash means the folder on top alone: a package may have a `data` of its own.
"""


def stays_at_home(path: PurePosixPath) -> bool:
    """Returns True if a file or folder of the working directory is not uploaded.

    Args:
        path: Its path there.
    """
    for pattern in EXCLUDED:
        name = pattern.strip("/")
        parts = path.parts[:1] if pattern.startswith("/") else path.parts
        if any(fnmatchcase(part, name) for part in parts):
            return True
    return False


def is_ignored(working_dir: Path, path: PurePosixPath) -> bool:
    """Returns True if an ignore file of the working directory keeps a path at home.

    Args:
        working_dir: What is uploaded.
        path: A path in it.
    """
    folders = [working_dir.joinpath(*path.parts[:count]) for count in range(len(path.parts) + 1)]
    # A pattern that leaves out a folder leaves out all that is in it.
    return any(
        excludes(below)
        for number, folder in enumerate(folders[:-1])
        for excludes in packaging.get_excludes_from_ignore_files(folder, include_gitignore=True)
        for below in folders[number + 1 :]
    )
