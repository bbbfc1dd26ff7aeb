"""Working copies of runs, opened for reading and held for writing."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TypeVar

from cluster.errors import StorageError
from cluster.files import delete_folder
from cluster.lease import Lease, hold
from cluster.paths import require_own_files
from cluster.stores import opened_store, store_address
from pipelines.config.recipe_files import RUN_RECIPE
from pipelines.run.held_folder import KEEP, held_folder
from pipelines.run.places import add_copy, open_copy_of, remove_copy, shared_place
from pipelines.run.working_copy import EXPORTED_FOLDERS, WorkingCopy, patient_store

T = TypeVar("T")

_OPEN: dict[Path, WorkingCopy] = {}


@contextmanager
def working_copy(place: str | Path, without: Collection[str] = ()) -> Iterator[Path]:
    """Yields a local folder that stands for a folder anywhere; see `WorkingCopy`.

    On a normal exit what was changed is at the address, and the local folder is gone. Inside of an
    open copy of the same address, or of a folder above it, that copy is used.

    Args:
        place: A path, which is yielded as it is, or an address.
        without: Folders that are not needed, besides `BIG_FOLDERS`.

    Raises:
        StorageError: The store cannot be read or written; the message names the local folder where
            the files are that are not at the address.
    """
    address = store_address(place)
    if not address:
        yield Path(place)
        return
    if (root := open_copy_of(address)) is not None:
        yield root
        return
    with held_folder(PurePosixPath(address).name) as root:
        copy = WorkingCopy(root, address)
        _OPEN[root] = copy
        add_copy(root, address)
        try:
            copy.fetch(without)
            yield root
            keeping(copy, copy.publish)
        finally:
            del _OPEN[root]
            remove_copy(root)
            if not copy.keeps:
                delete_folder(root)


@contextmanager
def run_copy(place: str | Path, without: Collection[str] = ()) -> Iterator[Path]:
    """As `working_copy` where a run lies there; whatever else a place is, is yielded as it is.

    Args:
        place: A path or an address: of a run, or of a model folder.
        without: As in `working_copy`.

    Raises:
        StorageError: As `working_copy`.
    """
    address = store_address(place)
    if address and open_copy_of(address) is None:
        with opened_store(address, f"reading {address}") as (files, path):
            is_run = files.exists(f"{path}/{RUN_RECIPE}")
        if not is_run:
            yield Path(place)
            return
    with working_copy(place, without) as root:
        yield root


@contextmanager
def hold_place(root: Path, purpose: str, without: Collection[str] = ()) -> Iterator[Lease]:
    """Holds a folder, or the address that it stands for, for writing; see `cluster.lease.hold`.

    What another process has written there until then is brought here.

    Args:
        root: The folder on this disk.
        purpose: What is done there, for the message that others get.
        without: As in `working_copy`.

    Raises:
        LeaseError: Another process holds it; says which one and since when.
        ConfigError: A link in it leads to other files.
        StorageError: Nothing can be written there.
    """
    copy, place = copy_at(root), shared_place(root)
    files = patient_store(place)[0] if copy else None
    with hold(place, purpose, files) as lease:
        if not copy:
            # Exports link to the parts of their base, and are written whole.
            require_own_files(root, EXPORTED_FOLDERS)
        if copy:
            copy.fetch(without)
        yield lease


def copy_at(root: Path) -> WorkingCopy | None:
    """The open working copy that a local folder is, or is a part of; None for any other folder."""
    for known, copy in _OPEN.items():
        if root.is_relative_to(known):
            return copy.part(root)
    return None


def keeping(copy: WorkingCopy, work: Callable[[], T]) -> T:
    """Does the last work on a copy; where it fails, the local folder stays and the error says so.

    Raises:
        StorageError: The store does not take the files.
    """
    try:
        return work()
    except StorageError as error:
        raise kept(copy, error) from error


def kept(copy: WorkingCopy, error: StorageError) -> StorageError:
    """Keeps the local folder of a copy; returns the error that says what is only there."""
    for root, whole in _OPEN.items():
        if copy.root.is_relative_to(root) and root.exists():
            whole.keeps = True
            (root / KEEP).touch()
    names = [path.relative_to(copy.root).as_posix() for path in copy.changes()]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return StorageError(
        f"writing the last files of {copy.address}",
        f"{error.found.rstrip('.')}; only in {copy.root}: {', '.join(names[:8])}{more}",
        "an object store that takes them",
        f"Copy them from {copy.root} to {copy.address} once the store answers, or resume the run",
    )
