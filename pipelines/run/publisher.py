"""Publisher of a run: brings what the run writes down to its address, while it trains.

    every 5 s           lines added to logs, as parts; files that have changed, whole
    flush()             the same at once, before a checkpoint is committed that follows from it
    the store fails     reported and written down as an event; training goes on for a bounded time
    it refuses a state  no rights, no room: the run ends, and so it does of one that never succeeds
    the store is back   everything is caught up
    the end             logs are joined; the error names what is in the working copy alone

A run on a disk writes to its folder itself: its `Publisher` does nothing.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from cluster.background import in_background
from cluster.errors import ClusterError, LeaseLostError, StorageError, StoreRefusedError
from cluster.lease import Lease
from pipelines.run.opened_copy import copy_at, hold_place, kept, working_copy
from pipelines.run.places import local_of
from pipelines.run.records import RunEvent
from pipelines.run.working_copy import WorkingCopy

T = TypeVar("T")

_EVERY_S = 5.0
_AGAIN_S = 1.0
_LATE = ("wandb", "tensorboard")
"""Folders whose files grow all the time: published at the end."""


class Publisher:
    """Publisher of a run on a disk: its files are in place, so it does and tolerates nothing."""

    @property
    def is_out(self) -> bool:
        """True while the store of the run fails."""
        return False

    def flush(self) -> None:
        """Brings everything to the address now; tries once.

        Raises:
            StorageError: The store does not take it.
            LeaseLostError: Another process has taken the run over.
        """

    def check(self) -> None:
        """Looks whether the run may go on.

        Raises:
            StorageError: The store has failed for longer than the run tolerates.
            LeaseLostError: Another process has taken the run over.
        """

    def require_lease(self) -> None:
        """Makes sure that the run is this process's; before something is deleted or replaced.

        Raises:
            StorageError: The store does not say.
            LeaseLostError: Another process has taken the run over.
        """

    def tolerate(self, error: StorageError, work: str) -> None:
        """Takes note of a failure of the store that the run can go on without, for a while.

        Args:
            error: The failure.
            work: Names what failed; `succeeded` ends the time for which it is tolerated.

        Raises:
            StorageError: The error, where it is not tolerated, or no longer.
        """
        raise error

    def succeeded(self, work: str) -> None:
        """Takes note that work has been done: an earlier failure of it counts no longer."""

    def wait(self) -> None:
        """Waits until the store answers again.

        Raises:
            StorageError: It has failed for longer than the run tolerates.
        """

    def insist(self, name: str, work: Callable[[], T]) -> T:
        """Does work that may be repeated until the store lets it.

        Args:
            name: Names it.
            work: Does it.

        Raises:
            StorageError: The store does not, and the run does not tolerate that (any longer).
        """
        while True:
            try:
                found = work()
            except StorageError as error:
                self.tolerate(error, name)
                self.wait()
            else:
                self.succeeded(name)
                return found


class AddressPublisher(Publisher):
    """Publisher of a run at an address.

    Args:
        copy: Its files.
        lease: Held by this process.
        outage_s: How long the store may fail.
        tell: Receives the events of an outage.
        without: Folders whose files have another publisher.
    """

    def __init__(
        self,
        copy: WorkingCopy,
        lease: Lease,
        outage_s: float,
        tell: Callable[[RunEvent], None],
        without: Collection[str] = (),
    ) -> None:
        self._copy = copy
        self._late = (*_LATE, *without)
        self._lease = lease
        self._outage_s = outage_s
        self._tell = tell
        self._lock = threading.Lock()
        self._fatal: ClusterError | None = None
        self._out_since_s: float | None = None
        # By work: small files may come through while it does not.
        self._failed_since_s: dict[str, float] = {}

    @property
    def is_out(self) -> bool:
        """See `Publisher`."""
        return self._out_since_s is not None

    def work(self, over: threading.Event) -> None:
        """Publishes until the event is set."""
        while not over.wait(_AGAIN_S if self.is_out else _EVERY_S) and self._fatal is None:
            try:
                self._publish()
            except StorageError as error:
                self._note(error)
            except ClusterError as error:
                # Another process has taken the run over.
                self._fatal = error

    def flush(self) -> None:
        """See `Publisher`."""
        self.check()
        try:
            self._publish()
        except StorageError as error:
            self._note(error)
            raise

    def check(self) -> None:
        """See `Publisher`."""
        if self._fatal is not None:
            raise self._fatal

    def require_lease(self) -> None:
        """See `Publisher`."""
        self.check()
        self._lease.check()

    def tolerate(self, error: StorageError, work: str) -> None:
        """See `Publisher`; where the store answers and refuses, nothing is tolerated."""
        if isinstance(error, StoreRefusedError):
            raise error
        since_s = self._failed_since_s.setdefault(work, time.monotonic())
        self._note(error)
        self._end_if_long(error, since_s)
        self.check()

    def succeeded(self, work: str) -> None:
        """See `Publisher`."""
        self._failed_since_s.pop(work, None)

    def wait(self) -> None:
        """See `Publisher`."""
        while self.is_out:
            self.check()
            time.sleep(_AGAIN_S / 10)

    def close(self) -> None:
        """Publishes the rest and joins the logs, however long the run tolerates an outage.

        Raises:
            StorageError: Names what is in the working copy alone, and where that is.
            LeaseLostError: Another process has taken the run over.
        """
        while True:
            try:
                self._publish_all()
                return
            except StorageError as error:
                self._note(error)
                if self._fatal is not None or isinstance(error, StoreRefusedError):
                    raise kept(self._copy, error) from error
                time.sleep(_AGAIN_S)

    def give_up(self, error: BaseException) -> None:
        """Publishes the rest of a run that ends of an error, and does not wait for its store.

        Args:
            error: Gets a note that names what is in the working copy alone.
        """
        if isinstance(error, LeaseLostError):
            return
        try:
            self._publish_all()
        except StorageError as late:
            error.add_note(str(kept(self._copy, late)))
        except ClusterError as late:
            error.add_note(str(late))

    def _publish_all(self) -> None:
        self._publish()
        with self._lock:
            self._copy.publish()
            self._copy.join_logs()

    def _publish(self) -> None:
        with self._lock:
            self._lease.check()
            self._copy.publish(self._copy.changes(self._late), in_parts=True)
        began, self._out_since_s = self._out_since_s, None
        if began is not None:
            self._tell(
                RunEvent(
                    kind="storage_back",
                    cause=f"{self._copy.address} answers again",
                    action=f"caught up what {time.monotonic() - began:.0f} s had left behind",
                )
            )

    def _note(self, error: StorageError) -> None:
        """Begins an outage, or looks whether it lasts too long."""
        since_s = self._out_since_s
        if since_s is None:
            since_s = self._out_since_s = time.monotonic()
            self._tell(
                RunEvent(
                    kind="storage_lost",
                    cause=f"{error.attempted}: {error.found}",
                    action="went on; recovery.storage_outage_s tolerates "
                    f"{self._outage_s:g} s of it",
                )
            )
        self._end_if_long(error, since_s)

    def _end_if_long(self, error: StorageError, since_s: float) -> None:
        long_s = time.monotonic() - since_s
        if long_s >= self._outage_s and self._fatal is None:
            self._fatal = StorageError(
                f"keeping the run at {self._copy.address}",
                f"its store has failed for {long_s:.0f} s, {error.attempted}; last with "
                f"{error.found}",
                f"an answer within recovery.storage_outage_s ({self._outage_s:g} s)",
                f"{error.remedy}. Then go on with --resume {self._copy.address}",
            )


PUBLISHERS: dict[Path, Publisher] = {}
_ON_A_DISK = Publisher()


def publisher_of(root: Path) -> Publisher:
    """The publisher of a run's folder."""
    return PUBLISHERS.get(root, _ON_A_DISK)


def publish_now(root: Path, paths: Collection[Path] = ()) -> None:
    """Brings files to the address of a folder that is published, as soon as its store accepts them.

    Args:
        root: The folder; nothing is done for one of a disk.
        paths: Files whose folders have another publisher, too.

    Raises:
        StorageError: Its store has failed for longer than is tolerated.
        LeaseLostError: Another process has taken it over.
    """
    publisher = publisher_of(root)

    def publish() -> None:
        publisher.flush()
        if copy := copy_at(root):
            copy.publish(paths)

    publisher.insist("publishing", publish)


@contextmanager
def published_place(
    place: str | Path,
    purpose: str,
    outage_s: float,
    tell: Callable[[RunEvent], None],
    without: Collection[str] = (),
) -> Iterator[Path]:
    """Yields the local folder of a place that this process holds, and publishes it.

    Args:
        place: A path or an address.
        purpose: What is done there, for the message that others get.
        outage_s: As in `publishing`.
        tell: As in `publishing`.
        without: Folders that are not published, as they are others' to publish.

    Raises:
        LeaseError: Another process holds it; says which one and since when.
        StorageError: The store cannot be read, or as `publishing`.
    """
    with working_copy(place, _LATE):
        root = local_of(place)
        with (
            hold_place(root, purpose, _LATE) as lease,
            publishing(root, lease, outage_s, tell, without),
        ):
            yield root


@contextmanager
def publishing(
    root: Path,
    lease: Lease,
    outage_s: float,
    tell: Callable[[RunEvent], None],
    without: Collection[str] = (),
) -> Iterator[None]:
    """Publishes a run's folder until the block ends; does nothing for a folder of a disk.

    Args:
        root: The run's local folder.
        lease: Held by this process.
        outage_s: How long the store may fail.
        tell: Receives the events of an outage.
        without: Folders that are others' to publish, until the end.

    Raises:
        StorageError: At a normal end, something could not be published; names it. After an error
            in the block, a note of that error does.
        LeaseLostError: Another process has taken the run over.
    """
    copy = copy_at(root)
    if copy is None:
        yield
        return
    publisher = AddressPublisher(copy, lease, outage_s, tell, without)
    PUBLISHERS[root] = publisher
    try:
        with in_background("publish-run", publisher.work):
            yield
    except BaseException as error:
        publisher.give_up(error)
        raise
    else:
        publisher.close()
    finally:
        del PUBLISHERS[root]
