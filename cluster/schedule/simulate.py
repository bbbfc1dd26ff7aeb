"""A discrete-event simulator of schedules: start and end of every call.

    start = latest of   the process is free            (the calls before it on that process)
                        the results have arrived        (end of the maker + transfer)
                        the controller has asked        (its calls one after another, and its waits)

A schedule lists every call after all that it waits for, so one walk along the list meets the events
in an order in which each is known when it is needed: no queue, and the result is exact. Ranks of
one replica begin a stage together, because their collectives make them wait for the last one. The
calls of a chain (`cluster.schedule.chains`) are made as one, and their results leave together.

With every cost but the stages' own at zero, the end of the last call is the shortest time in which
this order can be worked through: the bound that measurements are held against.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cluster.schedule.chains import gangs_of, join_calls, processes_of
from cluster.schedule.program import Process, Team
from cluster.schedule.schedule import Call


class Cause(StrEnum):
    """The last event that a call waited for."""

    PROCESS = "process"
    RESULT = "result"
    CONTROLLER = "controller"


def _nothing(call: Call) -> float:
    return 0.0


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of stages, updates and transfers.

    Attributes:
        seconds: Of a call, on its process.
        result_bytes: That a call hands to each call that takes its result.
        bandwidth: Bytes a second on the way from process to process.
        latency_s: Of one transfer, whatever its size; also of a result that is empty.
        put_bandwidth: Bytes a second at which a process hands a result over; it does nothing else
            meanwhile.
        take_bandwidth: Bytes a second at which a process takes a result in; likewise.
        turn_s: Of each call, or of a chain of them, on its process, beside the work.
        call_s: Time in which the controller makes one call, or a chain of them.
        answer_s: From the end of a call until the controller knows of it.
    """

    seconds: Callable[[Call], float]
    result_bytes: Callable[[Call], float] = _nothing
    bandwidth: float = float("inf")
    latency_s: float = 0.0
    put_bandwidth: float = float("inf")
    take_bandwidth: float = float("inf")
    turn_s: float = 0.0
    call_s: float = 0.0
    answer_s: float = 0.0


def by_stage(seconds: Mapping[tuple[str, str], float]) -> Callable[[Call], float]:
    """Seconds of a call by its (role, stage): for one sample, or for an update."""

    def seconds_of(call: Call) -> float:
        return seconds.get((call.role, call.stage), 0.0) * max(1, call.num_computed)

    return seconds_of


@dataclass(frozen=True, slots=True)
class Span:
    """Start and end of one call.

    Attributes:
        call: The call.
        issued_s: When the controller made it.
        ready_s: When the last result that it takes was made; `issued_s` if it takes none.
        start_s: When it began, all of its results having arrived.
        end_s: When it had ended, and handed its own result over.
        cause: What it waited for last.
        after: Place of the call whose end it waited for; None at the beginning.
    """

    call: Call
    issued_s: float
    ready_s: float
    start_s: float
    end_s: float
    cause: Cause
    after: int | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Time of one process; the three parts add up to the whole.

    Attributes:
        role: Its role, or the pool that several roles share.
        rank: Its rank in it.
        busy_s: Working.
        transferring_s: Idle while what it waits for is on its way.
        waiting_s: Idle otherwise.
    """

    role: str
    rank: int
    busy_s: float
    transferring_s: float
    waiting_s: float

    @property
    def busy_share(self) -> float:
        """Part of the time that it works."""
        whole = self.busy_s + self.transferring_s + self.waiting_s
        return self.busy_s / whole if whole else 0.0


@dataclass(frozen=True, slots=True)
class Timeline:
    """A schedule with times.

    Attributes:
        spans: One a call, in the order of the calls.
        processes: The process of each.
    """

    spans: tuple[Span, ...]
    processes: tuple[Process, ...]

    @property
    def duration_s(self) -> float:
        """Until the last call has ended."""
        return max((span.end_s for span in self.spans), default=0.0)

    def iteration_ends_s(self) -> list[float]:
        """End of the last call of each iteration, in seconds."""
        ends = defaultdict[int, float](float)
        for span in self.spans:
            ends[span.call.iteration] = max(ends[span.call.iteration], span.end_s)
        return [ends[iteration] for iteration in sorted(ends)]

    @property
    def iteration_s(self) -> float:
        """Seconds an iteration in the long run: the first one, which starts from rest, left out."""
        return mean_period(self.iteration_ends_s())

    def usage(self) -> list[Usage]:
        """Returns the usage of each process from the start of the first call to the last end."""
        whole = self.duration_s
        by_process = defaultdict[Process, list[Span]](list)
        for span, process in zip(self.spans, self.processes, strict=True):
            by_process[process].append(span)
        found: list[Usage] = []
        for (role, rank), spans in sorted(by_process.items()):
            free_s = busy_s = transferring_s = 0.0
            for span in spans:
                idle_from = max(free_s, span.issued_s, span.ready_s)
                transferring_s += max(0.0, span.start_s - idle_from) * bool(span.call.inputs)
                busy_s += span.end_s - span.start_s
                free_s = span.end_s
            waiting_s = whole - busy_s - transferring_s
            found.append(Usage(role, rank, busy_s, transferring_s, waiting_s))
        return found

    def critical_path(self) -> list[int]:
        """Places of the calls that decided the duration, first to last."""
        if not self.spans:
            return []
        place: int | None = max(range(len(self.spans)), key=lambda at: self.spans[at].end_s)
        path: list[int] = []
        while place is not None:
            path.append(place)
            place = self.spans[place].after
        return path[::-1]


def mean_period(ends_s: Sequence[float]) -> float:
    """Mean distance of events; of a single one, its distance from 0."""
    if len(ends_s) < 2:
        return ends_s[0] if ends_s else 0.0
    return (ends_s[-1] - ends_s[0]) / (len(ends_s) - 1)


def simulate(
    calls: Sequence[Call], costs: Costs, teams: Mapping[str, Team], *, apart: bool = False
) -> Timeline:
    """Works through a schedule.

    Args:
        calls: In the order in which the controller makes them.
        costs: What takes time.
        teams: Processes by role, as the schedule was made for.
        apart: Whether each call is made by itself; otherwise as `join_calls` joins them.

    Returns:
        The same calls with times, the first one asked for at 0.
    """
    spans: list[Span] = []
    processes = processes_of(calls, teams)
    free = dict[Process, int]()
    handed_on = _handed_on(calls, processes)
    gangs = list(gangs_of(calls, teams))
    chains = () if apart else join_calls(calls, teams, gangs)
    first_of, last_of = _ends_of(chains, len(calls))
    now_s, waited = 0.0, None
    ends_s: list[float] = []
    put_s, take_s = _handing_s(costs, costs.put_bandwidth), _handing_s(costs, costs.take_bandwidth)
    for gang in gangs:
        begun: list[tuple[float, float]] = []
        start_s, cause, after = -1.0, Cause.CONTROLLER, None
        for place in gang:
            call, process = calls[place], processes[place]
            for one in call.waits_for:
                other = last_of[one]
                if ends_s[other] + costs.answer_s > now_s:
                    now_s, waited = ends_s[other] + costs.answer_s, other
            is_first = first_of[place] == place
            now_s += costs.call_s * is_first
            issued_s = now_s if is_first else spans[first_of[place]].issued_s
            if issued_s > start_s:
                start_s, cause, after = issued_s, Cause.CONTROLLER, waited
            last = free.get(process)
            if last is not None and ends_s[last] > start_s:
                start_s, cause, after = ends_s[last], Cause.PROCESS, last
            for taken in call.inputs:
                stays = processes[taken] == process
                arrival_s = ends_s[taken if stays else last_of[taken]]
                arrival_s += 0.0 if stays else _hop_s(calls[taken], costs)
                if arrival_s > start_s:
                    start_s, cause, after = arrival_s, Cause.RESULT, taken
            ready_s = max([ends_s[taken] for taken in call.inputs], default=issued_s)
            begun.append((issued_s, ready_s))
        for place, (issued_s, ready_s) in zip(gang, begun, strict=True):
            call, process = calls[place], processes[place]
            free[process] = place
            turn_s = costs.turn_s * (first_of[place] == place)
            from_others = [calls[one] for one in call.inputs if processes[one] != process]
            end_s = start_s + turn_s + take_s(from_others) + costs.seconds(call)
            if place in handed_on:
                end_s += put_s([call])
            ends_s.append(end_s)
            spans.append(Span(call, issued_s, ready_s, start_s, end_s, cause, after))
    return Timeline(tuple(spans), tuple(processes))


def _ends_of(
    chains: Iterable[Sequence[int]], num_calls: int
) -> tuple[Sequence[int], Sequence[int]]:
    """Places of the first and of the last call of the chain that each call is made in."""
    first_of, last_of = list(range(num_calls)), list(range(num_calls))
    for chain in chains:
        for place in chain:
            first_of[place], last_of[place] = chain[0], chain[-1]
    return first_of, last_of


def _handing_s(costs: Costs, bandwidth: float) -> Callable[[Sequence[Call]], float]:
    """Returns the seconds in which a process hands results over, or takes them in."""
    if bandwidth == float("inf"):
        return lambda makers: 0.0
    return lambda makers: sum(costs.result_bytes(maker) for maker in makers) / bandwidth


def _handed_on(calls: Sequence[Call], processes: Sequence[Process]) -> set[int]:
    """Places of the calls whose result another process takes."""
    return {
        taken
        for place, call in enumerate(calls)
        for taken in call.inputs
        if processes[taken] != processes[place]
    }


def _hop_s(maker: Call, costs: Costs) -> float:
    """Seconds on the way from process to process."""
    return costs.latency_s + costs.result_bytes(maker) / costs.bandwidth
