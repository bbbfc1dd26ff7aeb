"""Recipes of plans: whatever the recipe sets, each layout that is planned can be run."""

from dataclasses import replace
from functools import partial

import pytest

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER
from pipelines.config.topology import NamedPoolSettings
from pipelines.planning.hardware import Hardware, parse_kinds
from pipelines.planning.layouts import fastest_map, fused_layout, map_layout
from pipelines.planning.mixed import SPARE, mixed_layouts
from pipelines.planning.plan import Plan, best_layouts
from pipelines.planning.planned_layout import Layout
from pipelines.planning.planned_recipe import planned_recipe
from pipelines.planning.pool_maps import FUSED, LEARN, PoolMap, fused_map
from pipelines.planning.stage_times import StageTimes, modelled, rescaled
from pipelines.planning.workload import Workload

ACCELERATOR, DOMAIN = "ray.io/accelerator-type", {"ray.io/gpu-domain": "rack-1"}
BATCH = "batch={size: 4, micro_batches: 2}"
KINDS = ("H100=4x80@229", "L4=8x24@30")


def made(*overrides: str) -> tuple[DistillConfig, Workload]:
    config = load_recipe("wan21-1.3b", [BATCH, *overrides])
    return config, Workload.of(config, "1.3b")


def written(config: DistillConfig, work: Workload, layout: Layout | None) -> DistillConfig:
    assert layout is not None
    times = modelled(work, Hardware())
    return planned_recipe(config, Plan(work, Hardware(), 4, times, (layout,)))


def mapped(work: Workload) -> Layout | None:
    return map_layout(work, modelled(work, Hardware()), Hardware(), 2)


def mixed(work: Workload) -> list[Layout]:
    kinds = parse_kinds(KINDS, Hardware())
    return mixed_layouts(work, modelled(work, kinds[0].hardware), kinds)


def on_two_kinds(work: Workload) -> Layout | None:
    """Both learners on one kind of GPU, and another copy of the teacher on the other kind."""
    fast, slow = parse_kinds(KINDS, Hardware())
    one = PoolMap(
        {LEARN: 2, SPARE: 2},
        {GENERATOR: (LEARN,), TEACHER: (LEARN, SPARE), FAKE_SCORE: (LEARN,)},
        2,
        kinds={LEARN: fast, SPARE: slow},
    )
    return fastest_map(work, modelled(work, fast.hardware), fast.hardware, [one])


def test_ranks_that_only_pools_of_a_role_read_are_left_behind():
    roles = ("generator", "teacher", "fake_score", "discriminator")
    ranks = [f"topology.{role}.ranks=2" for role in roles]
    config, work = made("topology.mode=pools", "objective.method=adm", *ranks)
    found = written(config, work, mapped(work))
    assert found.topology.mode == "map"
    assert {getattr(found.topology, role).ranks for role in roles} == {1}


@pytest.mark.parametrize("stale", [0, 1])
def test_roles_that_take_turns_in_a_map_run_no_iteration_ahead(stale):
    config, work = made(f"topology.max_staleness_iterations={stale}")
    apart = written(config, work, mapped(work)).topology
    together = written(config, work, on_two_kinds(work)).topology
    assert apart.roles.generator != apart.roles.fake_score
    assert apart.max_staleness_iterations == stale
    assert together.roles.generator == together.roles.fake_score
    assert together.max_staleness_iterations == 0


def test_pools_on_several_kinds_keep_the_labels_that_the_recipe_asks_for():
    pools = f"topology.pools={{learn: {{labels: {DOMAIN}}}, score: {{labels: {{rack: r2}}}}}}"
    config, work = made(pools, f"topology.fused.labels={DOMAIN}")
    found = written(config, work, on_two_kinds(work)).topology.pools
    assert found["learn"].labels == {**DOMAIN, ACCELERATOR: "H100"}
    assert found["spare"].labels == {ACCELERATOR: "L4"}
    times = modelled(work, Hardware())
    fused = partial(fused_layout, work, times, Hardware(), 2)
    on_kind = written(config, work, fused().on("H100")).topology.fused
    assert on_kind.labels == {**DOMAIN, ACCELERATOR: "H100"}
    assert written(config, work, fused()).topology.fused.labels == DOMAIN


def test_equal_gpus_of_a_plan_have_no_speed_of_the_recipe():
    pools = "topology.pools={learn: {cpus: 3, speed: 0.5}, score: {speed: 2}}"
    config, work = made(pools)
    found = written(config, work, mapped(work)).topology.pools
    assert found["learn"] == NamedPoolSettings(cpus=3, gpus=1)
    assert found["score"].speed == 1


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 5])
def test_every_layout_of_a_shuffled_gap_leaves_ranks_pairs_of_samples(num_gpus):
    config, work = made("fake_score.gap=shuffled")
    layouts = best_layouts(work, modelled(work, Hardware()), Hardware(), num_gpus)
    assert len(layouts) == min(num_gpus, 3)
    for layout in layouts:
        assert written(config, work, layout).topology.mode == layout.name
    kinds = mixed(work)
    assert kinds
    for layout in kinds:
        written(config, work, layout)


def test_fewer_gpus_than_work_on_a_sample_together_make_a_fused_layout_of_all_of_them():
    for gap in ("own", "shuffled"):
        _, work = made(f"fake_score.gap={gap}")
        assert fused_map(replace(work, ulysses=((GENERATOR, 4),)), 2).ranks == {FUSED: 4}
        assert fused_map(work, 3).ranks == {FUSED: 2}


def test_a_stage_whose_work_another_one_does_has_measured_seconds_of_0():
    apart_config, apart = made()
    joint_config, joint = made("fake_score.walk=joint")
    measured = StageTimes(modelled(apart, Hardware()).seconds, "measured")
    times = rescaled(measured, apart, joint, Hardware())
    layout = map_layout(joint, times, Hardware(), 2)
    assert layout is not None
    for config, work, own in ((apart_config, apart, measured), (joint_config, joint, times)):
        plan = Plan(work, Hardware(), 2, own, (layout,))
        seconds = planned_recipe(config, plan).topology.stage_seconds
        assert (seconds["fake_score.track"] > 0) == (work is apart)
        assert seconds["fake_score.signal"] > 0
