"""Trial of storage that a run writes to: write, list, read, delete. Nothing of it stays.

A marker left by one machine and seen by another tells whether their folder is one folder.
"""

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from cluster.paths import nearest_folder
from cluster.redaction import without_secrets
from cluster.s3.settings import S3Settings
from cluster.stores import open_store
from pipelines.doctoring.findings import Finding, Status, gib

_STORAGE_S = 20.0  # a request to an S3 server
_PAYLOAD_BYTES = 4 * 2**20


def try_storage(folder: str) -> Finding:
    """Writes, lists, reads and deletes one object.

    Args:
        folder: Local folder, made for the moment where it is not there, or `s3://bucket/prefix`.
    """
    name = f"storage {folder}"
    payload = uuid.uuid4().bytes * (_PAYLOAD_BYTES // 16)
    address = f"{folder.rstrip('/')}/sgmd-doctor-{uuid.uuid4().hex}"
    try:
        filesystem, path = open_store(address, S3Settings(read_budget_s=_STORAGE_S))
        # On an object store this might create a bucket, which is not ours to decide.
        is_local = isinstance(filesystem, LocalFileSystem)
        with _folders_for(Path(path)) if is_local else nullcontext():
            times = [time.monotonic()]
            filesystem.pipe_file(path, payload)
            times.append(time.monotonic())
            try:
                read = filesystem.cat_file(path)
                times.append(time.monotonic())
                listed = filesystem.ls(path.rpartition("/")[0], detail=False, refresh=True)
            finally:
                filesystem.rm_file(path)
    # Whatever a storage client raises, it is what is to be reported.
    except Exception as error:
        remedy = (
            "Check AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, that the bucket "
            "exists, and the rights to put, get, list and delete"
            if "://" in folder
            else "Check the folder and the rights to it"
        )
        found = without_secrets(f"{type(error).__name__}: {error}")
        return Finding(name, Status.MISSING, found, remedy)
    if read != payload:
        return Finding(name, Status.MISSING, "reads back something else", "Try another folder")
    if not any(str(each).endswith(path.rpartition("/")[2]) for each in listed):
        remedy = "Checkpoints are found by listing: allow it (s3:ListBucket)"
        return Finding(name, Status.MISSING, "an object that is there is not listed", remedy)
    write_s, read_s = times[1] - times[0], times[2] - times[1]
    return Finding(
        name,
        Status.GOOD,
        f"writes ({_mb_per_s(write_s)}), reads ({_mb_per_s(read_s)}), lists and deletes"
        + (f"; {_free(path)}" if is_local else ""),
    )


def leave_marker(folder: str) -> str:
    """Leaves an empty file in a local folder, or in the nearest one above it that is there.

    Returns:
        Its path; `remove_marker` deletes it.
    """
    path = nearest_folder(folder) / f".sgmd-doctor-{uuid.uuid4().hex}"
    with suppress(OSError):
        path.touch()
    return str(path)


def sees_marker(path: str) -> bool:
    """Returns True if this machine sees a marker of another one."""
    folder = Path(path).parent
    with suppress(OSError):
        # A network disk may go on showing what it showed before.
        list(folder.iterdir())
    return Path(path).exists()


def remove_marker(path: str) -> None:
    """Deletes the file of the storage check."""
    with suppress(OSError):
        Path(path).unlink()


def _mb_per_s(seconds: float) -> str:
    return f"{_PAYLOAD_BYTES / 1e6 / max(seconds, 1e-6):.3g} MB/s"


def _free(path: str) -> str:
    return f"{gib(shutil.disk_usage(nearest_folder(path)).free)} free"


@contextmanager
def _folders_for(path: Path) -> Iterator[None]:
    """Makes the folders above a path, and deletes those of them that were not there."""
    missing = [each for each in path.parents if not each.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with suppress(OSError):  # Another process may have put something there.
                folder.rmdir()
