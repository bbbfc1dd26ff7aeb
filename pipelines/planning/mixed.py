"""Layouts of a run on GPUs of two kinds or more.

    two pools     learn on one kind | score on another             teacher on either or both
    and a spare   learn | score, both on one kind                  teacher also, or only, on another
    all and spare generator and fake score together on one kind    teacher also, or only, on another
    three pools   learn on one kind | score on another             teacher also, or only, on a third

Generator and fake score work in step with all their ranks, so a pool has one kind of GPU. Copies of
the teacher are independent: each takes as many calls as its GPUs can make. One kind alone is
planned beside them, because the slower GPUs may cost more than they give.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations, product

from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, TEACHER
from pipelines.planning.hardware import GB, GpuKind
from pipelines.planning.layouts import AS_FAST, fastest_map, fused_layout, map_layout
from pipelines.planning.planned_layout import Layout
from pipelines.planning.pool_maps import (
    LEARN,
    SCORE,
    PoolMap,
    map_memory,
    ranks_wanted,
    uses_half,
)
from pipelines.planning.stage_times import StageTimes
from pipelines.planning.workload import Workload
from sgmd_core.errors import ConfigError

SPARE = "spare"
"""Pool of a teacher alone."""
_MOST_TRIED = 2
"""Numbers of ranks of each learner that are tried on three kinds, the largest ones."""


def mixed_layouts(work: Workload, times: StageTimes, kinds: Sequence[GpuKind]) -> list[Layout]:
    """The fastest map over several kinds of GPU, and the fastest layouts on each kind alone.

    Args:
        work: The iteration.
        times: Of its stages, on a GPU of the first kind.
        kinds: At least two.

    Returns:
        Those that fit, the fastest first; of those that are as fast, that of the fewest GPUs.

    Raises:
        ConfigError: None fits.
    """
    reference = kinds[0].hardware
    mixed = fastest_map(work, times, reference, mixed_maps(work, kinds))
    found = [one for one in (mixed, *_alone(work, times, kinds)) if one is not None and one.fits]
    if not found:
        raise _none_fits(work, kinds)
    as_fast_s = AS_FAST * min(one.iteration_s for one in found)
    return sorted(found, key=lambda one: (max(one.iteration_s, as_fast_s), one.num_gpus))


def mixed_maps(work: Workload, kinds: Sequence[GpuKind]) -> Iterator[PoolMap]:
    """Candidates: pools of one kind each, at least two kinds in use."""
    for first, second in permutations(kinds, 2):
        for micro_batches, wanted in ranks_wanted(work.batch_size):
            ours = [ranks for ranks in wanted if ranks <= first.num_gpus]
            theirs = [ranks for ranks in wanted if ranks <= second.num_gpus]
            for learn, score in product(ours, theirs):
                ranks, kind = {LEARN: learn, SCORE: score}, {LEARN: first, SCORE: second}
                for teacher in ((LEARN, SCORE), (LEARN,), (SCORE,)):
                    yield from _placed(work, ranks, LEARN, SCORE, teacher, micro_batches, kind)
            for ranks, spare in product(_of_learners(work, ours, first.num_gpus), theirs):
                pools = tuple(ranks)
                kind = {**dict.fromkeys(pools, first), SPARE: second}
                for teacher in ((SPARE,), *((*some, SPARE) for some in _parts(pools))):
                    yield from _placed(
                        work,
                        {**ranks, SPARE: spare},
                        pools[0],
                        pools[-1],
                        teacher,
                        micro_batches,
                        kind,
                    )
    for three in permutations(kinds, 3):
        yield from _on_three(work, three)


def _on_three(work: Workload, kinds: Sequence[GpuKind]) -> Iterator[PoolMap]:
    """Candidates with a pool on each of three kinds: as many ranks as have samples."""
    pools = (LEARN, SCORE, SPARE)
    for micro_batches, wanted in ranks_wanted(work.batch_size):
        # Fewer ranks would be slower. For two kinds they are tried; for three there are too many.
        most = [[one for one in wanted if one <= kind.num_gpus][-_MOST_TRIED:] for kind in kinds]
        for numbers in product(*most[:2], most[2][-1:]):
            for beside in ((), (LEARN,), (SCORE,), (LEARN, SCORE)):
                yield from _placed(
                    work,
                    dict(zip(pools, numbers, strict=True)),
                    LEARN,
                    SCORE,
                    (*beside, SPARE),
                    micro_batches,
                    dict(zip(pools, kinds, strict=True)),
                )


def _of_learners(work: Workload, wanted: Sequence[int], num_gpus: int) -> Iterator[dict[str, int]]:
    """Ranks of the pools of generator and fake score, which have one kind of GPU."""
    for learn in wanted:
        yield {LEARN: learn}
        for score in wanted:
            if uses_half(work, num_gpus, learn, score):
                yield {LEARN: learn, SCORE: score}


def _parts(pools: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [pools, *([(pool,) for pool in pools] if len(pools) > 1 else [])]


def _placed(
    work: Workload,
    ranks: dict[str, int],
    generator: str,
    fake_score: str,
    teacher: tuple[str, ...],
    micro_batches: int,
    kinds: dict[str, GpuKind],
) -> Iterator[PoolMap]:
    if not work.suits(micro_batches, ranks[fake_score]):
        return
    places = {GENERATOR: (generator,), TEACHER: teacher, FAKE_SCORE: (fake_score,)}
    # A discriminator works on the samples of generator or fake score.
    judges = [{}] if work.heads is None else [{DISCRIMINATOR: (generator,)}]
    if work.heads is not None and fake_score != generator:
        judges.append({DISCRIMINATOR: (fake_score,)})
    for judge in judges:
        yield PoolMap(ranks, {**places, **judge}, micro_batches, kinds=kinds)


def _alone(work: Workload, times: StageTimes, kinds: Sequence[GpuKind]) -> Iterator[Layout]:
    """The fastest layout of each kind by itself, with the settings that place it there."""
    for kind in kinds:
        slower = kinds[0].hardware.flops / kind.hardware.flops
        own = replace(
            times, seconds={name: slower * seconds for name, seconds in times.seconds.items()}
        )
        fused = fused_layout(work, own, kind.hardware, kind.num_gpus)
        mapped = map_layout(work, own, kind.hardware, kind.num_gpus)
        fitting = [one for one in (fused, mapped) if one is not None and one.fits]
        if fitting:
            yield min(fitting, key=lambda one: one.iteration_s).on(kind.name)


def _none_fits(work: Workload, kinds: Sequence[GpuKind]) -> ConfigError:
    fullest = [
        max(part.total for part in map_memory(work, one).values()) / GB
        for one in mixed_maps(work, kinds)
    ]
    return ConfigError(
        "planning for " + ", ".join(f"{one.num_gpus} {one.name}" for one in kinds),
        f"no layout fits; the least full one has a rank of {min(fullest, default=0):.1f} GB",
        "every pool to fit its kind of GPU: "
        + ", ".join(f"{one.name} {one.hardware.usable_bytes / GB:.1f} GB" for one in kinds),
        "Plan for the larger kind alone with --gpus and --gpu-memory: it says which settings fit",
    )
