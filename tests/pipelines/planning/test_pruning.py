"""Layouts that a search leaves out: none of them is faster than those that it simulates."""

import random
from dataclasses import replace
from itertools import product

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.planning.hardware import Hardware
from pipelines.planning.layouts import map_layout
from pipelines.planning.search import MAX_DEPTH, candidates, find_best, predict
from pipelines.planning.stage_times import StageTimes, modelled
from pipelines.planning.traffic import exchanged_bytes
from pipelines.planning.workload import Workload

AS_FAST = 1.01**2
"""Times within a hundredth are taken for equal, twice: of splits, and of numbers of teachers."""
FRESH = ("fake_score.tracking=fresh", "objective.fake_updates=3")


@pytest.mark.parametrize("settings", [(), ("fake_score.walk=joint",), FRESH])
def test_no_pools_are_faster_than_those_that_are_found(settings):
    recipe = Workload.of(load_recipe("wan21-1.3b", [*settings, "validation.every=0"]), "1.3b")
    draws, tightest = random.Random(0), 0.0
    for size, num_gpus in product((2, 4, 6, 8), (4, 6)):
        work = replace(recipe, batch_size=size)
        hardware = Hardware(gather_bandwidth=10 ** draws.uniform(8, 11)).unbound
        modelled_s = modelled(work, hardware).seconds.items()
        seconds = {name: own * 10 ** draws.uniform(-2, 2) for name, own in modelled_s}
        given = work, StageTimes(seconds, ""), hardware
        every = [
            predict(*given, replace(split, depth=depth)).iteration_s
            for split in candidates(work, num_gpus)
            for depth in range(1, min(MAX_DEPTH, split.micro_batches) + 1)
        ]
        # What is searched matters.
        assert max(every) > 1.2 * min(every)
        found = find_best(*given, num_gpus)
        assert found is not None
        assert found.iteration_s <= AS_FAST * min(every)
        # The work of a role takes no longer than the iteration that contains it.
        again = find_best(*given, num_gpus, below_s=1.00001 * min(every))
        assert again is not None
        assert again.iteration_s <= AS_FAST * min(every)
        tightest = max(tightest, _least_limit_s(given, num_gpus) / min(every))
    # Some plans would be lost if that work were taken for longer by a hundredth.
    assert tightest > 0.99


def _least_limit_s(given: tuple[Workload, StageTimes, Hardware], num_gpus: int) -> float:
    """The least limit with which pools are found."""
    low, high = 0.0, 1e6
    while high > 1.0001 * low:
        middle = (low + high) / 2
        low, high = (low, middle) if find_best(*given, num_gpus, middle) else (middle, high)
    return high


def test_no_map_is_left_out_for_the_exchanges_of_the_run_that_was_measured():
    recipe = Workload.of(load_recipe("wan21-1.3b", ["validation.every=0"]), "1.3b")
    work, hardware = replace(recipe, batch_size=4), Hardware(gather_bandwidth=1e9).unbound
    plain = modelled(work, hardware)
    known = map_layout(work, plain, hardware, 4)
    # Seconds as a run with four ranks a sample has them.
    four = replace(work, ulysses=tuple((role, 4) for role in work.roles))
    exchanged = exchanged_bytes(four)
    seconds = {
        name: own + hardware.gather_s(4 * exchanged.get(name, 0.0), 4)
        for name, own in plain.seconds.items()
    }
    times = replace(plain, seconds=seconds, ulysses=four.ulysses)
    with_exchanges = map_layout(work, replace(times, ulysses=()), hardware, 4)
    assert known is not None
    assert with_exchanges is not None
    assert with_exchanges.iteration_s > 1.1 * known.iteration_s
    found = map_layout(work, times, hardware, 4, below_s=1.00001 * known.iteration_s)
    assert found is not None
    assert found.iteration_s == pytest.approx(known.iteration_s, rel=1e-9)
