"""Plans the layout of a run on some GPUs and its costs, or says why it cannot be done."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipelines.config.roles import FAKE_SCORE, GENERATOR, ROLES, TEACHER
from pipelines.planning.hardware import GB, Hardware
from pipelines.planning.memory import (
    RankMemory,
    fake_score_memory,
    generator_memory,
    teacher_memory,
)
from pipelines.planning.search import Prediction, candidates, find_best, rank_memory
from pipelines.planning.stage_times import StageTimes
from pipelines.planning.workload import Workload
from sgmd_core.errors import ConfigError

_MOST_GPUS = 8192
_MOST_MEMORY_GB = 1024


@dataclass(frozen=True, slots=True)
class Fused:
    """The same iteration with all three roles on every GPU, one after another: nobody waits.

    Attributes:
        iteration_s: Seconds an iteration.
        memory: Of one rank: generator and fake score sharded over all GPUs, the teacher whole.
        fits: Whether a GPU holds it.
        ranks: Its GPUs: the most that divide the batch.
    """

    iteration_s: float
    memory: RankMemory
    fits: bool
    ranks: int

    def settings(self, work: Workload) -> dict[str, int | str]:
        """Settings of the recipe for it, one sample a rank at a time."""
        return {
            "topology.mode": "fused",
            "topology.fused.ranks": self.ranks,
            "topology.fused.gpus": 1,
            "batch.micro_batches": work.batch_size // self.ranks,
            "topology.depth": 1,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """Layout of a run.

    Attributes:
        work: What it does.
        hardware: What it runs on.
        num_gpus: GPUs that there are for the roles.
        times: Of the stages.
        best: Where the roles go, and what that comes to.
        fused: The same GPUs without separate pools.
        beside: GPUs of other processes, by section: text encoder, feed, validator.
    """

    work: Workload
    hardware: Hardware
    num_gpus: int
    times: StageTimes
    best: Prediction
    fused: Fused
    beside: Mapping[str, float] = field(default_factory=dict)

    @property
    def gpus_beside(self) -> int:
        """Whole GPUs of the processes beside the roles."""
        return math.ceil(sum(self.beside.values()))

    @property
    def fused_is_faster(self) -> bool:
        """True if the fused layout fits, can be set, and takes less time."""
        return self.fused.fits and self.fused.iteration_s < self.best.iteration_s

    def settings(self) -> dict[str, int | str]:
        """Settings of the recipe for separate pools."""
        split = self.best.split
        return {
            "topology.mode": "pools",
            "batch.micro_batches": split.micro_batches,
            "topology.depth": split.depth,
            "topology.generator.ranks": split.generator,
            "topology.teacher.replicas": split.teacher,
            "topology.teacher.ranks": split.teacher_ranks,
            "topology.fake_score.ranks": split.fake_score,
            **{f"topology.{role}.gpus": 1 for role in ROLES},
        }

    def to_json(self) -> dict[str, Any]:
        """All of it, as `sgmd plan --json` prints it."""
        split, best = self.best.split, self.best
        samples = self.work.batch_size // split.micro_batches
        return {
            "gpus": self.num_gpus + self.gpus_beside,
            "gpus_used": split.num_gpus + self.gpus_beside,
            "gpus_beside": dict(self.beside),
            "faster": "fused" if self.fused_is_faster else "pools",
            "settings": self.settings(),
            "iteration_s": best.iteration_s,
            "samples_per_s": self.work.batch_size / best.iteration_s,
            "gpu_hours_per_1000_iterations": best.iteration_s
            * (split.num_gpus + self.gpus_beside)
            / 3.6,
            "roles": {
                role: {
                    "gpus": split.teams[role].size,
                    "samples_per_call": samples / min(samples, split.teams[role].size),
                    "busy": best.busy[role],
                    "memory_gb": best.memory[role].to_json(),
                }
                for role in ROLES
            },
            "fused": {
                "iteration_s": self.fused.iteration_s,
                "memory_gb": self.fused.memory.to_json(),
                "fits": self.fused.fits,
                "settings": self.fused.settings(self.work),
            },
            "stage_seconds_per_sample": {
                ".".join(name): seconds for name, seconds in self.times.seconds.items()
            },
            "stage_times": self.times.source,
            "workload": {
                **asdict(self.work),
                "bf16": sorted(self.work.bf16),
                "checkpointing": sorted(self.work.checkpointing),
                "parameters": self.work.shape.num_parameters,
                "tokens": self.work.shape.num_tokens(self.work.latent_shape),
                "forward_flops": self.work.forward_flops,
            },
            "hardware": asdict(self.hardware),
        }


def make_plan(
    work: Workload,
    times: StageTimes,
    hardware: Hardware,
    num_gpus: int,
    beside: Mapping[str, float] | None = None,
) -> Plan:
    """The fastest layout that fits.

    Args:
        work: The iteration.
        times: Of its stages.
        hardware: What it runs on.
        num_gpus: For generator, teacher and fake score together.
        beside: GPUs of other processes, by section; not of these.

    Raises:
        ConfigError: Nothing fits; says what is short, and which changes would do.
    """
    if num_gpus < len(ROLES):
        raise ConfigError(
            f"planning for {num_gpus} GPUs",
            "fewer GPUs than roles",
            "at least 3: generator, teacher and fake score have a GPU each",
            "On fewer GPUs the roles share one process: topology.mode=fused",
        )
    best = find_best(work, times, hardware, num_gpus)
    if best is None:
        raise _does_not_fit(work, hardware, num_gpus)
    fused = plan_fused(work, times, hardware, num_gpus)
    return Plan(work, hardware, num_gpus, times, best, fused, beside or {})


def plan_fused(work: Workload, times: StageTimes, hardware: Hardware, num_gpus: int) -> Fused:
    """Time and memory of all three roles on every GPU, one sample at a time; see `Fused`."""
    # Ranks share a micro-batch evenly, so others than divisors of the batch cannot be set.
    used = max(n for n in range(1, num_gpus + 1) if work.batch_size % n == 0)
    samples = work.batch_size // used
    seconds = sum(
        spent * (max(1, work.fresh_updates) if stage in ("sample", "track") else 1)
        for (_, stage), spent in times.seconds.items()
    )
    generator = generator_memory(work, used, 1, 1)
    fake_score = fake_score_memory(work, used, 1, 1)
    teacher = teacher_memory(work, 1, 1)
    parts = (generator, fake_score, teacher)
    memory = RankMemory(
        state=sum(part.state for part in parts),
        gathered=sum(part.gathered for part in parts),
        graphs=generator.graphs + fake_score.graphs,
        working=max(part.working for part in parts),
    )
    return Fused(seconds * samples, memory, memory.fits(hardware), used)


def _does_not_fit(work: Workload, hardware: Hardware, num_gpus: int) -> ConfigError:
    usable = hardware.usable_bytes / GB
    remedies = list(_remedies(work, hardware, num_gpus))
    return ConfigError(
        f"planning for {num_gpus} GPUs of {hardware.memory_gb:g} GB",
        f"in no layout does every role fit. At its least, {_least(work, num_gpus)}",
        f"at most {usable:.1f} GB: the rest of the {hardware.memory_gb:g} GB is CUDA's, NCCL's and"
        " what an allocator cannot use",
        "It would fit with " + "; or with ".join(remedies)
        if remedies
        else "No single change makes it fit: change several of video, precision, checkpointing and"
        " GPUs",
    )


def _least(work: Workload, num_gpus: int) -> str:
    """Returns the needs of each role in the layout whose fullest rank is the least full."""
    layouts = [rank_memory(work, split) for split in candidates(work, num_gpus)]
    best = min(layouts, key=lambda parts: max(part.total for part in parts.values()))
    words = {GENERATOR: "generator", TEACHER: "teacher", FAKE_SCORE: "fake score"}
    return ", ".join(
        f"a rank of the {words[role]} needs {part.total / GB:.1f} GB "
        f"(state {part.state / GB:.0f}, graphs {part.graphs / GB:.0f}, "
        f"working {(part.working + part.gathered) / GB:.0f})"
        for role, part in best.items()
    )


def _remedies(work: Workload, hardware: Hardware, num_gpus: int) -> Iterator[str]:
    """Single changes that would do, the cheapest first."""
    learners = frozenset((GENERATOR, FAKE_SCORE))
    again = replace(work, checkpointing=work.checkpointing | learners)
    if again != work and _fits(again, hardware, num_gpus):
        yield "generator.compute.checkpointing=true fake_score.compute.checkpointing=true"
    rounded = replace(work, bf16=frozenset(ROLES))
    if rounded != work and _fits(rounded, hardware, num_gpus):
        yield "compute.precision=bf16 of every role"
    if work.guided and not work.in_turn and _fits(replace(work, in_turn=True), hardware, num_gpus):
        yield "teacher.batched_guidance=false"
    if work.averages and _fits(replace(work, averages=False), hardware, num_gpus):
        yield "generator.ema_decay=0"
    for factor in (2, 4, 8, 16, 32, 64):
        if _fits(replace(work, batch_size=factor * work.batch_size), hardware, num_gpus):
            yield f"batch.size={factor * work.batch_size}, which more ranks can share"
            break
    more = next((n for n in _doubled(num_gpus, _MOST_GPUS) if _fits(work, hardware, n)), None)
    if more is not None:
        yield f"{_bisected(more, lambda n: _fits(work, hardware, n))} GPUs"
    larger = [replace(hardware, memory_gb=float(gb)) for gb in range(0, _MOST_MEMORY_GB + 1, 8)]
    enough = next((one for one in larger if _fits(work, one, num_gpus)), None)
    if enough is not None:
        yield f"GPUs of {enough.memory_gb:g} GB"


def _fits(work: Workload, hardware: Hardware, num_gpus: int) -> bool:
    return any(
        all(part.fits(hardware) for part in rank_memory(work, split).values())
        for split in candidates(work, num_gpus)
    )


def _doubled(number: int, most: int) -> Iterator[int]:
    while number * 2 <= most:
        number *= 2
        yield number


def _bisected(enough: int, fits: Callable[[int], bool]) -> int:
    low, high = enough // 2 + 1, enough
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high
