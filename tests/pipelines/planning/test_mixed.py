"""Plans for several kinds of GPU: bounds by arithmetic, and what a recipe gets of them."""

import json
from dataclasses import replace

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.config.roles import FAKE_SCORE, TEACHER
from pipelines.planning.hardware import GpuKind, Hardware, parse_kinds
from pipelines.planning.layouts import AS_FAST, fastest_map, shared_out
from pipelines.planning.mixed import SPARE, mixed_layouts, mixed_maps
from pipelines.planning.plan import make_mixed_plan, make_plan
from pipelines.planning.pool_maps import LEARN
from pipelines.planning.stage_times import modelled
from pipelines.planning.stage_work import units_by_stage
from pipelines.planning.workload import Workload
from sgmd_core.errors import ConfigError
from tests.pipelines.planning.test_planning import sgmd
from workers.models.wan_arithmetic import RELEASED_SHAPES

WORK = Workload(RELEASED_SHAPES["1.3b"], (16, 21, 60, 104), text_length=512, batch_size=16)
KINDS = ("--kind", "H100=8x80@229", "--kind", "L40S=8x48@80")


def kinds(*texts: str) -> tuple[GpuKind, ...]:
    return parse_kinds(texts, Hardware())


def planned(*texts: str):
    several = kinds(*texts)
    return make_mixed_plan(WORK, modelled(WORK, several[0].hardware), several)


def work_s(*texts: str) -> float:
    """Seconds of an iteration in which no GPU ever waits."""
    forwards = sum(units_by_stage(WORK).values()) * WORK.batch_size
    return (
        forwards
        * WORK.forward_flops
        / sum(one.num_gpus * one.hardware.flops for one in kinds(*texts))
    )


@pytest.mark.parametrize(
    "pools",
    [
        [(3.0, 8.0)],
        [(3.0, 8.0), (5.0, 8.0)],
        [(0.0, 10.0), (30.0, 1.0)],
        [(2.0, 9.0), (1.0, 4.0), (4.5, 20.0)],
    ],
)
def test_shared_calls_end_when_the_parts_of_all_pools_make_one_whole(pools):
    ends_s = shared_out(pools)
    parts = [max(0.0, ends_s - load_s) / calls_s for load_s, calls_s in pools]
    assert sum(parts) == pytest.approx(1)


@pytest.mark.slow
def test_two_kinds_that_are_the_same_are_planned_as_one():
    mixed = planned("a=4x80@229", "b=4x80@229")
    hardware = Hardware(flops=229e12)
    one = make_plan(WORK, modelled(WORK, hardware), hardware, 8)
    (mapped,) = (layout for layout in one.layouts if layout.name == "map")
    (found,) = (layout for layout in mixed.layouts if not layout.alone)
    assert found.iteration_s <= 1.001 * mapped.iteration_s


@pytest.mark.slow
@pytest.mark.parametrize("slower", ["L40S=8x48@80", "A100=4x80@160", "H200=2x141@229"])
def test_more_gpus_of_another_kind_help_within_what_they_can_do(slower):
    plan = planned("H100=8x80@229", slower)
    alone = next(layout for layout in plan.layouts if layout.alone == "H100")
    assert work_s("H100=8x80@229", slower) < plan.best.iteration_s < 0.98 * alone.iteration_s
    assert not plan.best.alone
    for pool in plan.best.pools.values():
        (kind,) = (one for one in plan.kinds if one.name == pool.kind)
        assert pool.memory.fits(kind.hardware)
        assert pool.speed == pytest.approx(kind.hardware.flops / 229e12)


def test_the_teacher_gets_a_third_kind_beside_those_of_the_learners():
    several = kinds("a=4x80@229", "b=4x80@200", "c=4x80@180")
    times = modelled(WORK, several[0].hardware)
    maps = [
        one
        for one in mixed_maps(WORK, several)
        if one.micro_batches == 4
        and set(one.ranks.values()) == {4}
        and [one.kinds[pool].name for pool in (LEARN, one.places[FAKE_SCORE][0])] == ["b", "a"]
    ]
    number_of = {id(one): len({kind.name for kind in one.kinds.values()}) for one in maps}
    best = {
        number: fastest_map(
            WORK, times, several[0].hardware, [one for one in maps if number_of[id(one)] == number]
        )
        for number in (2, 3)
    }
    assert best[3].iteration_s < 0.98 * best[2].iteration_s
    assert best[3].pools[SPARE].roles == (TEACHER,)
    assert {pool.kind for pool in best[3].pools.values()} == {"a", "b", "c"}
    # Every use of the teacher beside the pool of its own.
    assert len({one.places[TEACHER] for one in maps if number_of[id(one)] == 3}) == 4
    config = load_recipe("wan21-1.3b", ["batch={size: 16, micro_batches: 4}"])
    assert len(config.with_settings(best[3].settings).topology.pools) == 3


@pytest.mark.slow
def test_gpus_that_hold_nothing_are_left_out():
    plan = planned("H100=8x80@229", "T4=8x8@10")
    assert plan.best.alone == "H100"
    assert {pool.kind for pool in plan.best.pools.values()} == {"H100"}


@pytest.mark.parametrize(
    "texts", [("a=3x80@229", "b=5x48@80"), ("a=3x80@9", "b=5x48@8", "c=1x9@7")]
)
def test_no_pool_has_more_ranks_than_its_kind_has_gpus(texts):
    several = kinds(*texts)
    counts = {kind.name: kind.num_gpus for kind in several}
    maps = list(mixed_maps(WORK, several))
    assert len(maps) > 1000
    for one in maps:
        used = dict.fromkeys(counts, 0)
        for pool, ranks in one.ranks.items():
            used[one.kinds[pool].name] += ranks
        assert sum(number > 0 for number in used.values()) >= 2
        assert all(used[name] <= counts[name] for name in counts)


def test_more_gpus_than_samples_leave_no_layout_out():
    def places(number: int) -> set[tuple[tuple[str, int, str], ...]]:
        maps = mixed_maps(replace(WORK, batch_size=4), kinds(f"a={number}x80@229", "b=4x48@80"))
        return {
            tuple((pool, ranks, one.kinds[pool].name) for pool, ranks in one.ranks.items())
            for one in maps
        }

    assert (("learn", 4, "a"), ("score", 4, "a"), ("spare", 4, "b")) in places(8)
    assert places(100) == places(8)


@pytest.mark.slow
def test_processes_beside_the_roles_take_the_last_kind_first():
    plan = make_mixed_plan(
        WORK,
        modelled(WORK, Hardware()),
        kinds("a=4x80@229", "b=1x80@229"),
        beside={"validator": 1.0},
    )
    assert plan.num_gpus == 4
    assert plan.best.alone == "a"
    for counts, left in (((8, 1), 7), ((2, 1), 1)):
        # Both of one kind where one has enough and some for the roles; else of several.
        several = kinds(f"a={counts[0]}x80@229", f"b={counts[1]}x80@229")
        both = make_mixed_plan(WORK, plan.times, several, beside={"text": 1.0, "validator": 1.0})
        assert both.num_gpus == left
        assert (both.kind_beside is None) == (left == 1)
    with pytest.raises(ConfigError, match="take all of the first kind"):
        make_mixed_plan(WORK, plan.times, kinds("a=1x80@9", "b=1x80@9"), beside={"text": 2.0})


@pytest.mark.slow
def test_where_nothing_fits_every_kind_is_named():
    with pytest.raises(ConfigError, match="no layout fits") as caught:
        planned("T4=8x8@10", "P4=8x4@5")
    assert "T4" in str(caught.value)
    assert "P4" in str(caught.value)


@pytest.mark.parametrize("text", ["H100", "H100=8", "H100=8x80", "H100=0x80@229", "=8x80@229"])
def test_a_kind_that_cannot_be_read_is_refused(text):
    with pytest.raises(ConfigError, match="NAME=GPUSxGB@TFLOPS"):
        kinds(text, "b=1x80@229")


def test_a_name_twice_is_refused():
    with pytest.raises(ConfigError, match="each name once"):
        kinds("a=1x80@229", "a=1x80@229")


@pytest.mark.slow
def test_a_written_recipe_pins_its_pools_to_their_kinds(tmp_path):
    mine = tmp_path / "mine.yaml"
    options = (*KINDS, "--model", "1.3b", "--write", mine, "--json")
    told = json.loads(sgmd("plan", "wan21-1.3b", *options).stdout)
    assert told["layout"] == "map"
    config = load_recipe(str(mine))
    pools = told["layouts"]["map"]["pools"]
    for name, pool in config.topology.pools.items():
        assert pool.labels == {"ray.io/accelerator-type": pools[name]["kind"]}
        assert pool.speed == pytest.approx(pools[name]["speed"], abs=1e-4)
        assert pool.ranks == pools[name]["gpus"]
    for layout in told["layouts"].values():
        load_recipe("wan21-1.3b").with_settings(layout["settings"])
    words = sgmd("plan", "wan21-1.3b", *KINDS, "--model", "1.3b").output
    assert "on H100 alone" in words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kind", "a=1x80@229"), "at least two"),
        ((*KINDS, "--gpus", "8"), "several kinds of GPU by --kind"),
        ((*KINDS, "--fit"), "--kind and --fit"),
        (("--gpus-per-node", "0"), "a number above 0"),
        (
            (*KINDS, "--emit", "slurm", "output=s3://b/runs", "data.train=s3://b/t"),
            "its machines are all equal",
        ),
        (("--kind", "a=5000x80@229", "--kind", "b=1x80@229"), "at most 4096"),
        (("--kind", f"a={'9' * 400}x80@229", "--kind", "b=1x80@229"), "NAME=GPUSxGB@TFLOPS"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, words):
    result = sgmd("plan", "wan21-1.3b", "--model", "1.3b", *options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


@pytest.mark.slow
def test_weights_gathered_between_machines_are_slower_than_within_one():
    def iteration_s(**numbers: float) -> float:
        hardware = replace(Hardware(flops=1e16), **numbers)
        return make_plan(WORK, modelled(WORK, hardware), hardware, 16).best.iteration_s

    slow = {"gather_bandwidth_between": 1e9}
    assert iteration_s(**slow, ranks_per_machine=16) == iteration_s(ranks_per_machine=16)
    assert iteration_s(**slow) > 1.3 * iteration_s(ranks_per_machine=16)


def test_a_slower_kind_before_a_faster_one_is_refused():
    with pytest.raises(ConfigError, match="H100, which is faster, after L40S"):
        kinds("L40S=8x48@180", "H100=8x80@990")


@pytest.mark.slow
def test_of_plans_that_are_as_fast_the_one_of_fewest_gpus_comes_first():
    several = kinds("H100=8x80@990", "L40S=7x48@180")
    found = mixed_layouts(WORK, modelled(WORK, several[0].hardware), several)
    fastest_s = min(one.iteration_s for one in found)
    as_fast = [one for one in found if one.iteration_s <= AS_FAST * fastest_s]
    assert len(as_fast) > 1
    assert found[0].num_gpus == min(one.num_gpus for one in as_fast)
    assert found[0].num_gpus < max(one.num_gpus for one in as_fast)
