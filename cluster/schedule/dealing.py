"""Order of a pass whose roles share pools: which copy takes which micro-batch, and when.

    learn    r0 d0 r1 d1 | r2 l0 | d2 ...       generator, and a copy of the teacher
    score          s0 t0 | s1 t1 | d3 s2 ...    fake score, and another copy

A pool works on one stage at a time, so the order of the stages of all its roles decides when each
ends. `deal_pass` chooses it by list scheduling on the stages' seconds: the stage that can start
first is next, and of several that can, the one that a rule puts first. A role with copies on
several pools is given work where the least is left to do; single changes of that choice are then
tried. The result is the shortest of what was tried: a pure function of the program, the teams and
the seconds, so that a run can fix it before it starts.

Order and copies change no number: gradients are added up in one order, copies have equal weights,
and a copy takes a micro-batch whole.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from cluster.schedule.program import Pass, Stage, Team, opening_of

StageSeconds = Callable[[Stage, int], float]
"""Seconds of a stage on a micro-batch, by the replica that works on it."""

MOST_KEPT = 2
"""Most micro-batches for which a stage other than the first keeps something at once. One would make
the fake score's signal wait for the tracking before it; more gain nothing."""
_SHORTER = 1 - 1e-9
_MOST_STARTS = 10_000
"""Starts of stages in all schedules that a search tries: about a quarter of a second."""


@dataclass(frozen=True, slots=True)
class Deal:
    """A stage of a micro-batch, and the replica that works on it."""

    stage: Stage
    micro_batch: int
    replica: int


@dataclass(frozen=True, slots=True)
class DealtPass:
    """A pass in order.

    Attributes:
        deals: In the order in which they start.
        seconds: From the first start to the last end.
    """

    deals: tuple[Deal, ...]
    seconds: float


def deal_pass(
    a_pass: Pass,
    teams: Mapping[str, Team],
    num_micro_batches: int,
    depth: int,
    seconds: StageSeconds,
) -> DealtPass:
    """The shortest order of a pass that was found; remembered for the same arguments.

    Args:
        a_pass: The stages.
        teams: Processes by role.
        num_micro_batches: Parts of the batch.
        depth: Most micro-batches that are open at once.
        seconds: Of each stage on one micro-batch.
    """
    places = tuple(
        tuple(
            _Place(teams[stage.role].pool_of(stage.role, replica), seconds(stage, replica))
            for replica in range(teams[stage.role].replicas)
        )
        for stage in a_pass.stages
    )
    deepest = min(depth, num_micro_batches)
    # A search that may open more micro-batches does not always find the order that opens fewer.
    depths = range(max(1, deepest - 2), deepest + 1)
    found = [_deal(a_pass, places, num_micro_batches, one) for one in depths]
    return min(found, key=lambda dealt: dealt.seconds)


@dataclass(frozen=True, slots=True)
class _Place:
    """Pool of a replica, and seconds of a stage there."""

    pool: str
    seconds: float


_Places = tuple[tuple[_Place, ...], ...]
"""By stage and replica."""


@lru_cache(maxsize=512)
def _deal(a_pass: Pass, places: _Places, num_micro_batches: int, depth: int) -> DealtPass:
    return _Search(_Graph(a_pass, num_micro_batches, depth), places).best()


Node = tuple[int, int]
"""Index of a stage in its pass, and of a micro-batch."""


class _Graph:
    """Stages of all micro-batches, and what each has to wait for."""

    def __init__(self, a_pass: Pass, num_micro_batches: int, depth: int) -> None:
        self.stages = a_pass.stages
        self.num_micro_batches = num_micro_batches
        self.depth = depth
        self.kept = min(depth, MOST_KEPT)
        number = {stage.name: at for at, stage in enumerate(self.stages)}
        self.takes = [tuple(number[name] for name in stage.takes) for stage in self.stages]
        self.user = [number[stage.keeps_until or stage.name] for stage in self.stages]
        self.tied = {user: at for at, user in enumerate(self.user) if user != at}
        opening = opening_of(a_pass)
        self.opener = next((at for at, user in enumerate(self.user) if user != at), None)
        self.num_opening = len(opening) if self.opener is not None else 0
        self.nodes = [(at, i) for i in range(num_micro_batches) for at in range(len(self.stages))]
        self._accumulating = self._accumulation_order()

    def before(self, node: Node, replica_of: Callable[[Node], int]) -> Iterator[Node]:
        """Nodes that must have ended before a node starts."""
        at, index = node
        yield from ((taken, index) for taken in self.takes[at])
        if at in self.tied:
            yield self.tied[at], index
        if node in self._accumulating:
            yield self._accumulating[node]
        elif previous := self._previous(node, 1, replica_of):
            yield previous
        if at < self.num_opening and self.opener is not None and index >= self.depth:
            # An opening stage waits until an earlier micro-batch is closed.
            yield self.user[self.opener], index - self.depth
        elif self.user[at] != at and (closed := self._previous(node, self.kept, replica_of)):
            yield self.user[at], closed[1]

    def _previous(self, node: Node, count: int, replica_of: Callable[[Node], int]) -> Node | None:
        """The node of the same stage that a replica worked on so many turns before."""
        at, index = node
        own = replica_of(node)
        for earlier in range(index - 1, -1, -1):
            count -= replica_of((at, earlier)) == own
            if not count:
                return at, earlier
        return None

    def _accumulation_order(self) -> dict[Node, Node]:
        """By accumulating node, the one before it of its role: one order for all."""
        chains: dict[Node, Node] = {}
        for role in {stage.role for stage in self.stages if stage.accumulates}:
            chain = [
                (at, index)
                for at, index in self.nodes
                if self.stages[at].accumulates and self.stages[at].role == role
            ]
            chains |= {after: before for before, after in pairwise(chain)}
        return chains


_Rule = Callable[[Node], tuple[float, ...]]
_Choice = dict[Node, int]


class _Search:
    """Tries rules and choices of replicas."""

    def __init__(self, graph: _Graph, places: _Places) -> None:
        self._graph = graph
        self._seconds = [[place.seconds for place in own] for own in places]
        self._pools = [[place.pool for place in own] for own in places]
        self._starts_left = _MOST_STARTS
        self._ranks = [_ranks([rule(node) for node in graph.nodes]) for rule in self._rules()]

    def best(self) -> DealtPass:
        """The shortest schedule; of equally short ones the first that was tried."""
        tried = [
            (schedule, choice)
            for choice in self._beginnings()
            for schedule in self._schedules(choice)
        ]
        found, choice = min(tried, key=lambda one: one[0].seconds)
        improved = True
        while improved and self._starts_left > 0:
            improved = False
            for changed in self._changes(choice):
                for other in self._schedules(changed):
                    if other.seconds < _SHORTER * found.seconds:
                        found, choice, improved = other, changed, True
                if improved or self._starts_left <= 0:
                    break
        return found

    def _rules(self) -> Iterator[_Rule]:
        """Orders of what can start at the same time, smallest first."""
        left = self._seconds_left()
        # To finish what has been begun keeps the fewest micro-batches open.
        yield lambda node: (-node[0], node[1])
        yield lambda node: (-left[node[0]], node[1])
        yield lambda node: (node[1], node[0])

    def _seconds_left(self) -> list[float]:
        """Of each stage, the longest way from its start to the end of its micro-batch."""
        graph = self._graph
        left = [0.0] * len(graph.stages)
        for at in reversed(range(len(graph.stages))):
            after = [left[user] for user, taken in enumerate(graph.takes) if at in taken]
            left[at] = min(self._seconds[at]) + max(after, default=0.0)
        return left

    def _balanced(self) -> _Choice:
        """Gives the stages of copied roles to the pool on which the least is left to do."""
        graph = self._graph
        load: dict[str, float] = {}
        for at, pools in enumerate(self._pools):
            alone = len(pools) == 1
            for pool in pools:
                load.setdefault(pool, 0.0)
            if alone:
                load[pools[0]] += graph.num_micro_batches * self._seconds[at][0]
        choice: _Choice = {}
        for at, index in graph.nodes:
            pools = self._pools[at]
            if at in graph.tied:
                replica = choice[graph.tied[at], index]
            else:
                costs = self._seconds[at]
                replica = min(
                    range(len(pools)), key=lambda one: (load[pools[one]] + costs[one], one)
                )
            choice[at, index] = replica
            if len(pools) > 1:
                load[pools[replica]] += self._seconds[at][replica]
        return choice

    def _beginnings(self) -> Iterator[_Choice]:
        """The balanced choice; the same numbers spread evenly, and in one block a replica."""
        balanced = self._balanced()
        yield balanced
        if any(len(pools) > 1 for pools in self._pools):
            for arrange in (_spread, sorted, lambda chosen: sorted(chosen, reverse=True)):
                arranged = dict(balanced)
                for at in range(len(self._pools)):
                    micro_batches = range(self._graph.num_micro_batches)
                    chosen = arrange([balanced[at, index] for index in micro_batches])
                    arranged |= {(at, index): one for index, one in enumerate(chosen)}
                yield arranged

    def _changes(self, choice: _Choice) -> Iterator[_Choice]:
        """Choices that differ in one node, and in what is tied to it."""
        graph = self._graph
        tied = {first: user for user, first in graph.tied.items()}
        for (at, index), chosen in choice.items():
            if at in graph.tied:
                continue
            for replica in range(len(self._pools[at])):
                if replica != chosen:
                    changed = {**choice, (at, index): replica}
                    if at in tied:
                        changed[tied[at], index] = replica
                    yield changed

    def _schedules(self, choice: _Choice) -> list[DealtPass]:
        """Works through the pass by each rule: the next node is the one that can start first."""
        graph = self._graph
        before = [set(graph.before(node, choice.__getitem__)) for node in graph.nodes]
        after: dict[Node, list[int]] = {node: [] for node in graph.nodes}
        for number, earlier in enumerate(before):
            for node in earlier:
                after[node].append(number)
        replicas = [choice[node] for node in graph.nodes]
        chosen = list(zip(graph.nodes, replicas, strict=True))
        walk = _Walk(
            waits=[len(earlier) for earlier in before],
            followers=[after[node] for node in graph.nodes],
            pools=[self._pools[at][replica] for (at, _), replica in chosen],
            seconds=[self._seconds[at][replica] for (at, _), replica in chosen],
        )
        found: list[DealtPass] = []
        for ranks in self._ranks:
            self._starts_left -= len(graph.nodes)
            order, end = walk.by(ranks)
            deals = [
                Deal(graph.stages[at], index, replica)
                for (at, index), replica in (chosen[number] for number in order)
            ]
            found.append(DealtPass(tuple(deals), end))
        return found


@dataclass(frozen=True, slots=True)
class _Walk:
    """The nodes by their numbers in the graph, for one choice of replicas.

    Attributes:
        waits: How many nodes each waits for.
        followers: Those that wait for each.
        pools: Where each works.
        seconds: Of each.
    """

    waits: list[int]
    followers: list[list[int]]
    pools: list[str]
    seconds: list[float]

    def by(self, ranks: Sequence[int]) -> tuple[list[int], float]:
        """The order in which nodes start, the least rank first of several, and the last end."""
        waits, pools, followers = [*self.waits], self.pools, self.followers
        ready = {number: 0.0 for number, left in enumerate(waits) if not left}
        arrived = [0.0] * len(waits)
        free = dict.fromkeys(pools, 0.0)
        order: list[int] = []
        while ready:
            first, start = -1, math.inf
            for number, since in ready.items():
                could = free[pools[number]]
                # Most of a search's time is spent here, where `max` takes twice as long.
                if since > could:
                    could = since
                if could < start or (could == start and ranks[number] < ranks[first]):
                    first, start = number, could
            end = start + self.seconds[first]
            free[pools[first]] = end
            order.append(first)
            del ready[first]
            for follower in followers[first]:
                waits[follower] -= 1
                arrived[follower] = max(arrived[follower], end)
                if not waits[follower]:
                    ready[follower] = arrived[follower]
        assert len(order) == len(waits), "a stage waits for itself"
        return order, max(free.values())


def _ranks(keys: Sequence[tuple[float, ...]]) -> list[int]:
    """The place of each key among all of them; equal keys have equal places."""
    places = {key: place for place, key in enumerate(sorted(set(keys)))}
    return [places[key] for key in keys]


def _spread(chosen: Sequence[int]) -> list[int]:
    """The same replicas, each as evenly spread as it can be."""
    given = dict.fromkeys(sorted(set(chosen)), 0)
    found: list[int] = []
    for index in range(1, len(chosen) + 1):
        due = {
            one: index * chosen.count(one) / len(chosen) - number for one, number in given.items()
        }
        found.append(max(due, key=due.__getitem__))
        given[found[-1]] += 1
    return found


def dealt_seconds(
    teams: Mapping[str, Team], stage_seconds: Mapping[tuple[str, str], float], num_samples: int
) -> StageSeconds:
    """Seconds of stages on a micro-batch, from those of one sample.

    Args:
        teams: Processes by role.
        stage_seconds: Of one sample, by role and stage; a stage that is missing takes 1.
        num_samples: Samples of a micro-batch.
    """

    def seconds(stage: Stage, replica: int) -> float:
        team = teams[stage.role]
        speed = team.homes[replica].speed if team.homes else 1.0
        most = team.samples_of_a_rank(num_samples, replica)
        return stage_seconds.get((stage.role, stage.name), 1.0) * most / speed

    return seconds
