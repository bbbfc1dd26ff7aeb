"""Sharded, copied and fused roles make the run of one process: bitwise, or to 1e-5.

A sum over the samples of two ranks rounds differently from one sum, and so do the matrix products
of a smaller batch: there weights may differ by 1e-5 of the largest entry, and losses by 1e-4. Adam
as recipes have it moves entries whose gradient is nothing but rounding by up to its rate; here its
`eps` is large, so that updates are proportional to gradients and can be large themselves: a test
first shows that what it tests moves the weights by ten times what it allows.
"""

import time
from pathlib import Path

import pytest
import ray
from torch import Tensor

from cluster.errors import InsufficientResourcesError
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.audit import audit
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from sgmd_core.errors import NonFiniteError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.test_equivalence import history, moments, state
from tests.e2e.test_trace import require_whole_trace
from tests.helpers.moves import assert_moves, relative_error
from workers.role_state import load_role

TOLERANCE = 1e-5
LEARNERS = ("generator", "fake_score", "ema")
POOL = "cpus: 0.2"
OTHER_SAMPLES = "seed=1"
BATCH = [
    "batch={size: 12, micro_batches: 2}",
    *(
        f"{role}.optimizer={{lr: 0.1, eps: 1.0, weight_decay: 0.0}}"
        for role in ("generator", "fake_score")
    ),
    "topology.text.cpus=0.1",
    "topology.feed.cpus=0.1",
]

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def teams(generator: int, teacher: tuple[int, int], fake_score: int) -> list[str]:
    replicas, ranks = teacher
    return [
        "topology.mode=pools",
        f"topology.generator={{ranks: {generator}, {POOL}}}",
        f"topology.teacher={{replicas: {replicas}, ranks: {ranks}, {POOL}}}",
        f"topology.fake_score={{ranks: {fake_score}, {POOL}}}",
    ]


def require_same_run(
    found: DistillConfig,
    expected: DistillConfig,
    iteration: int,
    losses: float = 1e-4,
) -> None:
    """Losses, exit steps and weights of a run agree with those of another one."""
    runs = [read_jsonl(RunFolder(config.run_folder).metrics) for config in (found, expected)]
    assert len(runs[0]) == len(runs[1]) == iteration
    for ours, theirs in zip(*runs, strict=True):
        assert ours["exit_steps"] == theirs["exit_steps"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=losses)
        assert ours["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=losses)
    for role in LEARNERS:
        weights = [weights_of(config, iteration, role) for config in (found, expected)]
        assert relative_error(weights[0], weights[1]) < TOLERANCE


def weights_of(config: DistillConfig, iteration: int, role: str) -> dict[str, Tensor]:
    folder = RunFolder(config.run_folder).checkpoints / f"step-{iteration:06d}"
    return dict(load_role(str(folder), role).weights)


def assert_run_moves(
    make_recipe: MakeRecipe,
    expected: DistillConfig,
    iteration: int,
    settings: list[str],
    *without: str,
    roles: tuple[str, ...] = LEARNERS,
) -> None:
    """Other settings make other weights, by far more than `require_same_run` allows."""
    other = make_recipe(
        f"name=without-{len(list(Path(expected.output).iterdir()))}", *settings, *without
    )
    distill(other)
    for role in roles:
        found = [weights_of(config, iteration, role) for config in (expected, other)]
        assert_moves(found[0], found[1], TOLERANCE)


def test_fused_ranks_share_the_samples(make_recipe: MakeRecipe) -> None:
    settings = [*BATCH, "iterations=2", "validation.every=2", "topology.validator.cpus=0.1"]
    one = make_recipe("name=one", *settings)
    two = make_recipe(
        "name=two", *settings, "topology.mode=fused", f"topology.fused={{ranks: 2, {POOL}}}"
    )
    distill(one)
    summary = distill(two)
    assert_run_moves(make_recipe, one, 2, settings, OTHER_SAMPLES)
    require_same_run(two, one, 2)
    # The averaged weights are gathered from both for validation and export.
    assert summary["validation"]
    assert set(summary["utilisation"]) == {
        f"{role}[{rank}]" for role in ("generator", "fake_score", "teacher") for rank in range(2)
    }


def test_two_ranks_work_on_each_sample_together(make_recipe: MakeRecipe) -> None:
    """One sample in a micro-batch: a rank has half of its tokens, and half of the heads."""
    settings = [*BATCH, "batch={size: 2, micro_batches: 2}", "iterations=2"]
    one = make_recipe("name=one", *settings)
    two = make_recipe(
        "name=two",
        *settings,
        "topology.mode=fused",
        f"topology.fused={{ranks: 2, {POOL}}}",
        *(f"{role}.compute.ulysses=2" for role in ("generator", "fake_score", "teacher")),
    )
    distill(one)
    distill(two)
    assert_run_moves(make_recipe, one, 2, settings, OTHER_SAMPLES)
    require_same_run(two, one, 2)


def test_a_staleness_of_one_is_told_and_changes_no_bit(make_recipe: MakeRecipe) -> None:
    settings = ["iterations=5", "checkpoint.every=3"]
    local = make_recipe("name=local", *settings)
    stale = make_recipe(
        "name=stale", "topology.mode=pools", "topology.max_staleness_iterations=1", *settings
    )
    distill(local)
    summary = distill(stale)
    # Rollouts with the weights of before an update would give other gradients.
    unmoved = make_recipe("name=unmoved", *settings, "generator.optimizer.lr=1.0e-9")
    distill(unmoved)
    assert_moves(moments(local, 5), moments(unmoved, 5))
    lines = history(stale)
    told = [line.pop("stale_calls") for line in lines]
    # Both micro-batches of the window roll out and are denoised ahead; not past a checkpoint.
    assert told == [0, 4, 4, 0, 4]
    assert (summary["max_staleness_iterations"], summary["stale_calls"]) == (1, 12)
    expected = history(local)
    assert {line.pop("stale_calls") for line in expected} == {0}
    assert lines == expected
    assert state(stale, 5) == state(local, 5)
    # Times of several processes are on one clock, also where iterations overlap.
    require_whole_trace(stale, summary, list(range(5)))


def test_pools_of_any_size_go_on_from_one_another(make_recipe: MakeRecipe) -> None:
    """Two generators, three teachers, one fake score; then one, two that share, and two."""
    one = make_recipe("name=one", "iterations=4", *BATCH)
    distill(one)
    distill(make_recipe("name=many", "iterations=2", *BATCH, *teams(2, (3, 1), 1)))
    many = make_recipe("name=many", "iterations=4", *BATCH, *teams(1, (1, 2), 2))
    distill(many, resume=True)
    settings = ["iterations=4", *BATCH]
    assert_run_moves(make_recipe, one, 4, settings, OTHER_SAMPLES)
    require_same_run(many, one, 4)
    # Four iterations are one epoch: other ranks after the resumption lose and repeat nothing.
    assert audit(many.run_folder).is_clean
    assert read_jsonl(RunFolder(many.run_folder).metrics)[-1]["samples_seen"] == 48


def free_cpus(expected: float = 0.0) -> float:
    """CPUs that nobody has reserved, once they are as many as expected, or after a while."""
    end_s = time.monotonic() + 30
    while (found := ray.available_resources().get("CPU", 0.0)) < expected:
        if time.monotonic() > end_s:
            break
        time.sleep(0.1)
    return found


def test_a_run_that_fails_gives_its_pools_back(make_recipe: MakeRecipe) -> None:
    before = free_cpus()
    failing = make_recipe("topology.mode=fused", "generator.optimizer.lr=1e30", "iterations=40")
    with pytest.raises(NonFiniteError):
        distill(failing)
    assert free_cpus(before) >= before


def test_pools_that_do_not_fit_are_told_rank_by_rank(make_recipe: MakeRecipe) -> None:
    large = make_recipe(
        "batch={size: 12, micro_batches: 2}",
        "topology.mode=pools",
        "topology.teacher={replicas: 3, cpus: 2}",
        "topology.start_timeout_s=1",
    )
    before = free_cpus()
    with pytest.raises(InsufficientResourcesError) as caught:
        distill(large)
    told = " ".join(str(caught.value).split())
    assert "of 4 CPU" in told
    assert "teacher[0] asks for 2 CPU fits on" in told
    assert "teacher[2] asks for 2 CPU lacks" in told
    assert free_cpus(before) >= before
