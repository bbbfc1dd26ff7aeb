"""Folder of a process in the user's cache, which goes away with it: that of a working copy."""

import fcntl
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.files import cache_folder, delete_folder

KEEP = ".keep"
"""File in a folder that stays when its process has ended."""

_MARK, _HELD = ".copy", ".held"


@contextmanager
def held_folder(name: str) -> Iterator[Path]:
    """A new folder that is held while the block runs; deletes those whose process has ended.

    It is held by a lock of the kernel, which ends with its process: numbers of processes mean
    nothing to another container that shares this disk and the name of the host.

    Args:
        name: What its name begins with.
    """
    host = socket.gethostname()
    base = cache_folder("runs")
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError:
        base = Path(tempfile.gettempdir()) / f"sgmd-runs-{os.getuid()}"
        base.mkdir(mode=0o700, exist_ok=True)
    for folder in base.glob(f"*.{host}-*{_MARK}"):
        _delete_left(folder)
    root = base / f"{name}.{host}-{os.getpid()}-{secrets.token_hex(4)}{_MARK}"
    draft = root.with_suffix(".draft")
    draft.mkdir(mode=0o700)
    descriptor = os.open(draft / _HELD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # Where a disk has no locks, nobody gets one, and what a killed process leaves stays.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Nobody sees it before it is held.
        draft.rename(root)
        yield root
    finally:
        os.close(descriptor)


def _delete_left(folder: Path) -> None:
    """Deletes a copy that nobody holds, unless it has files that are nowhere else."""
    if (folder / KEEP).exists():
        return
    try:
        descriptor = os.open(folder / _HELD, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        delete_folder(folder)
    except OSError:
        # Its process lives.
        return
    finally:
        os.close(descriptor)
