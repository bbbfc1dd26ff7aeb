"""All roles on every GPU: samples a call, ranks on one machine, and ranks that share samples."""

import pickle
import re
from dataclasses import replace
from itertools import product

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER
from pipelines.planning.hardware import Hardware
from pipelines.planning.layouts import fastest_map, fused_layout
from pipelines.planning.plan import best_layouts, make_plan
from pipelines.planning.planned_layout import Layout
from pipelines.planning.pool_maps import (
    FUSED,
    PoolMap,
    fused_map,
    fused_maps,
    fused_memory,
    map_memory,
)
from pipelines.planning.search import PoolSplit, candidates, find_best, predict
from pipelines.planning.stage_times import modelled
from pipelines.planning.workload import Workload
from sgmd_core.errors import ConfigError
from workers.models.wan_arithmetic import RELEASED_SHAPES

WORK = Workload(RELEASED_SHAPES["1.3b"], (16, 21, 60, 104), text_length=512, batch_size=8)
ROOMY = Hardware(memory_gb=1000)
SLOW = replace(ROOMY, gather_bandwidth=7e8, gather_bandwidth_between=7e8)
"""Weights take longer to gather than a sample takes to compute."""
OLD = dict.fromkeys((GENERATOR, TEACHER, FAKE_SCORE), (FUSED,))


def seconds(hardware: Hardware, ranks: int, micro_batches: int, work: Workload = WORK) -> float:
    one = PoolMap({FUSED: ranks}, OLD, micro_batches)
    found = fastest_map(work, modelled(work, hardware), hardware, [one])
    assert found is not None
    return found.iteration_s


def fused(hardware: Hardware, gpus: int, work: Workload = WORK) -> Layout:
    return fused_layout(work, modelled(work, hardware), hardware, gpus)


def test_ranks_take_several_samples_a_call_where_weights_arrive_slowly():
    quick, slow = fused(ROOMY, 4), fused(SLOW, 4)
    # What it moves: four gatherings in place of one a micro-batch.
    assert seconds(SLOW, 4, 2) > 1.4 * seconds(SLOW, 4, 1)
    assert seconds(ROOMY, 4, 2) < 1.005 * seconds(ROOMY, 4, 1)
    assert quick.settings["batch.micro_batches"] == 2
    assert slow.settings["batch.micro_batches"] == 1
    assert slow.iteration_s == pytest.approx(seconds(SLOW, 4, 1))
    assert slow.pools[FUSED].samples_per_call == 2
    assert slow.pools[FUSED].memory.graphs == 2 * quick.pools[FUSED].memory.graphs
    # Where these graphs do not fit, a rank has one sample at a time.
    small = replace(SLOW, memory_gb=slow.pools[FUSED].memory.total / 0.95e9 + 3)
    assert fused(small, 4).settings["batch.micro_batches"] == 2


@pytest.mark.parametrize("batch", [1, 3, 6])
@pytest.mark.parametrize("hardware", [ROOMY, SLOW, replace(ROOMY, flops=1e18)])
def test_no_ranks_and_no_parts_of_the_batch_are_faster(batch, hardware):
    work = replace(WORK, batch_size=batch)
    tried = [
        seconds(hardware, ranks, m, work)
        for ranks, m in product(range(1, 5), range(1, batch + 1))
        if ranks <= -(-batch // m)
    ]
    found = fused(hardware, 4, work)
    assert found.iteration_s <= 1.005 * min(tried)
    assert max(tried) > 1.2 * min(tried) or batch == 1


def test_ranks_of_one_machine_do_where_the_others_are_far():
    far = replace(ROOMY, ranks_per_machine=2, gather_bandwidth_between=1e8)
    assert fused(ROOMY, 4).num_gpus == 4
    assert fused(far, 4).num_gpus == 2


def test_pools_of_a_slow_network_are_found_by_their_gatherings():
    times = modelled(WORK, SLOW)
    tried = [
        predict(WORK, times, SLOW, replace(split, depth=min(2, split.micro_batches)))
        for split in candidates(WORK, 5)
    ]
    best = find_best(WORK, times, SLOW, 5)
    assert best is not None
    assert best.iteration_s <= 1.01 * min(one.iteration_s for one in tried)
    one_at_a_time = predict(WORK, times, SLOW, PoolSplit(2, 1, 2, 4, 2))
    assert best.iteration_s < 0.95 * one_at_a_time.iteration_s


def test_more_parts_that_are_as_fast_take_less_memory():
    found = fused(ROOMY, 3, replace(WORK, batch_size=7))
    assert (found.num_gpus, found.settings["batch.micro_batches"]) == (3, 3)
    assert found.pools[FUSED].samples_per_call == 1


@pytest.mark.slow
@pytest.mark.parametrize("batch", [2, 8, 16])
def test_roles_that_share_samples_differently_get_settings_that_a_recipe_takes(batch):
    pools = ("learn.ranks=4", "score.ranks=2")
    sized = [*(f"topology.pools.{one}" for one in pools), "topology.roles.teacher=score"]
    sized.append(f"batch={{size: {batch}, micro_batches: 1}}")
    together = [f"{role}.compute.ulysses=2" for role in (TEACHER, FAKE_SCORE)]
    for more in ((), together):
        config = load_recipe("wan21-1.3b", [*sized, "generator.compute.ulysses=4", *more])
        work = Workload.of(config, "1.3b")
        layouts = best_layouts(work, modelled(work, ROOMY), ROOMY, 8)
        assert layouts
        for layout in layouts:
            assert layout.fits
            assert config.with_settings(layout.settings).topology.mode == layout.name
    # Of eight ranks, each with a sample of the other roles, none is idle.
    if batch > 2:
        whole_s = batch * sum(modelled(work, ROOMY).seconds.values()) / 8
        assert fused(ROOMY, 8, work).iteration_s < 1.1 * whole_s
        alone = PoolMap({FUSED: 8}, OLD, batch // 2)
        assert alone.shares_out(work) == (batch // 2 == 1)


def test_a_batch_that_leaves_ranks_without_samples_is_refused_by_what_it_lacks():
    work = replace(WORK, batch_size=1, ulysses=((GENERATOR, 4),))
    assert fused_maps(work, 8) == []
    with pytest.raises(ConfigError, match="in no layout does every rank get samples") as refused:
        make_plan(work, modelled(work, ROOMY), ROOMY, 4)
    assert "compute.ulysses generator 4" in refused.value.found
    assert "pairs" not in f"{refused.value.found} {refused.value.remedy}"
    # Beside the generator's four a fifth rank has the sample of the other roles.
    plan = make_plan(work, modelled(work, ROOMY), ROOMY, 5)
    assert {name: pool.gpus for name, pool in plan.best.pools.items()} == {"learn": 4, "score": 1}
    assert plan.left_out[FUSED].startswith("leaves ranks without samples")
    assert fused_map(work, 8).ranks == {FUSED: 4}


def test_a_layout_that_leaves_ranks_without_samples_is_no_remedy():
    work = replace(WORK, batch_size=1, ulysses=((GENERATOR, 4),))
    tight = Hardware(memory_gb=24)
    assert fused_maps(work, 5) == []
    # What it moves: of all layouts this one, which no recipe may have, would take the least.
    (mapped,) = make_plan(work, modelled(work, ROOMY), ROOMY, 5).layouts
    most = max(pool.memory.total for pool in mapped.pools.values())
    assert fused_memory(work, 5).total < 0.8 * most
    with pytest.raises(ConfigError) as refused:
        make_plan(work, modelled(work, tight), tight, 5)
    assert "a rank of all roles" not in refused.value.found
    gigabytes = int(re.findall(r"GPUs of (\d+) GB(?! and)", refused.value.remedy)[-1])
    enough = replace(tight, memory_gb=gigabytes)
    assert make_plan(work, modelled(work, enough), enough, 5).best.name == "map"


def test_a_plan_blames_pairs_of_samples_where_they_are_the_cause():
    work = replace(WORK, batch_size=4, ulysses=((GENERATOR, 4),))
    # What it moves: without pairs all roles together are planned.
    assert FUSED in {one.name for one in make_plan(work, modelled(work, ROOMY), ROOMY, 6).layouts}
    paired = replace(work, paired=True)
    plan = make_plan(paired, modelled(paired, ROOMY), ROOMY, 6)
    assert "pairs of samples" in plan.left_out[FUSED]


def test_pairs_of_samples_are_a_cause_of_ranks_without_samples():
    work = replace(WORK, batch_size=4, ulysses=((GENERATOR, 4),))
    # What it moves: without pairs four GPUs do.
    assert make_plan(work, modelled(work, ROOMY), ROOMY, 4).best.name == FUSED
    paired = replace(work, paired=True)
    with pytest.raises(ConfigError) as refused:
        make_plan(paired, modelled(paired, ROOMY), ROOMY, 4)
    assert "fake_score.gap shuffled, by which its ranks have pairs" in refused.value.found
    assert refused.value.remedy.endswith("or set fake_score.gap=own")


def test_where_the_usual_ranks_are_left_out_the_smallest_decides_by_memory():
    work = replace(WORK, batch_size=3, ulysses=((FAKE_SCORE, 2),))
    first, *others = fused_maps(work, 8)
    assert first.ranks[FUSED] != fused_map(work, 8).ranks[FUSED]
    needs = {one.micro_batches: map_memory(work, one)[FUSED].total for one in others}
    least = min(needs, key=needs.__getitem__)
    assert needs[least] < 0.8 * map_memory(work, first)[FUSED].total
    tight = Hardware(memory_gb=(needs[least] / 1e9 + 3) / 0.95 + 0.1)
    found = fused(tight, 8, work)
    assert found.fits
    assert found.settings["batch.micro_batches"] == least


def test_a_workload_that_has_been_planned_can_be_pickled():
    work = replace(WORK, batch_size=4)
    seconds_of_one = make_plan(work, modelled(work, ROOMY), ROOMY, 2).best.iteration_s
    assert work.remembered
    copy = pickle.loads(pickle.dumps(work))
    assert copy == work
    assert not copy.remembered
    assert make_plan(copy, modelled(copy, ROOMY), ROOMY, 2).best.iteration_s == seconds_of_one
