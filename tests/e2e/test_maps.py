"""Roles on named pools, several to a pool and the teacher on some: the run of one process.

With one rank a pool the bits are those of one process; with several they differ as sums over ranks
do: see `test_topologies`.
"""

import pytest

from pipelines.config.recipe import DistillConfig
from pipelines.distillation.run import distill
from tests.e2e.conftest import MakeRecipe
from tests.e2e.test_equivalence import (
    MODES,
    Reference,
    history,
    moments,
    runs_in_one_process,
    state,
)
from tests.e2e.test_topologies import (
    BATCH,
    LEARNERS,
    OTHER_SAMPLES,
    POOL,
    TOLERANCE,
    assert_run_moves,
    require_same_run,
    teams,
    weights_of,
)
from tests.helpers.moves import assert_moves, relative_error

TWO = ["topology.mode=map", f"topology.pools={{learn: {{{POOL}}}, score: {{{POOL}}}}}"]
THREE = [
    "topology.mode=map",
    f"topology.pools={{a: {{{POOL}}}, b: {{{POOL}}}, spare: {{{POOL}, speed: 0.5}}}}",
    "topology.roles={generator: a, fake_score: b, teacher: [a, b, spare]}",
]
LEARNERS_TOGETHER = [
    "topology.mode=map",
    f"topology.pools={{both: {{{POOL}}}, frozen: {{{POOL}}}}}",
    "topology.roles={generator: both, fake_score: both, teacher: frozen}",
]

BY_FOUR = ["iterations=2", "checkpoint.every=1", "batch={size: 4, micro_batches: 4}"]
MIXED = [*MODES["dmd2"], *BATCH, "iterations=2", "fake_score.ida_decay=0.5"]

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def one_process(module_recipe: MakeRecipe) -> Reference:
    return runs_in_one_process(module_recipe, BY_FOUR, 1, 2)


@pytest.fixture(scope="module")
def mixing(module_recipe: MakeRecipe) -> DistillConfig:
    """A run of `MIXED` in one process, whose weights other samples and no mixing would change."""
    config = module_recipe("name=mixing", *MIXED)
    distill(config)
    assert_run_moves(module_recipe, config, 2, MIXED, OTHER_SAMPLES)
    unmixed = "fake_score.ida_decay=1.0"
    assert_run_moves(module_recipe, config, 2, MIXED, unmixed, roles=("fake_score",))
    return config


@pytest.mark.parametrize(
    ("mode", "layout"),
    [
        ("sgmd-shared-released", TWO),
        ("dmd2", LEARNERS_TOGETHER),
        ("sid", THREE),
    ],
)
def test_one_rank_a_pool_makes_the_bits_of_one_process(
    make_recipe: MakeRecipe, one_process: Reference, mode: str, layout: list[str]
) -> None:
    local = one_process(mode)
    mapped = make_recipe("name=map", *BY_FOUR, *MODES[mode], *layout)
    summary = distill(mapped)
    assert history(mapped) == history(local)
    assert state(mapped, 2) == state(local, 2)
    if layout is TWO:
        # Both copies of the teacher have worked.
        used = {rank for rank, spent in summary["utilisation"].items() if spent["busy_s"] > 0}
        assert {"teacher[0]", "teacher[1]"} <= used


@pytest.mark.parametrize("layout", [["topology.mode=fused"], TWO], ids=["fused", "map"])
def test_one_walk_back_makes_the_bits_of_two_wherever_roles_live(
    make_recipe: MakeRecipe, one_process: Reference, layout: list[str]
) -> None:
    mode = "sgmd-shared-released"
    local = one_process(mode)
    joint = ["fake_score.walk=joint", "fake_score.compute.checkpointing=true"]
    placed = make_recipe("name=placed", *BY_FOUR, *MODES[mode], *joint, *layout)
    distill(placed)
    assert history(placed) == history(local)
    assert state(placed, 2) == state(local, 2)


def test_pdmd_makes_the_bits_of_one_process_in_pools(make_recipe: MakeRecipe) -> None:
    settings = [*MODES["pdmd"], "iterations=2"]
    local = make_recipe("name=local", *settings)
    plain = make_recipe("name=plain", *settings, "objective.method=dmd")
    distill(local)
    distill(plain)
    # What is projected out goes from the fake score's answer into the generator's gradient.
    assert_moves(moments(local, 2), moments(plain, 2))
    pools = make_recipe("name=pools", *settings, "topology.mode=pools")
    distill(pools)
    assert history(pools) == history(local)
    assert state(pools, 2) == state(local, 2)


def test_pools_of_unequal_ranks_share_the_teachers_calls(
    make_recipe: MakeRecipe, mixing: DistillConfig
) -> None:
    """Two ranks learn, one tracks; the teacher is sharded on the first pool, whole on the other."""
    two = make_recipe(
        "name=two",
        *MIXED,
        "topology.mode=map",
        f"topology.pools={{learn: {{ranks: 2, {POOL}}}, score: {{{POOL}}}}}",
    )
    summary = distill(two)
    require_same_run(two, mixing, 2, losses=1e-3)
    teachers = {f"teacher[{rank}]" for rank in range(3)}
    assert {"generator[0]", "generator[1]", "fake_score"} <= set(summary["utilisation"])
    assert {name for name in summary["utilisation"] if "teacher" in name} <= teachers


def test_sharded_roles_track_afresh_and_mix_their_weights(
    make_recipe: MakeRecipe, mixing: DistillConfig
) -> None:
    two = make_recipe("name=two", *MIXED, *teams(2, (1, 1), 2))
    summary = distill(two)
    assert {f"{role}[1]" for role in ("generator", "fake_score")} <= set(summary["utilisation"])
    # DMD's loss is the gap between two networks that have hardly parted: small, and so less exact.
    require_same_run(two, mixing, 2, losses=1e-3)


def test_samples_that_do_not_divide_are_shared_by_any_ranks(make_recipe: MakeRecipe) -> None:
    """Seven samples in three micro-batches over two and three ranks: some have one more, some none.

    The last micro-batch has two samples: a rank of the fake score and of the teacher stands in.
    """
    uneven = "batch={size: 7, micro_batches: 3}"
    settings = [*MODES["sgmd-shared-released"], *BATCH, uneven, "iterations=2"]
    one = make_recipe("name=one", *settings)
    many = make_recipe(
        "name=many",
        *settings,
        "topology.mode=map",
        f"topology.pools={{learn: {{ranks: 2, {POOL}}}, score: {{ranks: 3, {POOL}}}}}",
    )
    distill(one)
    distill(many)
    assert_run_moves(make_recipe, one, 2, settings, OTHER_SAMPLES)
    require_same_run(many, one, 2)
    # Other parts of the same batch, with the draws of the first ones: the same sums.
    parts = [uneven.replace("3}", "6, exit_draws: 3}"), "name=parts"]
    split = make_recipe(*settings, *parts)
    distill(split)
    for ours, theirs in zip(history(split), history(one), strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    for role in LEARNERS:
        weights = [weights_of(config, 2, role) for config in (split, one)]
        assert relative_error(weights[0], weights[1]) < TOLERANCE


def test_uneven_shares_track_afresh_and_mix_their_weights(make_recipe: MakeRecipe) -> None:
    settings = [
        *MODES["dmd2"],
        *BATCH,
        "batch={size: 5, micro_batches: 2}",
        "iterations=2",
        "fake_score.ida_decay=0.5",
    ]
    one = make_recipe("name=one", *settings)
    two = make_recipe(
        "name=two", *settings, "topology.mode=fused", f"topology.fused={{ranks: 3, {POOL}}}"
    )
    distill(one)
    distill(two)
    assert_run_moves(make_recipe, one, 2, settings, OTHER_SAMPLES)
    require_same_run(two, one, 2, losses=1e-3)
