"""Calls that are made as one: what goes to a process in a row, where joining it delays nothing.

    one process has all roles    r0 d0 s0 t0 l0 | r1 d1 s1 t1 l1 + both reports | both steps
    generator and teacher        r0 d0 | r1 d1 | l0 ...

A call between processes costs a millisecond or two, whatever it is about. The calls of a *chain*
arrive together and are worked through in order. So all that they take has to be there before the
first one starts, and what they return arrives with the last one. Calls are joined only where
neither changes a start:

* What a later call of the chain takes from other processes has been made before its first one can
  start. A stage that takes something from outside of the program, such as captions, begins a chain.
* Whatever takes a result of an earlier call of the chain, or waits for it, has to wait for the last
  one anyway.

The order of the calls on each process stays, and so do bits, memory and what errors name. Schedule,
simulator and planner share this function.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from cluster.schedule.program import Process, Team
from cluster.schedule.schedule import Call


def join_calls(
    calls: Sequence[Call], teams: Mapping[str, Team], gangs: Sequence[range] | None = None
) -> list[tuple[int, ...]]:
    """Places of the calls that are made as one, in the order in which to make them.

    Args:
        calls: A schedule.
        teams: Processes by role, as the schedule was made for; of a role without an entry, each
            call is made by itself.
        gangs: Its gangs, if they are known: see `gangs_of`.
    """
    if any(call.role not in teams for call in calls):
        return [(place,) for place in range(len(calls))]
    return _Joining(calls, teams, list(gangs or gangs_of(calls, teams))).chains()


def processes_of(calls: Sequence[Call], teams: Mapping[str, Team]) -> list[Process]:
    """The process of each call."""
    found: dict[tuple[str, int], Process] = {}
    processes: list[Process] = []
    for call in calls:
        rank = (call.role, call.rank)
        if rank not in found:
            found[rank] = teams[call.role].process(*rank)
        processes.append(found[rank])
    return processes


def gangs_of(calls: Sequence[Call], teams: Mapping[str, Team]) -> Iterator[range]:
    """Places of calls that begin together: one stage on the ranks of one replica."""
    first, own = 0, None
    for place, call in enumerate(calls):
        gang = _gang_of(call, teams)
        if gang != own:
            if place:
                yield range(first, place)
            first, own = place, gang
    if calls:
        yield range(first, len(calls))


def _gang_of(call: Call, teams: Mapping[str, Team]) -> tuple[object, ...]:
    replica = teams[call.role].replica_of(call.rank)
    return call.iteration, call.part, call.role, replica, call.stage, call.micro_batch


class _Joining:
    """Gangs of calls, by number, and what comes before and after each."""

    def __init__(
        self, calls: Sequence[Call], teams: Mapping[str, Team], gangs: list[range]
    ) -> None:
        self._calls = calls
        self._teams = teams
        # By place of a call: each is asked for many times.
        self._processes = processes_of(calls, teams)
        self._gangs = gangs
        number = {place: at for at, gang in enumerate(self._gangs) for place in gang}
        self._takes: list[set[int]] = []
        self._users = defaultdict[int, set[int]](set)
        self._segments: list[int] = []
        # As bits, because there are many of them.
        self._before: list[int] = []
        last_on: dict[Process, int] = {}
        waited = segment = 0
        for at, gang in enumerate(self._gangs):
            own = [calls[place] for place in gang]
            takes = {number[taken] for call in own for taken in call.inputs}
            waits = {number[other] for call in own for other in call.waits_for}
            for used in takes | waits:
                self._users[used].add(at)
            waited |= self._closed(waits)
            segment += bool(waits)
            previous = last_on.get(self._process(at))
            earlier = takes if previous is None else takes | {previous}
            self._takes.append(takes)
            self._segments.append(segment)
            self._before.append(waited | self._closed(earlier))
            last_on[self._process(at)] = at

    def chains(self) -> list[tuple[int, ...]]:
        """The chain of every rank, by its first call."""
        chains: list[list[int]] = []
        open_ones: dict[Process, list[int]] = {}
        for at in range(len(self._gangs)):
            chain = open_ones.get(self._process(at))
            if chain is not None and self._joins(chain, at):
                chain.append(at)
            else:
                chains.append([at])
                open_ones[self._process(at)] = chains[-1]
        return [places for chain in chains for places in self._by_rank(chain)]

    def _joins(self, chain: Sequence[int], at: int) -> bool:
        head, call = self._first(chain[0]), self._first(at)
        if self._segments[chain[0]] != self._segments[at] or head.iteration != call.iteration:
            return False
        if call.fed and not any(_of_same_samples(self._first(one), call) for one in chain):
            return False
        outside = self._takes[at].difference(chain)
        if not all(self._before[chain[0]] >> taken & 1 for taken in outside):
            return False
        users = {user for one in chain for user in self._users[one]} - {*chain, at}
        return all(self._before[user] >> at & 1 for user in users) and self._hands_on(chain, at)

    def _hands_on(self, chain: Sequence[int], at: int) -> bool:
        """Returns True if what a gang takes from a chain is in its own process already."""
        inside = {place for one in chain for place in self._gangs[one]}
        for place in self._gangs[at]:
            for taken in inside.intersection(self._calls[place].inputs):
                own, other = (self._calls[one] for one in (place, taken))
                shares = self._teams[own.role].homes and self._teams[other.role].homes
                if not shares or self._processes[place] != self._processes[taken]:
                    return False
        return True

    def _by_rank(self, chain: Sequence[int]) -> list[tuple[int, ...]]:
        if len(chain) == 1:
            return [(place,) for place in self._gangs[chain[0]]]
        ranks = defaultdict[Process, list[int]](list)
        for at in chain:
            for place in self._gangs[at]:
                ranks[self._processes[place]].append(place)
        return [tuple(places) for places in ranks.values()]

    def _closed(self, gangs: set[int]) -> int:
        """These gangs and all that come before them, as bits."""
        found = 0
        for at in gangs:
            found |= self._before[at] | 1 << at
        return found

    def _first(self, at: int) -> Call:
        return self._calls[self._gangs[at][0]]

    def _process(self, at: int) -> Process:
        return self._processes[self._gangs[at][0]]


def _of_same_samples(one: Call, other: Call) -> bool:
    """Returns True if two calls take the same captions."""
    key = (one.part, one.micro_batch)
    return one.fed and key == (other.part, other.micro_batch)
