"""Failed and late calls: which rank is to blame, and the error that says so.

A failure passes through every call that depends on the failed one, and a rank may wait for another
one. So the first rank of a chain that is dead, late or wrong is looked for. Ranks that run
collectives fail with their partners: see `cluster.ray.partners`.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn, Protocol
from weakref import WeakSet

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    RayActorError,
    RayError,
    RayTaskError,
)

from cluster.errors import RemoteCallError, ResultLostError
from cluster.ray.deaths import death_of, lost_machine
from cluster.ray.future import RayFuture
from cluster.ray.partners import Partner, dead_partner
from cluster.ray.progress import read_report

_PATIENCE_S = 5.0
# Of Ray's text about an error that it has met in a process: the last is where it began.
_SENDER = re.compile(r"actor_id=([0-9a-f]+), repr=([^)\n]*)\)")
_NOTE = re.compile(r"^raised in ", re.MULTILINE)

_FULL_STORE = (
    "an object store, and a disk to spill it to, that have room for the result",
    "Start Ray with a larger store (--object-store-memory), or free the disk of its temporary "
    "folder (`df`); `ray memory` shows what fills the store",
)


class OpenGroup(Protocol):
    """Ranks that a machine's loss may concern, such as a `cluster.ray.group.RayWorkerGroup`."""

    name: str

    def processes(self) -> Iterator[tuple[Any, str]]:
        """Ray's handle of each rank, and a name for those it runs collectives with."""
        ...


OPEN_GROUPS: WeakSet[OpenGroup] = WeakSet()
"""Groups of this process: a machine that is lost may have had ranks of all of them."""


def late_call(futures: Sequence[RayFuture[Any]]) -> tuple[str, int, str]:
    """Group, rank and method to blame for a timeout: the call that runs, not one that waits for it.

    The first future is named where all have finished just now.
    """
    late = next((one for one in futures if not ray.wait([one.reference], timeout=0)[0]), futures[0])
    for actor, (group, rank) in late.ranks.items():
        with suppress(Exception):
            report = read_report(actor)
            if report is None or not report.method:
                continue
            if report.group == group:
                return group, rank, report.method
            # The process works on another call of those that were made together.
            if late.entry is not None and report.group in dict(late.answer.ranks):
                return report.group, dict(late.answer.ranks)[report.group], report.method
    return late.group, late.rank, late.method


def first_failure(futures: Sequence[RayFuture[Any]]) -> RayError | None:
    """Failure of the first future that has one; open futures are waited for only briefly."""
    deadline_s = time.monotonic() + _PATIENCE_S
    for future in futures:
        try:
            ray.get(future.reference, timeout=max(0.0, deadline_s - time.monotonic()))
        except GetTimeoutError:
            continue
        except RayError as error:
            return error
    return None


def open_processes() -> dict[str, tuple[str, int]]:
    """(group, rank) by actor id, of all groups that this process has open.

    Where groups share a process, one of them is named.
    """
    return {
        actor._actor_id.hex(): (group.name, rank)
        for group in OPEN_GROUPS
        for rank, (actor, _) in enumerate(group.processes())
    }


def _partners(futures: Sequence[RayFuture[Any]]) -> dict[str, Partner]:
    """All ranks that run collectives in the groups of futures, by actor id."""
    names = {group for future in futures for group, _ in future.ranks.values()}
    return {
        actor._actor_id.hex(): Partner(actor, (group.name, rank))
        for group in OPEN_GROUPS
        if group.name in names
        for rank, (actor, partners) in enumerate(group.processes())
        if partners
    }


def raise_cause(error: RayError, futures: Sequence[RayFuture[Any]], attempted: str) -> NoReturn:
    """Raises what happened in a rank as itself, not in Ray's wrapping.

    An error passes through every call that depends on the failed one; each wraps it once more.
    """
    cause: BaseException = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    where = _beside_calls(error, cause, futures)
    if isinstance(cause, RayActorError):
        ranks = {actor: rank for future in futures for actor, rank in future.ranks.items()}
        if died := death_of(cause, ranks, attempted, open_processes()):
            raise died from None
    if isinstance(cause, RayError) and (lost := lost_machine(open_processes(), attempted)):
        raise lost from None
    if isinstance(cause, ObjectLostError):
        raise ResultLostError(
            attempted,
            f"a result that it needs is lost ({type(cause).__name__})",
            "the object store of every machine to stay",
            "Resume the run from its last checkpoint",
        ) from None
    if isinstance(cause, RayError):
        found = f"{type(cause).__name__}{where}: {cause}"
        if isinstance(cause, ObjectStoreFullError | OutOfDiskError):
            raise RemoteCallError(attempted, found.partition("\n")[0], *_FULL_STORE) from None
        raise RemoteCallError(attempted, found) from None
    if isinstance(cause, RuntimeError) and (partners := _partners(futures)):
        # A collective fails in the ranks that live; the one that does not is to blame.
        words = str(cause).partition("\n")[0]
        if died := dead_partner(partners, attempted, f"{type(cause).__name__}: {words}"):
            raise died from None
    if where:
        cause.add_note(f"raised{where}; {attempted}")
    raise cause from None


def _beside_calls(error: RayError, cause: BaseException, futures: Sequence[RayFuture[Any]]) -> str:
    """Says where an error came from that no call has noted: Ray met it, as where it packs results.

    Returns:
        Words that begin with a space; nothing where a note says it, or Ray does not.
    """
    found = _SENDER.findall(str(error))
    notes = getattr(cause, "__notes__", ())
    # Ray's text has the note of an error that is rebuilt here without its notes.
    if not found or any(note.startswith("raised in") for note in notes) or _NOTE.search(str(error)):
        return ""
    actor, place = found[-1]
    methods = dict.fromkeys(
        f"{each.method}()" for each in futures if each.ranks.get(actor) == (each.group, each.rank)
    )
    named = f" ({', '.join(methods)})" if methods else ""
    return f" in {place}, outside of its calls{named}"
