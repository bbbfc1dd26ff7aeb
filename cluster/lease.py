"""Lease on a folder that is written to: one process at a time.

    disk           flock on FOLDER/.lease    the kernel frees it with the process, also after a kill
    object store   FOLDER/_lease.json        renewed every 10 s; free when it is 60 s old, or its
                                             holder was a process of this machine that has
                                             ended; one elsewhere is watched for 20 s before

On a disk a holder that is paused keeps its lease. On an object store it may lose it; whoever holds
one asks `check` before each commit, which reads the object again.
"""

import errno
import fcntl
import getpass
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem

from cluster.errors import LeaseError, LeaseLostError
from cluster.files import open_in_place
from cluster.redaction import without_secrets
from cluster.storage_errors import storage_errors
from cluster.stores import open_store, store_address

LEASE_FILE, LEASE_OBJECT = ".lease", "_lease.json"
_RENEW_EVERY_S, _EXPIRY_S = 10.0, 60.0
# Two writers that create the object at once both see the later one after so long.
_SETTLE_S = 1.0
# A holder elsewhere, whose clock may be wrong, renews its lease once at least in so long.
_WATCH_S = 20.0
# A renewal that is not answered soon is tried again before the lease expires.
_ANSWER_S, _RENEWAL_S = 120.0, 20.0
_log = logging.getLogger(__name__)


class Lease:
    """A lease that this process holds."""

    def check(self) -> None:
        """Makes sure that the lease is still held; call it before each commit.

        Raises:
            LeaseLostError: Another process has taken it over.
        """


@contextmanager
def hold(
    folder: str, purpose: str, filesystem: AbstractFileSystem | None = None
) -> Iterator[Lease]:
    """Holds a folder for writing.

    Args:
        folder: Local path, which is made where it is missing, or an address fsspec knows.
        purpose: What is done there, for the message that others get.
        filesystem: Of an object store, with its settings; None takes the usual ones.

    Raises:
        LeaseError: Another process holds it; says which one and since when.
        StorageError: Nothing can be written there.
    """
    store = open_store(folder)[0] if filesystem is None else filesystem
    path = str(store._strip_protocol(folder))
    holder = _holder(purpose)
    if isinstance(store, LocalFileSystem):
        with _hold_local(Path(path), folder, holder):
            yield Lease()
        return
    with _hold_object(store, f"{path}/{LEASE_OBJECT}", folder, holder) as lease:
        yield lease


@contextmanager
def hold_if_free(folder: str, purpose: str) -> Iterator[str]:
    """Yields "" while this process holds a folder; where another one does, a sentence naming it.

    Args:
        folder: As in `hold`.
        purpose: As in `hold`.

    Raises:
        StorageError: Nothing can be written there.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(folder, purpose))
            holder = ""
        except LeaseError as error:
            holder = str(error)
        yield holder


@contextmanager
def hold_replaced(folder: str, purpose: str) -> Iterator[None]:
    """Holds a folder that its writer exchanges whole; the lease lies beside it.

    A lease inside would be exchanged with the folder. The folder itself is not made.

    Args:
        folder: Local path, whose links are followed, so that two spellings are one folder; or an
            address.
        purpose: As in `hold`.

    Raises:
        LeaseError: Another process holds it; says which one and since when.
        StorageError: Nothing can be written there.
    """
    if address := store_address(folder):
        store, path = open_store(address)
        above, _, name = path.rpartition("/")
        beside = f"{above}/.{name}{LEASE_OBJECT}"
        with _hold_object(store, beside, address, _holder(purpose)):
            yield
        return
    target = Path(os.path.realpath(folder))
    beside = target.with_name(f".{target.name}{LEASE_FILE}")
    with _hold_local(beside, folder, _holder(purpose)):
        yield


def _holder(purpose: str) -> dict[str, Any]:
    return {
        "purpose": purpose,
        "owner": f"{_user()}@{socket.gethostname()}",
        "pid": os.getpid(),
        "command": without_secrets(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))[:200],
        "system": _system(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "token": secrets.token_hex(8),
    }


@contextmanager
def _hold_local(path: Path, folder: str, holder: Mapping[str, Any]) -> Iterator[None]:
    lock = path / LEASE_FILE
    with storage_errors(f"writing to {folder}"):
        is_new = not path.exists()
    while True:
        with storage_errors(f"writing to {folder}"):
            path.mkdir(parents=True, exist_ok=True)
            descriptor = open_in_place(lock, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = ""
            with suppress(OSError):
                text = os.pread(descriptor, 2**16, 0).decode(errors="replace")
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise _held(folder, text) from None
            _log.warning("%s cannot be locked (%s): do not write to it twice at once", path, error)
            yield
            return
        # The holder before may have deleted the file between our opening and locking it.
        with storage_errors(f"writing to {folder}"), ExitStack() as opened:
            opened.callback(os.close, descriptor)
            if _is_at(descriptor, lock):
                opened.pop_all()
                break
    try:
        with storage_errors(f"writing to {folder}"):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            # The folder may have been replaced; a file of that name is another holder's then.
            if _is_at(descriptor, lock):
                lock.unlink()
                if is_new:
                    # Whoever was refused before writing anything leaves no empty folder.
                    path.rmdir()
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Returns True if an open file is the one of that name."""
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


@contextmanager
def _hold_object(
    store: AbstractFileSystem, path: str, folder: str, holder: Mapping[str, Any]
) -> Iterator[Lease]:
    lease = _ObjectLease(store, path, folder, holder)
    with storage_errors(f"writing to {folder}"):
        lease.take()
    try:
        yield lease
    finally:
        lease.release()


class _ObjectLease(Lease):
    """A lease as an object that is renewed by a thread."""

    def __init__(
        self,
        filesystem: AbstractFileSystem,
        path: str,
        folder: str,
        holder: Mapping[str, Any],
    ) -> None:
        self._filesystem = filesystem
        self._path = path
        self._folder = folder
        self._holder = holder
        self._over = threading.Event()
        self._renewed_s = time.monotonic()

    def take(self) -> None:
        """Creates the object, or takes over one that nobody renews any more."""
        found = self._read(_ANSWER_S)
        if found and not _has_ended(found) and self._is_renewed(found):
            raise _held(self._folder, json.dumps(found))
        self._write(is_new=not found, timeout_s=_ANSWER_S)
        time.sleep(_SETTLE_S)
        found = self._read(_ANSWER_S)
        if found.get("token") != self._holder["token"]:
            raise _held(self._folder, json.dumps(found))
        threading.Thread(target=self._renew, name="renew-lease", daemon=True).start()

    def _is_renewed(self, found: Mapping[str, Any]) -> bool:
        """Returns True if a holder renews its lease; one elsewhere has a clock of its own."""
        if _age_s(found) < _EXPIRY_S:
            return True
        if _is_here(found):
            return False
        _log.warning(
            "Watching the lease on %s for %.0f s before it is taken over", self._folder, _WATCH_S
        )
        time.sleep(_WATCH_S)
        return self._read(_ANSWER_S) not in ({}, found)

    def check(self) -> None:
        """See `Lease`; reads the object."""
        with storage_errors(f"reading the lease on {self._folder}"):
            self._require_own(_ANSWER_S)

    def _require_own(self, timeout_s: float) -> None:
        found = self._read(timeout_s)
        if found.get("token") != self._holder["token"]:
            raise LeaseLostError(
                f"writing to {self._folder}",
                f"the lease is held by {_words(found)}" if found else "the lease is gone",
                "the lease that this process took",
                "Let the other process finish, then run the command again",
            )

    def release(self) -> None:
        """Deletes the object where it is still this process's."""
        self._over.set()
        with suppress(Exception):
            if self._read(_RENEWAL_S).get("token") == self._holder["token"]:
                self._ask("rm_file", timeout_s=_RENEWAL_S)

    def _renew(self) -> None:
        while not self._over.wait(_RENEW_EVERY_S):
            try:
                self._require_own(_RENEWAL_S)
                late_s = time.monotonic() - self._renewed_s
                self._write(is_new=False, timeout_s=_RENEWAL_S)
                if late_s >= _EXPIRY_S:
                    # Another process may just be taking it: the later one of both has it.
                    self._over.wait(_SETTLE_S)
                    self._require_own(_RENEWAL_S)
                    _log.warning(
                        "The lease %s was not renewed for %.0f s; nobody took it",
                        self._path,
                        late_s,
                    )
            except LeaseLostError:
                return
            except Exception as error:
                _log.warning("The lease %s was not renewed: %s", self._path, error)

    def _read(self, timeout_s: float) -> dict[str, Any]:
        self._filesystem.invalidate_cache()
        try:
            found = json.loads(self._ask("cat_file", timeout_s=timeout_s))
        except FileNotFoundError:
            return {}
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, *, is_new: bool, timeout_s: float) -> None:
        now = {"renewed": time.time(), "uptime_s": time.monotonic()}
        content = json.dumps({**self._holder, **now}).encode()
        try:
            # Conditional where the server knows how; the read after it decides elsewhere.
            mode = "create" if is_new else "overwrite"
            self._ask("pipe_file", content, timeout_s=timeout_s, mode=mode)
        except FileExistsError:
            raise _held(self._folder, json.dumps(self._read(timeout_s))) from None
        except (NotImplementedError, TypeError):
            self._ask("pipe_file", content, timeout_s=timeout_s)
        self._renewed_s = time.monotonic()

    def _ask(self, request: str, *content: bytes, timeout_s: float, **options: str) -> Any:  # noqa: ANN401
        """One request about the object; a server that never answers is not waited for."""
        files = self._filesystem
        if not isinstance(files, AsyncFileSystem):
            return getattr(files, request)(self._path, *content, **options)
        ask = getattr(files, f"_{request}")
        try:
            return sync(files.loop, ask, self._path, *content, timeout=timeout_s, **options)
        except FSTimeoutError as error:
            words = f"no answer about {self._path} in {timeout_s:.0f} s"
            raise TimeoutError(words) from error


def _held(folder: str, text: str) -> LeaseError:
    try:
        found = json.loads(text)
    except ValueError:
        found = {}
    return LeaseError(
        f"writing to {folder}",
        f"it is being written to by {_words(found)}",
        "a folder that no other process writes to",
        "Wait for that process or end it, or choose another folder",
    )


def _words(found: Mapping[str, Any]) -> str:
    if not found:
        return "another process"
    return (
        f"{found.get('owner')}, process {found.get('pid')} (`{found.get('command')}`), since "
        f"{found.get('since')}: {found.get('purpose')}"
    )


def _system() -> str:
    """Names this boot of this kernel, and the numbering of its processes that we are part of."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _is_here(found: Mapping[str, Any]) -> bool:
    """Returns True if a holder is or was a process of this machine, since it was started."""
    return bool(_system()) and found.get("system") == _system()


def _age_s(found: Mapping[str, Any]) -> float:
    """Seconds since a lease was renewed.

    The clock of a machine may be set while a lease is held, so of a holder here the time since the
    machine's start counts. A holder elsewhere may be ahead of us, or behind.
    """
    if _is_here(found) and "uptime_s" in found:
        return time.monotonic() - float(found["uptime_s"])
    return abs(time.time() - float(found.get("renewed", 0)))


def _has_ended(found: Mapping[str, Any]) -> bool:
    """Returns True if a holder was a process of this machine that is no longer there."""
    if not _is_here(found):
        return False
    pid = found.get("pid")
    return isinstance(pid, int) and not Path(f"/proc/{pid}").exists()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
