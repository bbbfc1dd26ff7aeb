"""Maps of roles to pools, as candidates of a plan, and the memory of a rank of each pool."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, product

from cluster.schedule.dealing import MOST_KEPT
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, TEACHER
from pipelines.config.topology import FUSED
from pipelines.planning.hardware import GpuKind, Hardware
from pipelines.planning.memory import (
    RankMemory,
    discriminator_memory,
    fake_score_memory,
    generator_memory,
    teacher_memory,
)
from pipelines.planning.workload import Workload

LEARN, SCORE = "learn", "score"
FEW_MICRO_BATCHES = 32
"""Micro-batches up to which every number is tried; more gain nothing but memory."""
_MOST_MICRO_BATCHES = 1024
_MOST_SAMPLES = 8
"""Of a rank in one call; the smallest number of ranks takes them all."""


@dataclass(frozen=True, slots=True)
class PoolMap:
    """Ranks of the pools, and the pools of each role.

    Attributes:
        ranks: Of each pool.
        places: Pools of each role.
        micro_batches: Parts of the batch.
        depth: Parts in flight.
        kinds: GPUs of each pool, where a cluster has several kinds.
    """

    ranks: Mapping[str, int]
    places: Mapping[str, tuple[str, ...]]
    micro_batches: int
    depth: int = 1
    kinds: Mapping[str, GpuKind] = field(default_factory=dict)

    def roles_on(self, pool: str) -> tuple[str, ...]:
        """Roles that live on a pool."""
        return tuple(role for role, pools in self.places.items() if pool in pools)

    def hardware_of(self, pool: str, hardware: Hardware) -> Hardware:
        """GPUs and connections of a pool; `hardware` where there is one kind of GPU."""
        return self.kinds[pool].hardware if self.kinds else hardware

    def speed_of(self, pool: str, hardware: Hardware) -> float:
        """Speed of a pool's GPUs over that of `hardware`, for which stages were timed."""
        return self.hardware_of(pool, hardware).flops / hardware.flops

    def shares_out(self, work: Workload) -> bool:
        """Returns True if each rank gets samples of a micro-batch, as a recipe has to have it."""
        size = -(-work.batch_size // self.micro_batches)
        return all(
            ranks <= size * min(work.ranks_per_sample(role) for role in self.roles_on(pool))
            for pool, ranks in self.ranks.items()
        )


def ranks_wanted(batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Numbers of micro-batches, and the ranks that the samples of one want.

    Others would wait for the rank with the most samples.
    """
    for micro_batches in _micro_batches(batch_size):
        size = -(-batch_size // micro_batches)
        yield micro_batches, sorted({-(-size // share) for share in range(1, _MOST_SAMPLES + 1)})


def _micro_batches(batch_size: int) -> Iterator[int]:
    """Numbers of micro-batches: all small ones, then twice as many each time, and one a sample."""
    yield from range(1, min(FEW_MICRO_BATCHES, batch_size) + 1)
    number = 2 * FEW_MICRO_BATCHES
    while number < min(batch_size, _MOST_MICRO_BATCHES):
        yield number
        number *= 2
    if FEW_MICRO_BATCHES < batch_size <= _MOST_MICRO_BATCHES:
        yield batch_size


def uses_half(work: Workload, num_gpus: int, learn: int, score: int) -> bool:
    """Returns True if two pools use more than half of the GPUs that have samples to work on.

    Args:
        work: The iteration.
        num_gpus: GPUs that there are.
        learn: Ranks of the generator's pool.
        score: Ranks of the fake score's pool.
    """
    # Of a small batch no pool has a use for more ranks than samples, however many GPUs there are.
    most = work.batch_size * (work.ranks_per_sample(GENERATOR) + work.ranks_per_sample(FAKE_SCORE))
    return min(num_gpus, most) < 2 * (learn + score) <= 2 * num_gpus


def pool_maps(work: Workload, num_gpus: int) -> Iterator[PoolMap]:
    """Two pools that use half of the GPUs that have samples, with every use of the teacher."""
    for micro_batches, wanted in ranks_wanted(work.batch_size):
        for groups in product(wanted, repeat=2):
            learn = groups[0] * work.ranks_per_sample(GENERATOR)
            score = groups[1] * work.ranks_per_sample(FAKE_SCORE)
            if not (uses_half(work, num_gpus, learn, score) and work.suits(micro_batches, score)):
                continue
            for teacher in ((LEARN, SCORE), (LEARN,), (SCORE,)):
                places = {GENERATOR: (LEARN,), TEACHER: teacher, FAKE_SCORE: (SCORE,)}
                for beside in ({},) if work.heads is None else _judges():
                    ranks = {LEARN: learn, SCORE: score}
                    one = PoolMap(ranks, {**places, **beside}, micro_batches)
                    if one.shares_out(work) and all(
                        number % work.ranks_per_sample(*one.roles_on(pool)) == 0
                        for pool, number in ranks.items()
                    ):
                        yield one


def _judges() -> tuple[dict[str, tuple[str, ...]], ...]:
    """Places of a discriminator: on either pool."""
    return {DISCRIMINATOR: (SCORE,)}, {DISCRIMINATOR: (LEARN,)}


def fused_maps(work: Workload, num_gpus: int) -> list[PoolMap]:
    """All three roles on some GPUs: `fused_map`, and those with more samples a rank and call.

    More samples in a call gather the weights less often, fewer ranks may all be on one machine;
    both gain where gathering takes longer than computing. Empty where samples cannot be shared out.
    """
    width = work.ranks_per_sample(*work.roles)
    groups = max(1, num_gpus // width)
    found = [fused_map(work, num_gpus)]
    for share in range(1, _MOST_SAMPLES + 1):
        micro_batches = -(-work.batch_size // (groups * share))
        size = -(-work.batch_size // micro_batches)
        found.append(_fused(work, width * -(-size // share), micro_batches))
    found += [
        _fused(work, width * one, micro_batches)
        for micro_batches, wanted in ranks_wanted(work.batch_size)
        for one in wanted
        if one <= groups
    ]
    each = {(one.ranks[FUSED], one.micro_batches): one for one in found}
    return [
        one
        for (ranks, micro_batches), one in each.items()
        if one.shares_out(work) and work.suits(micro_batches, ranks)
    ]


def fused_map(work: Workload, num_gpus: int) -> PoolMap:
    """All three roles on every GPU that shortens the iteration, one sample a rank at a time.

    Ranks of a fake score that has pairs of samples take one of them at a time.
    """
    width = work.ranks_per_sample(*work.roles)
    most = -(-work.batch_size // max(1, num_gpus // width))
    # Ranks that would only make more of the last round idle are left out.
    ranks = width * -(-work.batch_size // most)
    if work.paired:
        pairs = max(1, work.batch_size // 2)
        groups = max(n for n in range(1, max(1, num_gpus // width) + 1) if pairs % n == 0)
        ranks, most = width * groups, pairs // groups
    return _fused(work, ranks, most)


def _fused(work: Workload, ranks: int, micro_batches: int) -> PoolMap:
    return PoolMap({FUSED: ranks}, dict.fromkeys(work.roles, (FUSED,)), micro_batches)


def fused_memory(work: Workload, num_gpus: int) -> RankMemory:
    """Least memory of a rank of all three roles, over the layouts of `fused_maps`."""
    maps = fused_maps(work, num_gpus) or [fused_map(work, num_gpus)]
    return min((map_memory(work, one)[FUSED] for one in maps), key=lambda memory: memory.total)


def map_memory(work: Workload, one: PoolMap) -> dict[str, RankMemory]:
    """Returns the memory of a rank of each pool: its roles' together, which work in turn."""
    return {
        pool: together([_role_memory(work, one, pool, role) for role in one.roles_on(pool)])
        for pool in one.ranks
    }


def _role_memory(work: Workload, one: PoolMap, pool: str, role: str) -> RankMemory:
    """Memory of a rank of one role of a pool."""
    ranks, open_at_once = one.ranks[pool], min(one.depth, one.micro_batches)
    own = work.samples_of_a_rank(role, -(-work.batch_size // one.micro_batches), ranks)
    if role == TEACHER:
        shares_base = any(
            other in dict(work.adapters) and work.shape_of(other) == work.shape_of(TEACHER)
            for other in one.roles_on(pool)
        )
        return teacher_memory(work, ranks, own, shares_base=shares_base)
    if role == GENERATOR:
        return generator_memory(work, ranks, own, open_at_once * own)
    if role == FAKE_SCORE:
        return fake_score_memory(work, ranks, own, min(MOST_KEPT, open_at_once) * own)
    return discriminator_memory(work, ranks, own)


def together(parts: Sequence[RankMemory]) -> RankMemory:
    """Memory of a process with a rank of several roles, which work one after the other."""
    return RankMemory(
        state=sum(part.state for part in parts),
        gathered=sum(part.gathered for part in parts),
        graphs=sum(part.graphs for part in parts),
        working=max(part.working for part in parts),
        host=sum(part.host for part in parts),
        # Roles of one network share one; networks of another size are other bases.
        base=sum({part.base for part in parts}),
        # Their saves begin together.
        saves=sum(part.saves for part in parts),
    )


def any_layout_fits(work: Workload, hardware: Hardware, num_gpus: int) -> bool:
    """Returns True if two pools, or all roles together, fit; classic pools are not looked at."""
    return any(
        map_fits(work, hardware, one)
        for one in chain(fused_maps(work, num_gpus), pool_maps(work, num_gpus))
    )


def map_fits(work: Workload, hardware: Hardware, one: PoolMap) -> bool:
    """Returns True if a GPU of every pool holds its ranks."""
    return all(
        part.fits(one.hardware_of(pool, hardware)) for pool, part in map_memory(work, one).items()
    )
