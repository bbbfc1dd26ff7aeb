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
_NOT_SHORTER = 1 - 5e-10
"""A bound that is added up in another order differs by much less than from `_SHORTER`."""
_MOST_STARTS = 10_000
"""Starts of stages in all schedules that a search tries, those that it leaves early included."""


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
        seconds: Of each stage on one micro-batch; finite.
    """
    places = tuple(
        tuple(
            _Place(teams[stage.role].pool_of(stage.role, replica), seconds(stage, replica))
            for replica in range(teams[stage.role].replicas)
        )
        for stage in a_pass.stages
    )
    given = [place.seconds for own in places for place in own]
    assert all(0 <= one < math.inf for one in given), f"seconds of stages are {given}"
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
    copies = [len(own) for own in places]
    return _Search(_Graph(a_pass, num_micro_batches, depth, copies), places).best()


Node = tuple[int, int]
"""Index of a stage in its pass, and of a micro-batch."""


class _Graph:
    """Stages of all micro-batches, and what each has to wait for; nodes have numbers in order."""

    def __init__(
        self, a_pass: Pass, num_micro_batches: int, depth: int, copies: Sequence[int]
    ) -> None:
        self.stages = a_pass.stages
        self.num_micro_batches = num_micro_batches
        self._depth = depth
        self._kept = min(depth, MOST_KEPT)
        number = {stage.name: at for at, stage in enumerate(self.stages)}
        self.takes = [tuple(number[name] for name in stage.takes) for stage in self.stages]
        self._user = [number[stage.keeps_until or stage.name] for stage in self.stages]
        self.tied = {user: at for at, user in enumerate(self._user) if user != at}
        opening = opening_of(a_pass)
        self._opener = next((at for at, user in enumerate(self._user) if user != at), None)
        self._num_opening = len(opening) if self._opener is not None else 0
        self.nodes = [(at, i) for i in range(num_micro_batches) for at in range(len(self.stages))]
        self._accumulating = self._accumulation_order()
        self._copied = [at for at, number in enumerate(copies) if number > 1]
        self._always = [self._whatever_copies(node) for node in self.nodes]
        for at in set(range(len(self.stages))).difference(self._copied):
            self._add_turns(self._always, at, [0] * len(self.nodes))

    def number(self, at: int, index: int) -> int:
        """The number of the node of a stage and a micro-batch."""
        return index * len(self.stages) + at

    def before(self, replicas: Sequence[int]) -> list[tuple[int, ...]]:
        """Numbers of the nodes that must have ended before each starts, by its replica."""
        found = [*self._always]
        for at in self._copied:
            self._add_turns(found, at, replicas)
        return found

    def _add_turns(self, before: list[tuple[int, ...]], at: int, replicas: Sequence[int]) -> None:
        """Adds what the nodes of a stage wait for because of their replicas' earlier ones."""
        worked_on = dict[int, list[int]]()
        for index in range(self.num_micro_batches):
            number = self.number(at, index)
            own = worked_on.setdefault(replicas[number], [])
            if own and (at, index) not in self._accumulating:
                before[number] += (self.number(at, own[-1]),)
            keeps = self._user[at] != at and not self._waits_for_room(at, index)
            if keeps and len(own) >= self._kept:
                before[number] += (self.number(self._user[at], own[-self._kept]),)
            own.append(index)

    def _whatever_copies(self, node: Node) -> tuple[int, ...]:
        """Nodes that must have ended before a node starts, whichever replicas work."""
        at, index = node
        found = [(taken, index) for taken in self.takes[at]]
        if at in self.tied:
            found.append((self.tied[at], index))
        if node in self._accumulating:
            found.append(self._accumulating[node])
        if self._opener is not None and self._waits_for_room(at, index):
            # An opening stage waits until an earlier micro-batch is closed.
            found.append((self._user[self._opener], index - self._depth))
        return tuple(self.number(*one) for one in found)

    def _waits_for_room(self, at: int, index: int) -> bool:
        return at < self._num_opening and index >= self._depth

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
_Choice = list[int]
"""Replicas by the numbers of the nodes."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A schedule: seconds, the nodes in order, and their replicas."""

    seconds: float
    order: Sequence[int]
    choice: _Choice


class _Search:
    """Tries rules and choices of replicas."""

    def __init__(self, graph: _Graph, places: _Places) -> None:
        self._graph = graph
        self._seconds = [[place.seconds for place in own] for own in places]
        names = sorted({place.pool for own in places for place in own})
        self._num_pools = len(names)
        self._pools = [[names.index(place.pool) for place in own] for own in places]
        self._starts_left = _MOST_STARTS
        self._left = self._seconds_left()
        self._ranks = [_ranks([rule(node) for node in graph.nodes]) for rule in self._rules()]

    def best(self) -> DealtPass:
        """The shortest schedule; of equally short ones the first that was tried."""
        found = _Found(math.inf, (), [])
        for choice in self._beginnings():
            found = self._shorter(found, choice, 1.0)
        improved = True
        while improved and self._starts_left > 0:
            improved = False
            for changed in self._changes(found):
                shorter = found if changed is None else self._shorter(found, changed, _SHORTER)
                self._starts_left -= len(self._ranks) * len(self._graph.nodes) * (changed is None)
                improved, found = shorter is not found, shorter
                if improved or self._starts_left <= 0:
                    break
        deals = [
            Deal(self._graph.stages[at], index, found.choice[number])
            for number in found.order
            for at, index in [self._graph.nodes[number]]
        ]
        return DealtPass(tuple(deals), found.seconds)

    def _rules(self) -> Iterator[_Rule]:
        """Orders of what can start at the same time, smallest first."""
        left = self._left
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
        load = [0.0] * self._num_pools
        for at, pools in enumerate(self._pools):
            if len(pools) == 1:
                load[pools[0]] += graph.num_micro_batches * self._seconds[at][0]
        choice: _Choice = []
        for at, index in graph.nodes:
            pools = self._pools[at]
            if at in graph.tied:
                replica = choice[graph.number(graph.tied[at], index)]
            else:
                costs = self._seconds[at]
                replica = min(
                    range(len(pools)), key=lambda one: (load[pools[one]] + costs[one], one)
                )
            choice.append(replica)
            if len(pools) > 1:
                load[pools[replica]] += self._seconds[at][replica]
        return choice

    def _beginnings(self) -> Iterator[_Choice]:
        """The balanced choice; the same numbers spread evenly, and in one block a replica."""
        balanced = self._balanced()
        yield balanced
        if any(len(pools) > 1 for pools in self._pools):
            for arrange in (_spread, sorted, lambda chosen: sorted(chosen, reverse=True)):
                arranged, step = [*balanced], len(self._pools)
                for at in range(step):
                    arranged[at::step] = arrange(balanced[at::step])
                yield arranged

    def _changes(self, found: _Found) -> Iterator[_Choice | None]:
        """Choices that differ in one node, and in what is tied to it; None: one that is longer."""
        graph, choice = self._graph, found.choice
        tied = {first: user for user, first in graph.tied.items()}
        load = self._loads(choice)
        for number, (at, index) in enumerate(graph.nodes):
            if at in graph.tied:
                continue
            moved = [at, tied[at]] if at in tied else [at]
            for replica, pool in enumerate(self._pools[at]):
                if replica == choice[number]:
                    continue
                more = sum(self._seconds[one][replica] for one in moved)
                is_other = pool != self._pools[at][choice[number]]
                if is_other and load[pool] + more >= _NOT_SHORTER * found.seconds:
                    yield None
                    continue
                changed = [*choice]
                for one in moved:
                    changed[graph.number(one, index)] = replica
                yield changed

    def _loads(self, choice: _Choice) -> list[float]:
        """Seconds of work of each pool."""
        load = [0.0] * self._num_pools
        for (at, _), replica in zip(self._graph.nodes, choice, strict=True):
            load[self._pools[at][replica]] += self._seconds[at][replica]
        return load

    def _shorter(self, found: _Found, choice: _Choice, least: float) -> _Found:
        """The shortest schedule of a choice by the rules, or one found before.

        Args:
            found: Schedule to be shorter than.
            choice: Replicas.
            least: Part of its seconds that a schedule has to stay below.
        """
        graph = self._graph
        before = graph.before(choice)
        followers: list[list[int]] = [[] for _ in before]
        for number, earlier in enumerate(before):
            for one in earlier:
                followers[one].append(number)
        walk = _Walk(
            waits=[len(earlier) for earlier in before],
            followers=followers,
            pools=[self._pools[at][one] for (at, _), one in zip(graph.nodes, choice, strict=True)],
            seconds=[
                self._seconds[at][one] for (at, _), one in zip(graph.nodes, choice, strict=True)
            ],
            left=[self._left[at] for at, _ in graph.nodes],
            load=self._loads(choice),
        )
        hopeless = _NOT_SHORTER / _SHORTER * least
        for ranks in self._ranks:
            self._starts_left -= len(graph.nodes)
            walked = walk.by(ranks, hopeless * found.seconds)
            if walked is not None and walked[1] < least * found.seconds:
                found = _Found(walked[1], walked[0], choice)
        return found


@dataclass(frozen=True, slots=True)
class _Walk:
    """The nodes by their numbers in the graph, for one choice of replicas.

    Attributes:
        waits: How many nodes each waits for.
        followers: Those that wait for each, in order.
        pools: Where each works.
        seconds: Of each.
        left: The least from the start of each to the end of its micro-batch.
        load: Seconds of all nodes of each pool.
    """

    waits: list[int]
    followers: list[list[int]]
    pools: list[int]
    seconds: list[float]
    left: list[float]
    load: list[float]

    def by(self, ranks: Sequence[int], below_s: float) -> tuple[list[int], float] | None:
        """The order in which nodes start, the least rank first of several, and the last end.

        Args:
            ranks: Of the nodes.
            below_s: None is returned as soon as the last end cannot be below it.
        """
        waits, pools, followers, seconds = [*self.waits], self.pools, self.followers, self.seconds
        left, load = self.left, [*self.load]
        ready = {number: 0.0 for number, waited in enumerate(waits) if not waited}
        arrived = [0.0] * len(waits)
        free = [0.0] * len(load)
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
            pool = pools[first]
            if start + load[pool] >= below_s or start + left[first] >= below_s:
                return None
            load[pool] -= seconds[first]
            free[pool] = end = start + seconds[first]
            order.append(first)
            del ready[first]
            for follower in followers[first]:
                waits[follower] -= 1
                if end > arrived[follower]:
                    arrived[follower] = end
                if not waits[follower]:
                    ready[follower] = arrived[follower]
        assert len(order) == len(waits), "a stage waits for itself"
        return order, max(free)


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
