"""The settings with which a run that fits is fastest, of all combinations of the savings.

A saving of memory never makes a layout faster, but it may let a faster one fit: with the inputs of
layers in main memory all roles together fit GPUs that held two pools alone. The two backward passes
through the fake score are tried with all of them: which is faster depends on the layout.

    ideal     the fastest layout on GPUs that hold anything: no settings do better
    tried     combinations in the order of the least that their work can take, until what was found
              is as fast as that, or as the ideal
    chosen    of those as fast as the fastest, the one with the fewest settings
"""

import math
from collections.abc import Callable

from pipelines.planning.hardware import Hardware
from pipelines.planning.plan import best_layouts
from pipelines.planning.savings import Saved, all_savings, walk_setting
from pipelines.planning.stage_times import StageTimes
from pipelines.planning.workload import Workload

_AS_FAST = 1.005


def fastest_fit(
    work: Workload,
    times_of: Callable[[Workload], StageTimes],
    hardware: Hardware,
    num_gpus: int,
) -> Saved | None:
    """The iteration with the settings which make it fastest; None if with none of them it fits.

    Args:
        work: The iteration, with the recipe's settings.
        times_of: Returns the times of an iteration with others.
        hardware: What it runs on.
        num_gpus: For the three roles.
    """
    ideal_s = min(
        best_layouts(one, times_of(one), hardware.unbound, num_gpus)[0].iteration_s
        for one in (work, work.other_walk)
        if one is not None
    )

    def least_s(saved: Saved) -> float:
        return max(ideal_s, _work_s(saved.work, times_of(saved.work)) / num_gpus)

    found: list[tuple[float, Saved]] = []
    best_s, too_large = math.inf, set[frozenset[str]]()
    ordered = sorted(all_savings(work), key=lambda saved: (least_s(saved), len(saved.settings)))
    for saved in ordered:
        if best_s <= _AS_FAST * least_s(saved):
            break
        # Memory is the same with either walk.
        of_memory = frozenset(saved.settings) - {walk_setting(saved.work)}
        if of_memory in too_large:
            continue
        times = times_of(saved.work)
        layout = best_layouts(saved.work, times, hardware, num_gpus, _AS_FAST * best_s)[0]
        if layout.fits:
            found.append((layout.iteration_s, saved))
            best_s = min(best_s, layout.iteration_s)
        elif best_s == math.inf:
            too_large.add(of_memory)
    equal = [(len(one.settings), own_s, one) for own_s, one in found if own_s <= _AS_FAST * best_s]
    return min(equal, key=lambda one: one[:2])[2] if equal else None


def _work_s(work: Workload, times: StageTimes) -> float:
    """Seconds of all stages of an iteration on one GPU."""
    return work.batch_size * sum(
        seconds * work.updates_with(stage) for stage, seconds in times.seconds.items()
    )
