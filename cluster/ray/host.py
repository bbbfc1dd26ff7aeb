"""The inside of a pool's process: it builds workers and runs their methods, one after another.

    Hosts              the controller's side: `cluster.ray.hosts`
      Host             one process
        "painter"      a worker of one group
        "judge"        of another one, where groups share their processes

What the workers of one process hand to one another stays in it: the result is kept under a number,
and only a marker goes to the object store. It is dropped when the controller's last future of it is
gone. Where the caller says which processes will take it (`cluster.worker_group.taken_by`), it is
sent with the call itself, or not kept; otherwise it is sent when another process asks for it, after
all calls that were made before.

Ranks that run collectives among themselves meet before their first worker is built.
"""

import os
import pickle
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, cast

import ray
import ray.util
import torch

from cluster.errors import ClusterError, RemoteCallError
from cluster.joined import Span, concatenate
from cluster.ray.direct import ready_to_hand_over, require_transport
from cluster.ray.gpus import take_own_gpu
from cluster.ray.orphans import end_with_parent
from cluster.ray.progress import ProgressReporter
from cluster.ray.rendezvous import Rendezvous, join_rendezvous, open_rendezvous
from cluster.spans import Clock, Label, Work, read_clock
from cluster.transfer import (
    array_bytes,
    array_in,
    from_wire,
    pack,
    require_constants,
    to_wire,
    unpack,
)
from sgmd_core.collector import paused_collector

_COLLECTIVE_TIMEOUT_S = 600.0
_MOST_WORK_KEPT = 10_000


@dataclass(frozen=True, slots=True)
class SplitArgument:
    """An argument that the receiver concatenates from several values."""

    spans: tuple[Span, ...]
    wanted: Span


ArgLayout = tuple[SplitArgument | None, ...]
"""One entry an argument; None for one that was sent as it is."""


@dataclass(frozen=True, slots=True)
class LocalRef:
    """Stands for a result that has stayed in its process."""

    number: int


UNREAD = LocalRef(-1)
"""Stands for a result with arrays that nobody takes."""


class CallSpec(NamedTuple):
    """A method call: name, arguments, label, and what becomes of the result.

    Attributes:
        worker: Group whose worker is meant.
        method: Its method.
        layout: How the arguments arrive.
        label: What the call is part of.
        bf16_kinds: Kinds of tensors that the result carries in bfloat16, if it is sent.
        direct: Whether the result goes past the object store, as it is.
        keep: Number under which a result that holds arrays stays here; None: it is sent.
        send: Whether a result that stays here is sent as well, as a second return value.
        drop: Numbers of kept results that are no longer needed.
        entries: For each value that is sent, which of the small results of a batch it is; None: the
            value itself. Empty: all are themselves.
        apart: In a batch, whether the result goes to other processes.
    """

    worker: str
    method: str
    layout: ArgLayout
    label: Label
    bf16_kinds: frozenset[str]
    direct: bool
    keep: int | None
    send: bool
    drop: tuple[int, ...]
    entries: tuple[int | None, ...] = ()
    apart: bool = False

    @property
    def num_sent(self) -> int:
        """Values that are sent for its arguments."""
        return sum(1 if split is None else len(split.spans) for split in self.layout)


class Host:
    """The inside of a rank's process.

    Args:
        pool: Name of its pool.
        rank: Its rank.
        world_size: Ranks that run collectives with it.
        transport: Ray's name of the way past the object store that it must have; None: none.
    """

    def __init__(self, pool: str, rank: int, world_size: int, transport: str | None) -> None:
        end_with_parent()
        self._place = f"{pool} rank {rank}"
        self._transport = transport
        self._rank = rank
        self._meeting_size = world_size
        self._has_met = False
        self._workers: dict[str, Any] = {}
        self._unbuilt: dict[str, str] = {}
        self._ranks: dict[str, int] = {}
        self._kept: dict[int, object] = {}
        self._received_bytes = 0
        self._store: Any = None
        self._works: deque[Work] = deque(maxlen=_MOST_WORK_KEPT)
        self._progress = ProgressReporter(self._ranks)
        self._progress.start()

    def __repr__(self) -> str:
        """Heads the lines that this process writes to the controller's terminal."""
        return self._place

    def place(self) -> str:
        """Ray's name of the machine that this process is on."""
        return ray.get_runtime_context().get_node_id()

    def clock(self) -> Clock:
        """Returns the offset from this process's clock to the time of day."""
        return read_clock(self.place())

    def open_rendezvous(self, *places: str) -> Rendezvous:
        """Opens the place where the ranks meet, and keeps it; asked of the first one.

        Args:
            places: Machine of every rank.
        """
        self._store, rendezvous = open_rendezvous(
            len(places),
            ray.util.get_node_ip_address(),
            on_one_machine=len(set(places)) == 1,
            timeout_s=_COLLECTIVE_TIMEOUT_S,
        )
        return rendezvous

    def import_factory(self, module: str) -> None:
        """Imports the module of a factory, and all that it needs, before the factory arrives.

        Ray would import it, too, but with the collector of cycles looking at all of it again and
        again: a fifth of the time.
        """
        # Where it cannot be imported, building says so.
        with suppress(Exception), paused_collector():
            import_module(module)

    def build(
        self,
        worker: str,
        factory: Callable[..., Any],
        args: tuple[Any, ...],
        rendezvous: Rendezvous | None,
        own_rank: int,
    ) -> None:
        """Makes a worker; not in the constructor, where an error would lose its type."""
        self._ranks[worker] = own_rank
        self._progress.begin(worker, "build", Label())
        try:
            if self._transport is not None:
                require_transport(self._transport, self._place)
            if rendezvous is not None and not self._has_met:
                take_own_gpu()
                rank = self._rank % self._meeting_size
                join_rendezvous(rendezvous, rank, _COLLECTIVE_TIMEOUT_S, self._store)
                self._has_met = True
            self._workers[worker] = factory(*args)
        except Exception as error:
            # A partial has no name of its own.
            name = getattr(factory, "func", factory).__name__
            self._unbuilt[worker] = f"{type(error).__name__}: {error}"
            raise self._portable(error, self._in_words(worker, name), Label()) from None
        finally:
            self._progress.end()

    def run(self, packed_spec: object, /, *sent: object, **keywords: object) -> object:
        """Runs one method on values from the wire; its result goes back onto the wire, or stays.

        Args:
            packed_spec: The call, packed.
            sent: Values from the wire for its arguments, packed.
            keywords: Values for those that it takes by name, packed.

        Returns:
            What it returned, packed; of a call whose result stays and is sent, both.
        """
        spec: CallSpec = unpack(packed_spec)
        result = self._run(spec, sent, keywords)
        with self._packing([spec]):
            if spec.direct:
                # Bytes are always a pickle to those who receive them.
                return pack(result) if type(result) is bytes else result
            if not spec.send:
                return pack(result)
            own, wire = cast(tuple[object, object], result)
            packed = pack(wire)
            return packed if own is wire else pack(own), packed

    def run_batch(self, packed_specs: object, /, *sent: object) -> object:
        """Runs several methods, one after another; see `cluster.ray.batch`.

        Args:
            packed_specs: The calls, packed.
            sent: Values from the wire for the arguments of all, packed.

        Returns:
            The small results, one a call, where one that stays here has its number and one that
            goes to other processes has None; and one more value for each of the latter. Packed.
        """
        specs: Sequence[CallSpec] = unpack(packed_specs)
        values = iter(sent)
        small: list[object] = []
        apart: list[object] = []
        for spec in specs:
            result = self._run(spec, [next(values) for _ in range(spec.num_sent)], {})
            if spec.send:
                result, wire = cast(tuple[object, object], result)
                apart.append(wire)
            elif spec.apart:
                apart.append(result)
                result = None
            # Where nobody takes a result, that of a rank that stands in, it goes nowhere.
            small.append(UNREAD if array_in(result) is not None else result)
        with self._packing(specs):
            return (pack(tuple(small)), *map(pack, apart)) if apart else pack(tuple(small))

    def _run(
        self, spec: CallSpec, sent: Sequence[object], keywords: Mapping[str, object]
    ) -> object:
        times = [time.monotonic()]
        self._progress.begin(spec.worker, spec.method, spec.label)
        for number in spec.drop:
            self._kept.pop(number, None)
        method = spec.method
        try:
            worker = self._workers.get(spec.worker)
            if worker is None:
                raise ClusterError(
                    f"calling {self._in_words(spec.worker, method)}",
                    f"no worker: building it has failed: {self._unbuilt.get(spec.worker, '')}",
                    "a worker that its factory can build",
                )
            named = {name: self._arrived(unpack(value)) for name, value in keywords.items()}
            args = _put_in_place(self._arrived_ones(sent, spec.entries), spec.layout)
            times.append(time.monotonic())
            result = getattr(worker, method)(*args, **named)
            if torch.cuda.is_initialized():
                # A call has ended when the GPU has; the next one would be blamed for it otherwise.
                torch.cuda.synchronize()
            times.append(time.monotonic())
            where = f"the result of {method}()"
            if spec.direct:
                return ready_to_hand_over(result, where)
            if spec.keep is None or array_in(result) is None:
                if spec.keep is not None:
                    # A later call of the same batch has nothing else to take it from.
                    self._kept[spec.keep] = result
                wire = to_wire(result, where, spec.bf16_kinds)
                return (wire, wire) if spec.send else wire
            # Not put on the wire, which would copy it from a GPU to main memory for nothing.
            require_constants(result, where)
            self._kept[spec.keep] = result
            marker = LocalRef(spec.keep)
            return (marker, to_wire(result, where, spec.bf16_kinds)) if spec.send else marker
        except Exception as error:
            raise self._portable(error, self._in_words(spec.worker, method), spec.label) from None
        finally:
            self._progress.end()
            # What was not reached took no time.
            times += [time.monotonic()] * (4 - len(times))
            rank = self._rank_of(spec.worker)
            self._works.append(Work(spec.worker, rank, method, spec.label, *times))

    def deliver(
        self, value: object, bf16_kinds: frozenset[str], entry: int | None = None
    ) -> object:
        """A result of this process for another one, kept or not.

        Args:
            value: What the call returned, packed.
            bf16_kinds: Kinds of tensors that travel in bfloat16.
            entry: Which of the small results of a batch it is; None: the value itself.
        """
        try:
            own = part_of_batch(unpack(value), entry)
            if isinstance(own, LocalRef):
                own = to_wire(self._arrived(own), "a kept result", bf16_kinds)
            return pack(own)
        except Exception as error:
            where = f"sending a result of {self._place} to another process"
            raise self._portable(error, where, Label()) from None

    def take_work(self, worker: str) -> list[Work]:
        """Returns the work of this worker since the last call."""
        own = [work for work in self._works if work.role == worker]
        others = [work for work in self._works if work.role != worker]
        self._works = deque(others, maxlen=_MOST_WORK_KEPT)
        return own

    def keeps(self, number: int) -> bool:
        """Returns True if a result has stayed in this process; for tests."""
        return number in self._kept

    def received_bytes(self) -> int:
        """Bytes of all arrays that calls took from the wire; for tests."""
        return self._received_bytes

    def process_id(self) -> int:
        """Id of this process."""
        return os.getpid()

    def _rank_of(self, worker: str) -> int:
        """Rank of this process in a group; a group on several pools counts on."""
        return self._ranks.get(worker, self._rank)

    def _arrived_ones(self, sent: Sequence[object], entries: Sequence[int | None]) -> list[object]:
        """Values from the wire, picked out of a batch's small results where they are among them."""
        pairs = zip(sent, entries or [None] * len(sent), strict=True)
        return [self._arrived(part_of_batch(unpack(value), entry)) for value, entry in pairs]

    def _arrived(self, value: object) -> object:
        if isinstance(value, LocalRef):
            return self._kept[value.number]
        self._received_bytes += array_bytes(value)
        return from_wire(value)

    @contextmanager
    def _packing(self, specs: Sequence[CallSpec]) -> Iterator[None]:
        """Says of an error inside whose results were packed."""
        try:
            yield
        except Exception as error:
            calls = " and ".join(self._in_words(spec.worker, spec.method) for spec in specs)
            labels = {spec.label for spec in specs}
            label = labels.pop() if len(labels) == 1 else Label()
            raise self._portable(error, f"packing the result of {calls}", label) from None

    def _in_words(self, worker: str, method: str) -> str:
        return f"{method}() of {worker} rank {self._rank_of(worker)}"

    def _portable(self, error: Exception, where: str, label: Label) -> Exception:
        """The error with a note of where, or its words if it cannot be rebuilt elsewhere."""
        where = ", ".join(filter(None, (where, label.in_words)))
        trace = "".join(traceback.format_exception(error))
        note = f"raised in {where}:\n{trace}"
        error.add_note(note)
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            found = f"{type(error).__name__}: {error}\n{trace}"
            told = RemoteCallError(f"running {where}", found)
            told.add_note(note)
            return told
        return error


def part_of_batch(value: object, entry: int | None) -> object:
    """Returns one of a batch's small results; without a number, the value itself.

    Args:
        value: Small results of a batch; or the result of one call.
        entry: Which of them; None: the value is that of one call.
    """
    return value if entry is None else cast(Sequence[object], value)[entry]


def _put_in_place(values: Sequence[Any], layout: ArgLayout) -> list[object]:
    """The arguments of a call from what was sent for them."""
    args: list[object] = []
    left = iter(values)
    for split in layout:
        if split is None:
            args.append(next(left))
        else:
            pieces = [next(left) for _ in split.spans]
            args.append(concatenate(pieces, split.spans, split.wanted))
    return args
