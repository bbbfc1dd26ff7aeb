"""A worker group whose ranks are Ray actors.

    controller                 object store               host of a rank (an actor)
    call_rank(method, args) -- to_wire --> reference ---> from_wire, method, to_wire -- reference
    fetch(pending) <------------------------ small values only -----------------------'

Arguments that are pending go as references at the top level of the call: Ray waits for them at the
receiver's end and moves the values from rank to rank, past the controller. The ranks of a group
that was given `collective=True` also meet in a torch.distributed group of their own, before their
workers are built. Actors are synchronous
and are never restarted and calls never retried by Ray: a restart would lose the worker's state
without a word, and a retry would run out of order.
"""

import os
import pickle
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVarTuple

import ray
import ray.util
import torch
from ray.exceptions import (
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)

from cluster.errors import CallTimeoutError, ClusterError, RemoteCallError, WorkerDiedError
from cluster.joined import JoinedPending, Span, put_together
from cluster.meeting import Meeting, join_meeting, open_meeting
from cluster.topology import Placement
from cluster.transfer import array_in, from_wire, to_wire
from cluster.worker_group import Pending, R, R_co, W, WorkerGroup, refuse_array

Ts = TypeVarTuple("Ts")

_TIMINGS_TIMEOUT_S = 600.0
_COLLECTIVE_TIMEOUT_S = 600.0
# Ray would show each process its own GPU alone, under which NCCL has been slow or wrong between
# ranks of one machine (https://github.com/ray-project/ray/issues/61073).
_SEES_ALL_GPUS = {"runtime_env": {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}}


@dataclass(frozen=True, slots=True, eq=False)
class RayPending(Pending[R_co]):
    """A reference to a result that stays in the object store.

    Attributes:
        reference: Ray's reference; dropping the last one frees the value.
        ranks: (group, rank) by actor id of every actor that this result depends on, so that the
            death of any of them can be told by name.
    """

    reference: ray.ObjectRef
    ranks: Mapping[str, tuple[str, int]]


@dataclass(frozen=True, slots=True)
class _Joint:
    """How an argument is put together from the values that were sent for it."""

    spans: tuple[Span, ...]
    wanted: Span


Layout = tuple[_Joint | None, ...]
"""One entry an argument; None for one that was sent as it is."""


class RayWorkerGroup(WorkerGroup[W]):
    """Ranks in processes of their own, each in its bundle of the run's placement.

    The constructor returns at once and the ranks build their workers side by side: start all
    groups, then `wait_ready` for each.

    Args:
        name: What errors and reports call the group.
        factory: Module-level function that builds the worker inside the rank's process.
        args: Its arguments; plain picklable values.
        placement: Reserved resources.
        pool: The pool whose ranks these are; None: the one called like the group.
        collective: Whether the ranks, if there are several, run collectives among themselves.
        narrow: Kinds of tensors that its results carry in bfloat16; see `cluster.transfer`.
    """

    def __init__(
        self,
        name: str,
        factory: Callable[[*Ts], W],
        args: tuple[*Ts],
        placement: Placement,
        pool: str | None = None,
        *,
        collective: bool = False,
        narrow: AbstractSet[str] = frozenset(),
    ) -> None:
        pool_name = name if pool is None else pool
        super().__init__(name, placement.pool(pool_name).num_ranks)
        host_class = ray.remote(_Host)
        meets = collective and self.size > 1
        options = _SEES_ALL_GPUS if meets else {}
        self._hosts: list[Any] = [
            host_class.options(
                max_restarts=0,
                max_task_retries=0,
                **options,
                **placement.actor_options(pool_name, rank),
            ).remote(name, rank, narrow)
            for rank in range(self.size)
        ]
        meeting: ray.ObjectRef | None = None
        if meets:
            nodes = [host.node_id.remote() for host in self._hosts]
            meeting = self._hosts[0].open_meeting.remote(*nodes)
        self._ready = [
            self._pending(rank, "build", host.build.remote(factory, args, meeting), [])
            for rank, host in enumerate(self._hosts)
        ]

    def wait_ready(self, timeout_s: float) -> None:
        """Waits until every rank has built its worker; raises what the factory raised."""
        self.fetch(self._ready, timeout_s, f"starting the {self.size} ranks of {self.name}")

    def fetch(self, pendings: Sequence[Pending[R]], timeout_s: float, phase: str) -> list[R]:
        """Waits for small results; see `WorkerGroup.fetch`."""
        claims = [_claimed(pending, phase) for pending in pendings]
        try:
            wires = ray.get([claim.reference for claim in claims], timeout=timeout_s)
        except GetTimeoutError:
            late = _first_unfinished(claims)
            raise CallTimeoutError(late.group, late.rank, late.method, phase, timeout_s) from None
        except RayError as error:
            _raise_cause(error, claims, phase)
        for claim, wire in zip(claims, wires, strict=True):
            where = array_in(wire)
            if where is not None:
                raise refuse_array(claim, where, phase)
        return [from_wire(wire) for wire in wires]

    def is_done(self, pending: Pending[Any]) -> bool:
        """Whether the result is somewhere in the object store, or will never be."""
        reference = _claimed(pending, "looking whether a call is done").reference
        done, _ = ray.wait([reference], timeout=0, fetch_local=False)
        return bool(done)

    def timings(self) -> dict[str, float]:
        """Busy seconds by method, summed over ranks, since this was last asked."""
        asked = [
            self._pending(rank, "timings", host.timings.remote(), [])
            for rank, host in enumerate(self._hosts)
        ]
        total = defaultdict[str, float](float)
        for busy_s in self.fetch(asked, _TIMINGS_TIMEOUT_S, f"reading timings of {self.name}"):
            for method, seconds in busy_s.items():
                total[method] += seconds
        return dict(total)

    def process_ids(self) -> list[int]:
        """Process id of each rank, on its machine; for `py-spy` and for tests."""
        asked = [
            self._pending(rank, "process_id", host.process_id.remote(), [])
            for rank, host in enumerate(self._hosts)
        ]
        return self.fetch(asked, _TIMINGS_TIMEOUT_S, f"finding the processes of {self.name}")

    def close(self) -> None:
        """Ends the processes; what they hold is gone. Harmless when repeated."""
        if ray.is_initialized():
            for host in self._hosts:
                ray.kill(host)
        self._hosts.clear()

    def _submit(
        self, rank: int, method: str, args: Sequence[object], keywords: Mapping[str, object]
    ) -> RayPending[Any]:
        sent, layout = _laid_out(args, method)
        named = {name: _sent(value, f"{name} of {method}()") for name, value in keywords.items()}
        reference = self._hosts[rank].run.remote(method, layout, *sent, **named)
        return self._pending(rank, method, reference, [*args, *keywords.values()])

    def _pending(
        self, rank: int, method: str, reference: ray.ObjectRef, inputs: Sequence[object]
    ) -> RayPending[Any]:
        ranks = {reference.task_id().actor_id().hex(): (self.name, rank)}
        for value in inputs:
            for piece in value.pieces if isinstance(value, JoinedPending) else (value,):
                if isinstance(piece, RayPending):
                    ranks |= piece.ranks
        return RayPending(self.name, rank, method, reference, ranks)


class _Host:
    """The inside of a rank: builds its worker and runs its methods, one after another."""

    def __init__(self, group: str, rank: int, narrow: AbstractSet[str]) -> None:
        self._place = f"{group} rank {rank}"
        self._narrow = narrow
        self._rank = rank
        self._worker: Any = None
        self._store: Any = None
        self._busy_s = defaultdict[str, float](float)

    def __repr__(self) -> str:
        """Heads the lines that this process writes to the controller's terminal."""
        return self._place

    def node_id(self) -> str:
        """Ray's name of the machine that this process is on."""
        return ray.get_runtime_context().get_node_id()

    def open_meeting(self, *nodes: str) -> Meeting:
        """Opens the place where the ranks meet, and keeps it; asked of rank 0.

        Args:
            nodes: Machine of every rank.
        """
        self._store, meeting = open_meeting(
            len(nodes),
            ray.util.get_node_ip_address(),
            on_one_machine=len(set(nodes)) == 1,
            timeout_s=_COLLECTIVE_TIMEOUT_S,
        )
        return meeting

    def build(
        self, factory: Callable[..., Any], args: tuple[Any, ...], meeting: Meeting | None
    ) -> None:
        """Makes the worker; not in the constructor, where an error would lose its type."""
        try:
            if meeting is not None:
                _take_own_gpu()
                join_meeting(meeting, self._rank, _COLLECTIVE_TIMEOUT_S, self._store)
            self._worker = factory(*args)
        except Exception as error:
            raise self._portable(error, factory.__name__) from None

    def run(self, method: str, layout: Layout, /, *sent: object, **keywords: object) -> object:
        """Runs one method on values from the wire; its result goes back onto the wire."""
        started = time.perf_counter()
        try:
            if self._worker is None:
                raise ClusterError(
                    f"calling {method}() of {self._place}",
                    "no worker: building it has failed",
                    "wait_ready() to succeed before the first call",
                )
            named = {name: from_wire(value) for name, value in keywords.items()}
            args = _received([from_wire(value) for value in sent], layout)
            result = getattr(self._worker, method)(*args, **named)
            return to_wire(result, f"the result of {method}()", self._narrow)
        except Exception as error:
            raise self._portable(error, method) from None
        finally:
            self._busy_s[method] += time.perf_counter() - started

    def timings(self) -> dict[str, float]:
        """Busy seconds by method since this was last asked."""
        busy_s = dict(self._busy_s)
        self._busy_s.clear()
        return busy_s

    def process_id(self) -> int:
        """Id of this process."""
        return os.getpid()

    def _portable(self, error: Exception, method: str) -> Exception:
        """The error with a note of where, or its words if it cannot be rebuilt elsewhere."""
        where = f"raised in {method}() of {self._place}"
        told = "".join(traceback.format_exception(error))
        error.add_note(f"{where}:\n{told}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return RemoteCallError(
                f"running {method}() of {self._place}", f"{type(error).__name__}: {error}\n{told}"
            )
        return error


def _take_own_gpu() -> None:
    """Makes the GPU that Ray gave to this process the current one, where all are in sight."""
    own = ray.get_gpu_ids()
    if own:
        torch.cuda.set_device(int(own[0]))


def _laid_out(args: Sequence[object], method: str) -> tuple[list[object], Layout]:
    """What is sent for the arguments of a call, and what the receiver makes of it.

    Ray resolves references at the top level of a call alone, so the pieces of a joined value are
    sent as arguments of their own.
    """
    sent: list[object] = []
    layout: list[_Joint | None] = []
    for index, value in enumerate(args):
        where = f"argument {index} of {method}()"
        if isinstance(value, JoinedPending):
            sent += [_sent(piece, where) for piece in value.pieces]
            layout.append(_Joint(value.spans, value.wanted))
        else:
            sent.append(_sent(value, where))
            layout.append(None)
    return sent, tuple(layout)


def _received(values: Sequence[Any], layout: Layout) -> list[object]:
    """The arguments of a call from what was sent for them."""
    args: list[object] = []
    left = iter(values)
    for joint in layout:
        if joint is None:
            args.append(next(left))
        else:
            pieces = [next(left) for _ in joint.spans]
            args.append(put_together(pieces, joint.spans, joint.wanted))
    return args


def _sent(value: object, where: str) -> object:
    return value.reference if isinstance(value, RayPending) else to_wire(value, where)


def _claimed(pending: Pending[R], phase: str) -> RayPending[R]:
    if not isinstance(pending, RayPending):
        raise ClusterError(
            phase,
            f"a result of group {pending.group}, which is no Ray group",
            "results of Ray groups",
            "Fetch it through its own group",
        )
    return pending


def _first_unfinished(claims: Sequence[RayPending[Any]]) -> RayPending[Any]:
    """The claim to blame for a timeout; the first one if it finished just now."""
    for claim in claims:
        if not ray.wait([claim.reference], timeout=0)[0]:
            return claim
    return claims[0]


def _raise_cause(error: RayError, claims: Sequence[RayPending[Any]], phase: str) -> NoReturn:
    """Raises what happened in a rank as itself, not in Ray's wrapping.

    An error passes through every call that depends on the failed one; each wraps it once more.
    """
    cause: BaseException = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    if isinstance(cause, RayActorError):
        ranks = {actor: rank for claim in claims for actor, rank in claim.ranks.items()}
        group, rank = ranks.get(cause.actor_id, (claims[0].group, claims[0].rank))
        raise WorkerDiedError(group, rank, phase, str(cause)) from None
    if isinstance(cause, RayError):
        raise RemoteCallError(phase, f"{type(cause).__name__}: {cause}") from None
    raise cause from None
