"""Parts that `orchestration.py` shares: sleeping groups on Ray, and the costs of Ray itself."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

from dummies import DummyWorker, SimulatedRun, make_dummy_worker, run_dummies

from cluster.ray.group import RayWorkerGroup
from cluster.ray.pools import Pool
from cluster.ray.topology import reserve
from cluster.runtime import start_ray
from cluster.schedule.program import Home, Pass, Program, Stage, Team
from cluster.schedule.schedule import Call, order_calls
from cluster.schedule.simulate import Costs, simulate
from cluster.worker_group import WorkerGroup
from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER
from pipelines.stages.algorithm import iteration_program
from pipelines.stages.kind import IterationKind

START_TIMEOUT_S = 600.0
Groups = Mapping[str, WorkerGroup[DummyWorker]]


@dataclass(frozen=True, slots=True)
class Setting:
    """One configuration to rehearse.

    Attributes:
        name: What tables call it.
        teams: (generator ranks, teacher replicas, fake-score ranks).
        stage_ms: Of one sample: rollout, denoise, signal, track, learn; sample, in a fresh pass,
            takes as long as a rollout.
        micro_batches: Parts of the batch.
        depth: Micro-batches in flight.
        fresh_updates: See `iteration_program`.
        samples: Samples of a micro-batch.
        megabytes: Of one sample's latents, on the way between roles.
        staleness: Iterations that may overlap.
        homes: Pools of each role, where roles share them; `teams` is not read then.
    """

    name: str
    teams: tuple[int, int, int]
    stage_ms: tuple[float, float, float, float, float]
    micro_batches: int
    depth: int
    fresh_updates: int = 0
    samples: int = 1
    megabytes: float = 0.0
    staleness: int = 0
    homes: Mapping[str, tuple[Home, ...]] | None = None

    @property
    def places(self) -> dict[str, tuple[str, ...]]:
        """Names of the pools of each role; of processes of its own, one named by their number."""
        if self.homes is None:
            sizes = {role: team.size for role, team in self.team_of().items()}
            return {role: (f"{role}-{size}",) for role, size in sizes.items()}
        return {role: tuple(home.pool for home in own) for role, own in self.homes.items()}

    @property
    def pools(self) -> dict[str, int]:
        """Processes of each pool."""
        if self.homes is None:
            return {name: self.team_of()[role].size for role, (name,) in self.places.items()}
        return {home.pool: home.ranks for own in self.homes.values() for home in own}

    @property
    def layout(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Pools of each role, as a key."""
        return tuple(sorted(self.places.items()))

    @property
    def program(self) -> Program:
        """Returns the program of an iteration."""
        return iteration_program(IterationKind(self.fresh_updates))

    def team_of(self) -> dict[str, Team]:
        """Processes by role."""
        if self.homes is not None:
            return {role: Team.on(*own) for role, own in self.homes.items()}
        generator, teacher, fake_score = self.teams
        return {
            GENERATOR: Team(ranks=generator),
            TEACHER: Team(replicas=teacher),
            FAKE_SCORE: Team(ranks=fake_score),
        }

    def calls(self, num_iterations: int) -> list[Call]:
        """Its schedule."""
        return order_calls(
            self.program,
            self.team_of(),
            self.micro_batches,
            self.depth,
            samples_per_micro_batch=self.samples,
            iterations=range(num_iterations),
            max_staleness=self.staleness,
            stage_seconds={
                (stage.role, stage.name): self.stage_seconds.get(stage.name, 0.0)
                for part in self.program
                if isinstance(part, Pass)
                for stage in part.stages
            },
        )

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds of one sample by stage."""
        rollout, denoise, signal, track, learn = (ms / 1e3 for ms in self.stage_ms)
        found = {"rollout": rollout, "sample": rollout, "denoise": denoise}
        return found | {"signal": signal, "track": track, "learn": learn}

    def costs(self, machine: "MachineCosts | None" = None) -> Costs:
        """Returns the costs of its stages, with those of the machine if they are given."""
        seconds = self.stage_seconds

        def seconds_of(call: Call) -> float:
            return seconds.get(call.stage, 0.0) * call.num_computed

        def bytes_of(call: Call) -> float:
            return self.megabytes * 1e6 * call.num_samples

        if machine is None:
            return Costs(seconds_of, bytes_of)
        return Costs(
            seconds_of,
            bytes_of,
            bandwidth=machine.bandwidth,
            latency_s=max(0.0, machine.hop_s - machine.turn_s),
            put_bandwidth=machine.put_bandwidth,
            take_bandwidth=machine.take_bandwidth,
            turn_s=machine.turn_s,
            call_s=machine.call_s,
            answer_s=machine.answer_s,
        )

    def bound_s(self, num_iterations: int) -> float:
        """Seconds an iteration if nothing but the stages took time."""
        costs = Costs(self.costs().seconds)
        return simulate(self.calls(num_iterations), costs, self.team_of()).iteration_s


@dataclass(frozen=True, slots=True)
class MachineCosts:
    """Costs of Ray on this machine.

    Attributes:
        call_s: Controller's time to make one call.
        answer_s: From the end of a call until the controller has its small result.
        turn_s: From the end of a call until the next one of its process begins.
        hop_s: From the end of a call until one that takes its small result begins.
        put_bandwidth: Bytes a second at which a process hands a large tensor over.
        take_bandwidth: Bytes a second at which a process takes a large tensor in.
        bandwidth: Bytes a second of what a hop of a large tensor takes beyond all that.
    """

    call_s: float
    answer_s: float
    turn_s: float
    hop_s: float
    put_bandwidth: float
    take_bandwidth: float
    bandwidth: float


@contextmanager
def sleepers(sizes: Mapping[str, int]) -> Iterator[dict[str, RayWorkerGroup[DummyWorker]]]:
    """Groups of sleeping processes on a Ray of their own.

    Args:
        sizes: Processes by name of the group.
    """
    pools = [Pool(name, size, cpus_per_rank=0.01) for name, size in sizes.items()]
    with ExitStack() as stack:
        stack.enter_context(start_ray(num_cpus=max(4, sum(sizes.values()))))
        yield open_sleepers(stack, pools)


def open_sleepers(
    stack: ExitStack, pools: Sequence[Pool]
) -> dict[str, RayWorkerGroup[DummyWorker]]:
    """Opens a group a pool on the Ray that this process is connected to."""
    placement = stack.enter_context(reserve(pools, START_TIMEOUT_S))
    groups = {
        pool.name: stack.enter_context(RayWorkerGroup(pool.name, make_dummy_worker, (), placement))
        for pool in pools
    }
    for group in groups.values():
        group.wait_ready(START_TIMEOUT_S)
    return groups


def hops_s(groups: Groups, num_bytes: int, repetitions: int) -> list[float]:
    """Seconds from the end of a call to the beginning of one that takes its result.

    Args:
        groups: At least two; the first two are taken.
        num_bytes: Size of the result.
        repetitions: How often to measure.
    """
    maker, taker = list(groups)[:2]
    program = (Pass((Stage("make", maker), Stage("take", taker, ("make",)))),)
    teams = {maker: Team(), taker: Team()}
    costs = Costs(lambda call: 0.0, lambda call: num_bytes)
    found: list[float] = []
    for _ in range(repetitions):
        run = run_dummies(
            order_calls(program, teams, 1, 1), {name: groups[name] for name in teams}, costs
        )
        found.append(run.naps[1].start_s - run.naps[0].end_s)
    return found


def measure_machine(groups: Groups, repetitions: int = 30) -> MachineCosts:
    """Measures what Ray costs between the first two groups."""
    group = next(iter(groups.values()))
    trips: list[float] = []
    for _ in range(repetitions):
        started = time.monotonic()
        group.fetch(
            [group.call_rank(0, DummyWorker.work, 0, 0.0, 0)], 60, "measuring an empty call"
        )
        trips.append(time.monotonic() - started)
    started = time.monotonic()
    asked = [group.call_rank(0, DummyWorker.work, 0, 0.0, 0) for _ in range(10 * repetitions)]
    call_s = (time.monotonic() - started) / len(asked)
    group.fetch(asked, 60, "measuring many calls")
    group.fetch(group.call(DummyWorker.take_naps), 60, "waking")
    large = 8 * 10**6
    hop_s, large_hop_s = (statistics.median(hops_s(groups, n, repetitions)) for n in (0, large))
    put_s, take_s = _turns_s(groups, 0, repetitions)
    large_put_s, large_take_s = _turns_s(groups, large, repetitions)
    turn_s = min(put_s, take_s)
    moved_s = large_put_s - turn_s + large_take_s - turn_s
    return MachineCosts(
        call_s=call_s,
        answer_s=max(0.0, statistics.median(trips) - call_s),
        turn_s=turn_s,
        hop_s=hop_s,
        put_bandwidth=_per_second(large, large_put_s - turn_s),
        take_bandwidth=_per_second(large, large_take_s - turn_s),
        bandwidth=_per_second(large, large_hop_s - hop_s - moved_s),
    )


def _per_second(num_bytes: int, seconds: float) -> float:
    return num_bytes / max(1e-6, seconds)


def _turns_s(groups: Groups, num_bytes: int, repetitions: int) -> tuple[float, float]:
    """Seconds between two calls of one process: one that hands on, one that takes in."""
    maker, taker = list(groups)[:2]
    program = (Pass((Stage("make", maker), Stage("take", taker, ("make",)))),)
    # The last result is empty, for the controller to wait for: all results are there before the
    # first one is taken, so that only the taking is measured.
    calls = order_calls(program, {maker: Team(), taker: Team()}, repetitions + 1, 1)
    made = [place for place, call in enumerate(calls) if call.role == maker]
    taken = [place for place, call in enumerate(calls) if call.role == taker]
    calls[taken[0]] = replace(calls[taken[0]], waits_for=(made[-1],))

    def size(call: Call) -> float:
        return num_bytes * (call.micro_batch != repetitions)

    own = {name: groups[name] for name in (maker, taker)}
    naps = run_dummies(calls, own, Costs(lambda call: 0.0, size)).naps
    made_s, taken_s = (
        statistics.median(
            naps[after].start_s - naps[before].end_s for before, after in pairwise(places[:-1])
        )
        for places in (made, taken)
    )
    return made_s, taken_s


def rehearse_setting(setting: Setting, groups: Groups, num_iterations: int) -> SimulatedRun:
    """Works a configuration through."""
    teams = setting.team_of()
    own = {role: groups[role] for role in teams}
    return run_dummies(setting.calls(num_iterations), own, setting.costs(), teams=teams)
