"""A worker group whose ranks are Ray actors.

    controller                 object store               host of a rank (an actor)
    call_rank(method, args) -- to_wire --> reference ---> from_wire, method, to_wire -- reference
    fetch(future) <------------------------ small values only -----------------------'

Arguments that are future go as references at the top level of the call: Ray waits for them at the
receiver's end and moves the values from rank to rank, past the controller. The ranks of a group
have processes of their own, or share them with other groups: see `cluster.ray.host`. Calls that are
made together (`cluster.worker_group.made_together`) are one call of Ray: see `cluster.ray.batch`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, TypeVarTuple

import ray
from ray.exceptions import (
    GetTimeoutError,
    RayError,
)

from cluster.errors import (
    CallTimeoutError,
    ClusterError,
    RemoteCallError,
    StartTimeoutError,
)
from cluster.joined import JoinedFuture
from cluster.ray.batch import CallAnswer, HostBatch
from cluster.ray.direct import Direct
from cluster.ray.failures import OPEN_GROUPS, first_failure, late_call, raise_cause
from cluster.ray.future import RayFuture
from cluster.ray.host import ArgLayout, CallSpec, LocalRef, SplitArgument, part_of_batch
from cluster.ray.hosts import Hosts, OwnedResult
from cluster.ray.starting import printed_at_start
from cluster.ray.topology import Placement
from cluster.spans import Clock, Work, current_label
from cluster.transfer import array_in, from_wire, pack, to_wire, unpack
from cluster.worker_group import (
    Future,
    R,
    W,
    WorkerGroup,
    current_batch,
    current_takers,
    refuse_array,
)

Ts = TypeVarTuple("Ts")

_ANSWER_TIMEOUT_S = 600.0
_NOT_STARTED = "its process has not started"


@dataclass(frozen=True, slots=True)
class _Seat:
    """Process of a rank: the pool's, and its index there."""

    hosts: Hosts
    index: int

    @property
    def actor(self) -> Any:  # noqa: ANN401 - Ray's handle
        return self.hosts.actors[self.index]

    def worker(self, group: str) -> str:
        return self.hosts.worker_of(group)

    @property
    def process(self) -> tuple[str, int]:
        return self.hosts.pool, self.index


class RayWorkerGroup(WorkerGroup[W]):
    """Ranks in Ray actors, each in its bundle of the run's placement.

    The constructor returns at once and the ranks build their workers side by side: start all
    groups, then `wait_ready` for each.

    Args:
        name: What errors and reports call the group.
        factory: Module-level function that builds the worker inside the rank's process.
        args: Its arguments; plain picklable values.
        placement: Reserved resources; or the pools of processes that the group shares with others,
            one rank a process, in this order.
        pool: The pool whose ranks these are; None: the one called like the group.
        replicas: Parts of the group whose ranks run collectives among themselves; None: no ranks
            do.
        bf16_kinds: Kinds of tensors that its results carry in bfloat16; see `cluster.transfer`.
        direct: Which results go past the object store; its own processes then have to be able to.
    """

    def __init__(
        self,
        name: str,
        factory: Callable[[*Ts], W],
        args: tuple[*Ts],
        placement: Placement | Hosts | Sequence[Hosts],
        pool: str | None = None,
        *,
        replicas: int | None = None,
        bf16_kinds: AbstractSet[str] = frozenset(),
        direct: Direct | None = None,
    ) -> None:
        if isinstance(placement, Placement):
            pool = name if pool is None else pool
            ranks = placement.pool(pool).num_ranks
            transport = None if direct is None else direct.transport
            size = 1 if replicas is None else ranks // replicas
            placement = Hosts(pool, placement, size, transport=transport)
        pools = [placement] if isinstance(placement, Hosts) else list(placement)
        self._seats = [_Seat(hosts, index) for hosts in pools for index in range(hosts.size)]
        self._bf16_kinds = frozenset(bf16_kinds)
        self._direct = direct
        self._factory = factory
        self._args: tuple[Any, ...] = args
        super().__init__(name, len(self._seats))
        OPEN_GROUPS.add(self)
        self._ready = [self._build(rank) for rank in range(self.size)]

    @property
    def pools(self) -> list[Hosts]:
        """The pools of processes that its ranks live in."""
        return list(dict.fromkeys(seat.hosts for seat in self._seats))

    def ranks_in(self, processes: AbstractSet[tuple[str, int]]) -> list[int]:
        """Its ranks in these processes.

        Args:
            processes: (pool, index) of each.
        """
        return [rank for rank, seat in enumerate(self._seats) if seat.process in processes]

    def rebuild(self, ranks: Sequence[int], args: tuple[Any, ...] | None = None) -> None:
        """Builds the workers of these ranks in their new processes; `wait_ready` waits for them.

        Args:
            ranks: Ranks whose processes have been started again.
            args: New arguments of the factory; None: as before.
        """
        self._args = self._args if args is None else args
        for rank in ranks:
            self._ready[rank] = self._build(rank)

    def _build(self, rank: int) -> RayFuture[Any]:
        seat = self._seats[rank]
        rendezvous = seat.hosts.rendezvous[seat.index]
        # A partial has no module of its own.
        module = getattr(self._factory, "func", self._factory).__module__
        seat.actor.import_factory.remote(module)
        built = seat.actor.build.remote(
            seat.worker(self.name), self._factory, self._args, rendezvous, rank
        )
        return self._pending(rank, "build", built, [])

    def wait_ready(self, timeout_s: float) -> None:
        """Waits until every rank has built its worker; raises what the factory raised.

        Raises:
            StartTimeoutError: Not all were there in time; says of each rank what is missing.
        """
        try:
            self.fetch(self._ready, timeout_s, f"starting the {self.size} ranks of {self.name}")
        except CallTimeoutError:
            states = [self._start_state(rank) for rank in range(self.size)]
            printed = printed_at_start() if _NOT_STARTED in states else ""
            raise StartTimeoutError(self.name, tuple(states), timeout_s, printed) from None

    def fetch(self, futures: Sequence[Future[R]], timeout_s: float, attempted: str) -> list[R]:
        """Waits for small results; see `WorkerGroup.fetch`."""
        futures = [_as_future(future, attempted) for future in futures]
        references = list(dict.fromkeys(future.reference for future in futures))
        try:
            answers = dict(zip(references, ray.get(references, timeout=timeout_s), strict=True))
        except GetTimeoutError:
            raise CallTimeoutError(*late_call(futures), attempted, timeout_s) from None
        except RayError as error:
            # Ray tells the failure that it met first; the first future's may be its cause.
            raise_cause(first_failure(futures) or error, futures, attempted)
        wires = _own_parts(futures, answers, attempted)
        for future, wire in zip(futures, wires, strict=True):
            where = "result" if isinstance(wire, LocalRef) else array_in(wire)
            if where is not None:
                raise refuse_array(future, where, attempted)
        return [from_wire(wire) for wire in wires]

    def is_done(self, future: Future[Any]) -> bool:
        """Returns True once the result is in the object store, or will never be."""
        reference = _as_future(future, "looking whether a call is done").reference
        done, _ = ray.wait([reference], timeout=0, fetch_local=False)
        return bool(done)

    def ask_work(self) -> list[Future[list[Work]]]:
        """Asks every rank what it has done since this was last asked."""
        return [
            self._pending(
                rank, "take_work", seat.actor.take_work.remote(seat.worker(self.name)), []
            )
            for rank, seat in enumerate(self._seats)
        ]

    def clocks(self) -> list[Clock]:
        """The clock of each rank."""
        asked = [
            self._pending(rank, "clock", seat.actor.clock.remote(), [])
            for rank, seat in enumerate(self._seats)
        ]
        return self.fetch(asked, _ANSWER_TIMEOUT_S, f"reading the clocks of {self.name}")

    def machines(self) -> list[str]:
        """Ray's name of the machine of each rank."""
        return ray.get([seat.hosts.places[seat.index] for seat in self._seats])

    def process_ids(self) -> list[int]:
        """Process id of each rank, on its machine; for `py-spy` and for tests."""
        asked = [
            self._pending(rank, "process_id", seat.actor.process_id.remote(), [])
            for rank, seat in enumerate(self._seats)
        ]
        return self.fetch(asked, _ANSWER_TIMEOUT_S, f"finding the processes of {self.name}")

    def processes(self) -> Iterator[tuple[Any, str]]:
        """Ray's handle of each rank's process, and a name for those it runs collectives with.

        The name is empty where it runs none.
        """
        for seat in self._seats:
            if seat.hosts.actors:
                rendezvous = seat.hosts.rendezvous[seat.index]
                yield seat.actor, rendezvous.hex() if rendezvous is not None else ""

    def close(self) -> None:
        """Ends the processes; what they hold is gone. Harmless when repeated."""
        for seat in self._seats:
            seat.hosts.close()

    def _submit(
        self, rank: int, method: str, args: Sequence[object], keywords: Mapping[str, object]
    ) -> RayFuture[Any]:
        seat = self._seats[rank]
        sent, layout, entries = self._laid_out(rank, args, method)
        named = {
            name: self._sent(rank, value, f"{name} of {method}()")
            for name, value in keywords.items()
        }
        keep, send, apart = _fate(seat)
        owned = (
            OwnedResult(seat.hosts, seat.index, seat.hosts.next_number(), self._bf16_kinds)
            if keep
            else None
        )
        via = self._direct if self._direct and method in self._direct.methods else None
        spec = CallSpec(
            seat.worker(self.name),
            method,
            layout,
            current_label(),
            self._bf16_kinds,
            via is not None,
            None if owned is None else owned.number,
            send,
            seat.hosts.take_dropped(seat.index),
            entries,
            apart,
        )
        inputs = [*args, *keywords.values()]
        if batch := self._batch(seat):
            assert not named, "calls that are made together take no keywords"
            place = (self.name, rank)
            answer, entry = batch.add(place, spec, sent), batch.num_calls - 1
            other = batch.add_apart(place) if send or apart else None
            if apart:
                return self._pending(rank, method, other or answer, inputs)
            return self._pending(rank, method, answer, inputs, owned, other, entry)
        run, packed = seat.actor.run, pack(spec)
        run = run if via is None else run.options(tensor_transport=via.transport)
        if not send:
            return self._pending(rank, method, run.remote(packed, *sent, **named), inputs, owned)
        kept, wire = run.options(num_returns=2).remote(packed, *sent, **named)
        return self._pending(
            rank, method, kept, inputs, owned, CallAnswer([(self.name, rank)], wire)
        )

    def _batch(self, seat: _Seat) -> HostBatch | None:
        """The calls of a process that are held back now; None if they are made at once."""
        calls = current_batch()
        # Ray gives a call one result where it goes past the object store.
        if calls is None or calls.process != seat.process or self._direct is not None:
            return None
        if calls.batch is None:
            calls.batch = HostBatch(seat.hosts, seat.index)
        assert isinstance(calls.batch, HostBatch), "the process belongs to Ray"
        return calls.batch

    def _pending(
        self,
        rank: int,
        method: str,
        answer: CallAnswer | ray.ObjectRef,
        inputs: Sequence[object],
        owned: OwnedResult | None = None,
        sent: CallAnswer | None = None,
        entry: int | None = None,
    ) -> RayFuture[Any]:
        if not isinstance(answer, CallAnswer):
            answer = CallAnswer([(self.name, rank)], answer)
        ranks = {self._seats[rank].actor._actor_id.hex(): (self.name, rank)}
        for value in inputs:
            for piece in value.pieces if isinstance(value, JoinedFuture) else (value,):
                if isinstance(piece, RayFuture):
                    ranks |= piece.ranks
        return RayFuture(self.name, rank, method, answer, ranks, owned, sent, entry)

    def _laid_out(
        self, rank: int, args: Sequence[object], method: str
    ) -> tuple[list[object], ArgLayout, tuple[int | None, ...]]:
        """Returns what is sent for the arguments of a call, and how the receiver assembles them.

        Ray resolves references at the top level of a call alone, so the pieces of a joined value
        are sent as arguments of their own.
        """
        sent: list[object] = []
        entries: list[int | None] = []
        layout: list[SplitArgument | None] = []
        for index, value in enumerate(args):
            where = f"argument {index} of {method}()"
            is_joined = isinstance(value, JoinedFuture)
            for piece in value.pieces if is_joined else (value,):
                sent.append(self._sent(rank, piece, where))
                entries.append(_entry_of(piece, sent[-1]))
            layout.append(SplitArgument(value.spans, value.wanted) if is_joined else None)
        some = tuple(entries) if any(entry is not None for entry in entries) else ()
        return sent, tuple(layout), some

    def _sent(self, rank: int, value: object, where: str) -> object:
        if not isinstance(value, RayFuture):
            return pack(to_wire(value, where))
        owned = value.owned
        seat = self._seats[rank]
        if owned is None or owned.actor is seat.actor:
            batch = self._batch(seat)
            if owned is not None and batch is not None and batch.owns(value.answer):
                # Made by an earlier call of the same batch, which has no reference yet.
                return LocalRef(owned.number)
            return value.reference
        if value.sent is not None:
            return value.sent.require()
        # It may have stayed in another process, which sends it now.
        return owned.actor.deliver.remote(value.reference, owned.bf16_kinds, value.entry)

    def _start_state(self, rank: int) -> str:
        """Returns the state of a rank that is being started."""
        seat = self._seats[rank]
        where, ready = seat.hosts.places[seat.index], self._ready[rank].reference
        if not ray.wait([where], timeout=0)[0]:
            return _NOT_STARTED
        try:
            machine = ray.get(where)
        except RayError as error:
            return f"its process has ended: {type(error).__name__}"
        built = bool(ray.wait([ready], timeout=0)[0])
        return "ready" if built else f"its process on machine {machine} is still building"


def _fate(seat: _Seat) -> tuple[bool, bool, bool]:
    """Returns what becomes of the result of a call.

    Returns:
        Whether it stays in its process, whether it is sent as well, and whether it is sent alone.
    """
    takers = current_takers()
    if not seat.hosts.shared:
        return False, False, bool(takers)
    if takers is None:
        return True, False, False
    elsewhere = bool(takers - {seat.process})
    # A result that nobody takes is a report, which the controller fetches.
    keep = seat.process in takers
    return keep, keep and elsewhere, elsewhere and not keep


def _own_parts(
    futures: Sequence[RayFuture[Any]], answers: Mapping[ray.ObjectRef, Any], attempted: str
) -> list[Any]:
    """The result of each call, of what several may have returned together."""
    found: dict[ray.ObjectRef, Any] = {}
    for future in futures:
        reference = future.reference
        if reference in found:
            continue
        try:
            found[reference] = unpack(answers[reference])
        except Exception as error:
            raise RemoteCallError(
                attempted,
                f"the result of {future.method}() of {future.group} rank {future.rank} cannot be "
                f"read here: {type(error).__name__}: {error}",
            ) from error
    return [part_of_batch(found[future.reference], future.entry) for future in futures]


def _entry_of(value: object, sent: object) -> int | None:
    """Number of a result among a batch's small ones, where the reference to all of them is sent."""
    if isinstance(value, RayFuture) and isinstance(sent, ray.ObjectRef):
        return value.entry if sent == value.answer.reference else None
    return None


def _as_future(future: Future[R], attempted: str) -> RayFuture[R]:
    if not isinstance(future, RayFuture):
        raise ClusterError(
            attempted,
            f"a result of group {future.group}, which is not a Ray group",
            "results of Ray groups",
            "Fetch it through its own group",
        )
    return future
