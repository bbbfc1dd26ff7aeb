"""Checks of the places that a command writes to, made before it works."""

import secrets
from pathlib import Path

from cluster.files import write_whole
from cluster.paths import real_path, require_writable
from cluster.redaction import has_user, without_secrets
from cluster.stores import open_store, opened_store, store_address
from pipelines.run.places import require_written_out
from pipelines.run.working_copy import PATIENCE
from sgmd_core.errors import ConfigError

_JOB_FOLDER = "runtime_resources/working_dir_files/"
"""Part of the path in which Ray unpacks the working directory of a job."""


def file_inside(root: Path, name: str | Path) -> Path | None:
    """Path of a regular file that lies in a folder, links resolved; None for any other.

    A run folder may come from elsewhere: `../` and links in it must not lead to other files.
    """
    try:
        path = (root / name).resolve()
        return path if path.is_relative_to(root.resolve()) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None


def require_inside(folder: Path, *names: str, option: str = "--output") -> None:
    """Checks that what a command writes into a folder stays in it.

    A run folder may come from elsewhere: a link in it must not lead the results to other files.

    Args:
        folder: The folder, where it is a path; of an address nothing is checked.
        names: What is written there.
        option: Names another place for it.

    Raises:
        ConfigError: A link leads out of the folder.
    """
    if store_address(folder):
        return
    root = real_path(folder)
    for name in names:
        found = real_path(folder / name)
        if not found.is_relative_to(root):
            raise ConfigError(
                f"writing to {folder / name}",
                f"a link that leads to {found}",
                f"a place inside {root}",
                f"Remove the link, or name another place with {option}",
            )


def require_lasting_folder(folder: str | Path, setting: str) -> None:
    """Checks that what is written to a folder outlasts this process.

    Args:
        folder: As it was given: a path or an address.
        setting: Setting or option that gave it.

    Raises:
        ConfigError: It lies in the package folder of a Ray job, is an address with a user or of a
            kind that is not known, or names a variable or a user's home.
    """
    attempted = f"writing to {without_secrets(str(folder))} ({setting})"
    require_written_out(folder, attempted)
    if address := store_address(folder):
        _require_address(address, attempted)
    elif _JOB_FOLDER in f"{Path(folder).absolute()}/":
        raise ConfigError(
            attempted,
            "a folder inside the package of this Ray job, which Ray deletes with the job",
            "an absolute path on a disk that outlasts the job, or an address",
            f"Submit again with {setting} there: s3://bucket/runs, or /mnt/runs on a shared disk",
        )


def _require_address(address: str, attempted: str) -> None:
    if has_user(address):
        raise ConfigError(
            attempted,
            "a user or a key in the address",
            "an address without",
            "Put keys into the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY",
        )
    try:
        open_store(address)
    except ConfigError as error:
        raise ConfigError(attempted, error.found, error.expected, error.remedy) from error


def require_on_disk(folder: str | Path, setting: str) -> None:
    """Checks that a folder is on a disk, as commands need it that write to no address yet.

    Raises:
        ConfigError: It is an address.
    """
    if address := store_address(folder):
        raise ConfigError(
            f"writing to {without_secrets(address)} ({setting})",
            "an address of an object store",
            "a folder on a disk that every process of the command reaches",
            "Write to a disk, and copy it to the address afterwards",
        )


def require_output_folder(folder: str | Path, setting: str, *, is_file: bool = False) -> None:
    """Checks before a long job that its results can be written to a place and outlast it.

    Args:
        folder: A path or an address.
        setting: Setting or option that gave it.
        is_file: It is a file to write instead.

    Raises:
        ConfigError: As `require_lasting_folder` and `cluster.paths.require_writable`.
        StorageError: An object store takes no object there.
    """
    require_lasting_folder(folder, setting)
    if not (address := store_address(folder)):
        require_writable(folder, setting, is_file=is_file)
        return
    if is_file:
        address = address.rpartition("/")[0]
    attempted = f"writing to {address} ({setting})"
    with opened_store(address, attempted, PATIENCE) as (files, path):
        probe = f"{path}/.probe-{secrets.token_hex(4)}"
        write_whole(probe, b"sgmd", files)
        files.rm_file(probe)
