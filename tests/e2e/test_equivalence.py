"""The same run wherever and however it is made: bitwise on a CPU."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.config.recipe import DistillConfig
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from tests.e2e.conftest import MakeRecipe

MODES = {
    "sgmd-shared-released": ["fake_score.tracking=shared"],
    "sgmd-shared-paper": ["fake_score.tracking=shared", "objective.form=paper"],
    "sgmd-fresh-released": ["fake_score.tracking=fresh"],
    "sgmd-fresh-paper": ["fake_score.tracking=fresh", "objective.form=paper"],
    "dmd2": [
        "fake_score.tracking=fresh",
        "objective={method: dmd2, fake_updates: 2}",
        "fake_score.ida_decay=0.97",
    ],
    "sid": [
        "fake_score.tracking=fresh",
        "objective={method: sid, fake_updates: 2}",
        "generator.diversity={weight: 0.05, teacher_steps: 3, anchor_step: 1}",
    ],
}


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
    assert {path.parent.name for path in files} == {"generator", "fake_score", "ema"}
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_roles_on_ray_make_the_bits_that_one_process_makes(
    make_recipe: MakeRecipe, ray_cluster: None, mode: str
) -> None:
    settings = MODES[mode]
    local = make_recipe("name=local", *settings)
    pools = make_recipe("name=pools", "topology.mode=pools", *settings)
    distill(local)
    distill(pools)
    assert len(history(local)) == 5
    assert history(pools) == history(local)
    assert state(pools, 5) == state(local, 5)


@pytest.mark.parametrize("mode", ["sgmd-shared-released", "sgmd-fresh-released", "dmd2", "sid"])
def test_a_resumed_run_makes_the_bits_of_one_that_was_never_stopped(
    make_recipe: MakeRecipe, mode: str
) -> None:
    settings = [*MODES[mode], "checkpoint.every=2"]
    whole = make_recipe("name=whole", "iterations=6", *settings)
    distill(whole)
    # Stopped after iteration 3, so the last iteration is lost and made again from step 2.
    distill(make_recipe("name=parts", "iterations=3", *settings))
    parts = make_recipe("name=parts", "iterations=6", *settings)
    drop_checkpoint(parts, 3)
    distill(parts, resume=True)
    assert history(parts) == history(whole)
    assert state(parts, 6) == state(whole, 6)


def drop_checkpoint(config: DistillConfig, iteration: int) -> None:
    """Takes a checkpoint's manifest away, as if the run had died while writing it."""
    manifest = Path(config.run_folder) / "checkpoints" / f"step-{iteration:06d}" / "manifest.json"
    manifest.unlink()


@pytest.mark.parametrize("window", [1, 2, 4])
def test_the_number_of_micro_batches_in_flight_changes_no_bit(
    make_recipe: MakeRecipe, window: int
) -> None:
    settings = ["batch.micro_batches=4", "iterations=2"]
    reference = make_recipe("name=reference", "topology.window=3", *settings)
    other = make_recipe("name=other", f"topology.window={window}", *settings)
    distill(reference)
    distill(other)
    assert state(other, 2) == state(reference, 2)


def test_splitting_the_batch_changes_the_weights_by_rounding_alone(
    make_recipe: MakeRecipe,
) -> None:
    """One generator step, so the one exit step of each micro-batch is the same for both."""
    settings = ["generator.num_steps=1", "iterations=1", "generator.ema_decay=0.0"]
    one = make_recipe("name=one", "batch.micro_batches=1", *settings)
    four = make_recipe("name=four", "batch.micro_batches=4", *settings)
    distill(one)
    distill(four)
    for role in ("generator", "fake_score"):
        first, second = (
            load_file(
                RunFolder(c.run_folder).checkpoints / "step-000001" / role / "optimizer.safetensors"
            )
            for c in (one, four)
        )
        # The optimizer's first moments are the clipped gradients themselves (beta1 is 0). Float32
        # sums in another order: 1e-5 of the largest entry, as for the recorded vectors.
        names = [name for name in first if "exp_avg" in name and "sq" not in name]
        assert names
        for name in names:
            scale = first[name].abs().max()
            torch.testing.assert_close(
                second[name], first[name], rtol=0, atol=1e-5 * max(scale, 1e-3)
            )
