"""The same run wherever and however it is made: bitwise on a CPU."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from sgmd_core.errors import CheckpointError, ConfigError
from tests.e2e.conftest import MakeRecipe
from tests.helpers.moves import assert_moves, relative_error

LAG = [
    "lag={every: 1, updates: 1, batches: 1, rates: [1.0], slow_above: 1.0e-9, slowest: 0.5}",
]
"""Measures the lag before every iteration, and slows the generator from the second one on."""

MODES = {
    "sgmd-shared-released": ["fake_score.tracking=shared", *LAG],
    "sgmd-fresh-released": ["fake_score.tracking=fresh"],
    "sgmd-fresh-paper": ["fake_score.tracking=fresh", "objective.form=paper"],
    "dmd2": [
        "fake_score.tracking=fresh",
        "objective={method: dmd2, fake_updates: 2}",
        "fake_score.ida_decay=0.97",
    ],
    "cdm": [
        "fake_score.tracking=fresh",
        "objective.method=cdm",
        "generator.random_steps={min_steps: 1, max_steps: 5}",
    ],
    "pdmd": ["fake_score.tracking=fresh", "objective.method=pdmd"],
    "sid": [
        "fake_score.tracking=fresh",
        "objective={method: sid, fake_updates: 2}",
        "generator.diversity={weight: 0.05, teacher_steps: 3, anchor_step: 1}",
    ],
    "adm": [
        "objective={method: adm, adversary: {r1_weight: 20.0}}",
        "discriminator={layers: [1, 2], width: 8, num_strides: 1, optimizer: {lr: 1.0e-2}}",
    ],
}


def slow_but(first: str, *others: str) -> list[object]:
    """Parameters of which the quick tests take the first one alone."""
    return [first, *(pytest.param(other, marks=pytest.mark.slow) for other in others)]


def history(config: DistillConfig) -> list[dict[str, object]]:
    """What a run logged, without what depends on the clock."""
    lines = read_jsonl(RunFolder(config.run_folder).metrics)
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "data_wait_s")} for line in lines
    ]


def state(config: DistillConfig, iteration: int) -> dict[str, bytes]:
    """Every file of a checkpoint but its manifest, byte by byte."""
    folder = RunFolder(config.run_folder).checkpoints / f"step-{iteration:06d}"
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    roles = {*config.roles} - {"teacher"}
    assert {path.parent.name for path in files} == {*roles, "ema"}
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


WHOLE = ["iterations=4", "checkpoint.every=2"]

Reference = Callable[[str], DistillConfig]


def runs_in_one_process(module_recipe: MakeRecipe, settings: list[str], *saved: int) -> Reference:
    """Runs in one process, made once a mode; the last saved iteration moves what is compared."""

    @cache
    def run(mode: str) -> DistillConfig:
        config = module_recipe(f"name={mode}", *settings, *MODES[mode])
        distill(config)
        before, last = saved
        assert len(history(config)) == last
        assert_moves(moments(config, last), moments(config, before))
        return config

    return run


@pytest.fixture(scope="module")
def reference(module_recipe: MakeRecipe) -> Reference:
    return runs_in_one_process(module_recipe, WHOLE, 2, 4)


@pytest.mark.ray
@pytest.mark.slow
# Each way of tracking and each form once: what travels between roles depends on one at a time.
# DMD2 and SiD are in `test_maps`.
@pytest.mark.parametrize("mode", ["sgmd-shared-released", "sgmd-fresh-paper", "cdm", "adm"])
def test_roles_on_ray_make_the_bits_that_one_process_makes(
    make_recipe: MakeRecipe, reference: Reference, ray_cluster: None, mode: str
) -> None:
    pools = make_recipe("name=pools", "topology.mode=pools", *WHOLE, *MODES[mode])
    distill(pools)
    assert history(pools) == history(reference(mode))
    assert state(pools, 4) == state(reference(mode), 4)


@pytest.mark.ray
@pytest.mark.slow
def test_fused_roles_make_the_bits_of_one_process(
    make_recipe: MakeRecipe, reference: Reference, ray_cluster: None
) -> None:
    # SGMD is in `test_maps`.
    local = reference("sid")
    fused = make_recipe("name=fused", "topology.mode=fused", *WHOLE, *MODES["sid"])
    distill(fused)
    assert history(fused) == history(local)
    assert state(fused, 4) == state(local, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", slow_but("sgmd-shared-released", "sgmd-fresh-released", "dmd2", "sid", "adm")
)
def test_a_resumed_run_makes_the_bits_of_one_that_was_never_stopped(
    make_recipe: MakeRecipe, reference: Reference, mode: str
) -> None:
    settings = [*WHOLE, *MODES[mode]]
    # Stopped after iteration 3, so the last iteration is lost and made again from step 2.
    distill(make_recipe("name=parts", *settings, "iterations=3"))
    parts = make_recipe("name=parts", *settings)
    drop_checkpoint(parts, 3)
    distill(parts, resume=True)
    assert history(parts) == history(reference(mode))
    assert state(parts, 4) == state(reference(mode), 4)


def drop_checkpoint(config: DistillConfig, iteration: int) -> None:
    """Takes a checkpoint's manifest away, as if the run had died while writing it."""
    manifest = Path(config.run_folder) / "checkpoints" / f"step-{iteration:06d}" / "manifest.json"
    manifest.unlink()


@pytest.mark.slow
def test_the_number_of_micro_batches_in_flight_changes_no_bit(make_recipe: MakeRecipe) -> None:
    settings = ["batch.micro_batches=4", "iterations=2"]
    reference = make_recipe("name=reference", "topology.depth=3", *settings)
    distill(reference)
    # The same samples in other micro-batches, and so with other exit steps.
    split = make_recipe("name=split", *settings, "batch.micro_batches=2")
    distill(split)
    assert_moves(moments(reference, 2), moments(split, 2))
    for depth in (1, 2, 4):
        other = make_recipe(f"name=depth-{depth}", f"topology.depth={depth}", *settings)
        distill(other)
        assert history(other) == history(reference), depth
        assert state(other, 2) == state(reference, 2), depth


def moments(config: DistillConfig, iteration: int) -> dict[str, Tensor]:
    """Root mean squares of the clipped gradients of all updates by role, up to a factor."""
    folder = RunFolder(config.run_folder).checkpoints / f"step-{iteration:06d}"
    return {
        f"{role}/{name}": value.sqrt()
        for role in ("generator", "fake_score", "discriminator")
        if (folder / role).is_dir()
        for name, value in load_file(folder / role / "optimizer.safetensors").items()
        if name.startswith("exp_avg_sq/")
    }


# Float32 sums in another order: 1e-5 of the largest entry, as for the recorded vectors.
SPLIT_TOLERANCE = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", slow_but("sgmd-shared-released", "dmd2", "sid"))
def test_splitting_the_parts_of_a_batch_keeps_its_exit_steps_and_changes_rounding_alone(
    make_recipe: MakeRecipe, mode: str
) -> None:
    settings = [*MODES[mode], "batch.size=8", "iterations=1"]
    two, four, other = (
        make_recipe(f"name={name}", *settings, *split)
        for name, split in {
            "two": ["batch.micro_batches=2"],
            "four": ["batch.micro_batches=4", "batch.exit_draws=2"],
            "other": ["batch.micro_batches=4"],
        }.items()
    )
    for config in (two, four, other):
        distill(config)
    (told,), (expected,) = history(four), history(two)
    assert told["exit_steps"] == [step for step in expected["exit_steps"] for _ in range(2)]
    # Draws of their own move the gradients by far more than rounding.
    assert_moves(moments(two, 1), moments(other, 1), SPLIT_TOLERANCE)
    assert relative_error(moments(four, 1), moments(two, 1)) < SPLIT_TOLERANCE
    assert told["losses"] == pytest.approx(expected["losses"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("tracking", slow_but("shared", "fresh"))
def test_a_run_resumed_with_its_batch_split_further_keeps_its_exit_steps(
    make_recipe: MakeRecipe, tracking: str
) -> None:
    settings = ["batch.size=8", "checkpoint.every=1", f"fake_score.tracking={tracking}"]
    whole = make_recipe("name=whole", "iterations=2", *settings)
    distill(whole)
    parts = make_recipe("name=parts", "iterations=1", *settings)
    distill(parts)
    # As `--resume` reads it: the run's own config.yaml, and another split.
    split = ["iterations=2", "batch.micro_batches=4"]
    parts = load_recipe(str(RunFolder(parts.run_folder).config), split).in_folder(parts.run_folder)
    distill(parts, resume=True)
    assert_moves(moments(whole, 2), moments(whole, 1), SPLIT_TOLERANCE)
    for ours, theirs in zip(history(parts)[1:], history(whole)[1:], strict=True):
        expected = [step for step in theirs["exit_steps"] for _ in range(2)]
        assert ours["exit_steps"] == expected
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
    assert relative_error(moments(parts, 2), moments(whole, 2)) < SPLIT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("split", [["batch.micro_batches=1"], ["batch.exit_draws=1"]])
def test_a_split_that_cannot_keep_the_exit_steps_is_refused_with_both_numbers(
    make_recipe: MakeRecipe, split: list[str]
) -> None:
    distill(make_recipe("iterations=1"))
    with pytest.raises(CheckpointError) as caught:
        distill(make_recipe("iterations=2", *split), resume=True)
    told = str(caught.value)
    assert split[0].replace("=", " is ").split()[0] in told
    assert "the run draws 2 exit steps a batch" in told


def test_exit_draws_that_a_micro_batch_would_straddle_are_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ConfigError, match=r"batch\.exit_draws 3 does not divide .* 2"):
        make_recipe("batch.exit_draws=3")
