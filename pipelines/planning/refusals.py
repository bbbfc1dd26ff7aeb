"""Says why no layout fits some GPUs, and which changes would make one fit."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER
from pipelines.planning.hardware import GB, Hardware
from pipelines.planning.memory import RankMemory
from pipelines.planning.pool_maps import (
    LEARN,
    SCORE,
    fused_maps,
    fused_memory,
    map_memory,
    pool_maps,
)
from pipelines.planning.savings import fitting_savings, run_fits, with_all_savings
from pipelines.planning.search import candidates, rank_memory
from pipelines.planning.workload import Workload
from sgmd_core.errors import ConfigError
from sgmd_core.words import count_in_words

_MOST_GPUS = 8192
_MOST_MEMORY_GB = 1024


def no_layout_fits(work: Workload, hardware: Hardware, num_gpus: int) -> ConfigError:
    """Error of a plan without a layout: what is short, and what would do.

    Args:
        work: The iteration.
        hardware: What it runs on.
        num_gpus: For its roles together.
    """
    gpus = count_in_words(num_gpus, "GPU")
    attempted = f"planning for {gpus} of {hardware.memory_gb:g} GB"
    roomy = replace(hardware, host_memory_gb=math.inf)
    if not run_fits(work, hardware.unbound, num_gpus):
        return _no_samples(attempted, work)
    if run_fits(work, roomy, num_gpus):
        return ConfigError(
            attempted,
            f"every role fits a GPU, but a rank takes {_least_main(work, roomy, num_gpus):.1f} GB "
            "of main memory",
            f"at most {hardware.host_memory_gb:g} GB of main memory beside each GPU",
            "Raise --host-memory if the machines have more, or take more GPUs to share states out",
        )
    # Of the smallest GPUs CUDA alone takes more than there is.
    usable = max(0.0, hardware.usable_bytes / GB)
    remedies = list(_remedies(work, hardware, num_gpus))
    return ConfigError(
        attempted,
        f"in no layout does every role fit{work.at_largest}. At its least, "
        f"{_least(work, num_gpus)}",
        f"at most {usable:.1f} GB: the rest of the {hardware.memory_gb:g} GB is CUDA's, NCCL's and"
        " what an allocator cannot use",
        "It would fit with " + "; or with ".join(remedies)
        if remedies
        else "No settings make it fit: use smaller clips, or more and larger GPUs",
    )


def _no_samples(attempted: str, work: Workload) -> ConfigError:
    """Error where no layout gives every rank samples, with the settings that want more of them."""
    wanting = [f"batch.size is {work.batch_size}"]
    remedies = ["Raise batch.size"]
    if work.ulysses:
        numbers = ", ".join(f"{role} {number}" for role, number in work.ulysses)
        wanting.append(f"compute.ulysses {numbers}")
        remedies.append("give every role the same compute.ulysses")
    if work.paired:
        wanting.append("fake_score.gap shuffled, by which its ranks have pairs of samples")
        remedies.append("set fake_score.gap=own")
    return ConfigError(
        attempted,
        f"in no layout does every rank get samples: {', and '.join(wanting)}",
        "samples for the ranks of each role",
        ", or ".join(remedies),
    )


def _least_main(work: Workload, roomy: Hardware, num_gpus: int) -> float:
    """GB of main memory of the fullest rank, in the layout that takes the least of it."""
    layouts = _memory_of_layouts(work, num_gpus)
    fitting = [one for one in layouts if all(part.fits(roomy) for part in one.values())]
    return min(max(part.main_memory for part in one.values()) for one in fitting or layouts) / GB


def _least(work: Workload, num_gpus: int) -> str:
    """Returns the needs of each pool in the layout whose fullest rank is the least full."""
    layouts = _memory_of_layouts(work, num_gpus)
    best = min(layouts, key=lambda parts: max(part.total for part in parts.values()))
    words = {GENERATOR: "the generator", TEACHER: "the teacher", FAKE_SCORE: "the fake score"}
    words |= {LEARN: "generator and teacher", SCORE: "fake score and teacher"}
    if work.heads is not None:
        words = {LEARN: "the generator's pool", SCORE: "the fake score's pool"}
    return ", ".join(
        f"a rank of {words.get(name, name)} needs {part.total / GB:.1f} GB "
        f"(state {(part.state + part.base) / GB:.0f}, graphs {part.graphs / GB:.0f}, "
        f"working {(part.working + part.gathered) / GB:.0f})"
        for name, part in best.items()
    )


def _memory_of_layouts(work: Workload, num_gpus: int) -> list[dict[str, RankMemory]]:
    """Memory of a rank of each pool, in every layout."""
    layouts = [dict(rank_memory(work, split)) for split in candidates(work, num_gpus)]
    layouts += [map_memory(work, one) for one in pool_maps(work, num_gpus)]
    if fused_maps(work, num_gpus):
        layouts.append({"all roles": fused_memory(work, num_gpus)})
    return layouts


def _remedies(work: Workload, hardware: Hardware, num_gpus: int) -> Iterator[str]:
    """Changes that would do, the cheapest first."""
    found = fitting_savings(work, hardware, num_gpus)
    if found:
        yield " ".join(found[1])
    if work.averages and run_fits(replace(work, averages=False), hardware, num_gpus):
        yield "generator.ema_decay=0"
    for factor in (2, 4, 8, 16, 32, 64):
        if run_fits(replace(work, batch_size=factor * work.batch_size), hardware, num_gpus):
            yield f"batch.size={factor * work.batch_size}, which more ranks can share"
            break
    more = _fewest_gpus(work, hardware, num_gpus)
    larger = _least_memory(work, hardware, num_gpus)
    if not found:
        yield from _remedies_with_savings(work, hardware, num_gpus, more, larger)
    if more is not None:
        yield f"{more} GPUs"
    if larger is not None:
        yield f"GPUs of {larger.memory_gb:g} GB"


def _remedies_with_savings(
    work: Workload, hardware: Hardware, num_gpus: int, more: int | None, larger: Hardware | None
) -> Iterator[str]:
    """Fewer GPUs more, or smaller larger ones, where settings save memory besides."""
    saving = with_all_savings(work)
    fewer = _fewest_gpus(saving, hardware, num_gpus)
    are_fewer = fewer is not None and (more is None or fewer < more)
    if fewer and are_fewer and (found := fitting_savings(work, hardware, fewer)):
        yield f"{fewer} GPUs and {' '.join(found[1])}"
    smaller = _least_memory(saving, hardware, num_gpus)
    is_smaller = smaller is not None and (larger is None or smaller.memory_gb < larger.memory_gb)
    if smaller and is_smaller and (found := fitting_savings(work, smaller, num_gpus)):
        yield f"GPUs of {smaller.memory_gb:g} GB and {' '.join(found[1])}"


def _fewest_gpus(work: Workload, hardware: Hardware, num_gpus: int) -> int | None:
    """The fewest GPUs above a number that an iteration fits; None: the most do not suffice."""
    more = next((n for n in _doubled(num_gpus, _MOST_GPUS) if run_fits(work, hardware, n)), None)
    return None if more is None else _bisected(more, lambda n: run_fits(work, hardware, n))


def _least_memory(work: Workload, hardware: Hardware, num_gpus: int) -> Hardware | None:
    """The smallest GPUs that an iteration fits; None: the largest do not suffice."""
    layouts = _memory_of_layouts(work, num_gpus)
    sizes = [replace(hardware, memory_gb=float(gb)) for gb in range(0, _MOST_MEMORY_GB + 1, 8)]
    fits = (
        one for one in sizes for parts in layouts if all(part.fits(one) for part in parts.values())
    )
    return next(fits, None)


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
