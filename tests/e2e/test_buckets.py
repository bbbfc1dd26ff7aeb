"""Runs over several sizes of clips: one size to an iteration, the same bits everywhere."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.run import distill, dry_run
from pipelines.run.folder import RunFolder
from sgmd_core.errors import CheckpointError, ConfigError, ShapeError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.test_equivalence import MODES, history, moments, state
from tests.helpers.moves import assert_moves

OWN = "{num_frames: 9, height: 16, width: 16}"
SIZES = (
    f"video.buckets=[{OWN}, {{num_frames: 5, height: 16, width: 32, weight: 1.5}}, "
    "{num_frames: 9, height: 32, width: 16, weight: 0.5}]"
)
NAMES = ("num-frames", "height", "width")
SEED = "seed=19"
"""Draws the third, the second, the first, the second and the third size."""


def labels(config: DistillConfig) -> list[object]:
    return [line["bucket"] for line in history(config)]


def without_sizes(config: DistillConfig) -> list[dict[str, object]]:
    return [{key: v for key, v in line.items() if key != "bucket"} for line in history(config)]


@pytest.mark.slow
def test_one_bucket_makes_the_bits_of_a_run_without_any(make_recipe: MakeRecipe) -> None:
    plain, one, mixed = (
        make_recipe(f"name={name}", "iterations=2", SEED, *settings)
        for name, settings in {
            "plain": [],
            "one": [f"video.buckets=[{OWN}]"],
            "mixed": [SIZES],
        }.items()
    )
    for config in (plain, one, mixed):
        distill(config)
    assert_moves(moments(plain, 2), moments(mixed, 2))
    assert without_sizes(one) == history(plain)
    assert labels(one) == ["16x16x9"] * 2
    assert state(one, 2) == state(plain, 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sgmd-shared-released", "sid"])
def test_a_run_resumed_before_every_iteration_makes_the_bits_of_one_never_stopped(
    make_recipe: MakeRecipe, mode: str
) -> None:
    settings = [*MODES[mode], SEED, SIZES]
    whole = make_recipe("name=whole", *settings, "iterations=3")
    distill(whole)
    assert labels(whole) == [whole.bucket_at(iteration).label for iteration in range(3)]
    assert len(set(labels(whole))) == 3
    other = make_recipe("name=other", *MODES[mode], SEED, "iterations=3")
    distill(other)
    assert_moves(moments(whole, 3), moments(other, 3))
    for last in range(1, 4):
        parts = make_recipe("name=parts", *settings, f"iterations={last}")
        distill(parts, resume=last > 1)
    assert history(parts) == history(whole)
    assert state(parts, 3) == state(whole, 3)


@pytest.mark.slow
def test_sizes_may_not_change_when_a_run_is_resumed(make_recipe: MakeRecipe) -> None:
    distill(make_recipe("iterations=1", SEED, SIZES))
    with pytest.raises(CheckpointError, match=r"video\.buckets"):
        distill(make_recipe("iterations=2", SEED), resume=True)


@pytest.mark.ray
@pytest.mark.slow
def test_sizes_that_mix_make_the_bits_of_one_process_in_pools(
    make_recipe: MakeRecipe, ray_cluster: None
) -> None:
    settings = [*MODES["sgmd-fresh-released"], SEED, SIZES, "iterations=3"]
    local = make_recipe("name=local", *settings)
    distill(local)
    one_size = make_recipe("name=one", *settings[:-2], "iterations=3")
    distill(one_size)
    assert_moves(moments(local, 3), moments(one_size, 3))
    assert len(set(labels(local))) == 3
    pools = make_recipe("name=pools", "topology.mode=pools", *settings)
    distill(pools)
    assert history(pools) == history(local)
    assert state(pools, 3) == state(local, 3)


@pytest.mark.slow
def test_heads_on_the_teacher_and_random_steps_learn_at_every_size(make_recipe: MakeRecipe) -> None:
    for mode in ("adm", "cdm"):
        config = make_recipe(f"name={mode}", *MODES[mode], SEED, SIZES, "iterations=3")
        distill(config)
        assert len(set(labels(config))) == 3


@pytest.mark.slow
def test_a_run_says_its_sizes_in_metrics_summary_report_and_model_card(
    make_recipe: MakeRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_recipe(SEED, SIZES, "generator.optimizer.warmup_iterations=10")
    assert dry_run(config)["buckets"] == pytest.approx(
        {"16x16x9": 1 / 3, "16x32x5": 1 / 2, "32x16x9": 1 / 6}
    )
    summary = distill(config)
    assert summary["buckets"] == {"16x32x5": 2, "16x16x9": 1, "32x16x9": 2}
    rates = [line["learning_rates"] for line in history(config)]
    assert rates == [
        {"generator": pytest.approx(1e-4 * n), "fake_score": 1e-3} for n in range(1, 6)
    ]
    run, folder = CliRunner(), RunFolder(config.run_folder)
    for command in (
        ["report", str(folder), "--output", str(tmp_path / "report.html")],
        [
            "export",
            str(folder),
            "--output",
            str(tmp_path / "lora"),
            "--format",
            "lora",
            "--rank",
            "2",
        ],
        ["export", str(folder), "--output", str(tmp_path / "diffusers")],
    ):
        done = run.invoke(app, command)
        assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    for size in summary["buckets"]:
        assert f"<td>{size}</td>" in page
    for name in ("lora", "diffusers"):
        card = (tmp_path / name / "README.md").read_text()
        assert "16x32x5 50 % (2 iterations), 32x16x9 16.7 % (2 iterations)" in card
    generated = ["generate", str(folder.generator), "--prompt", "a red circle moves left"]
    for size, told in (((5, 16, 32), ""), ((9, 32, 32), "9 frames of 32x32 may be worse")):
        options = (f"--{name}={n}" for name, n in zip(NAMES, size, strict=True))
        done = run.invoke(app, [*generated, *options, "--output", str(tmp_path / "clips")])
        assert done.exit_code == 0, done.output
        assert told in caplog.text
        assert told or "may be worse" not in caplog.text
    # Neither replaces the other.
    names = sorted(path.stem for path in (tmp_path / "clips").glob("*.mp4"))
    assert [name.rsplit("-", 1)[1] for name in names] == ["16x32x5", "32x32x9"]
    trained = json.loads((tmp_path / "diffusers" / "sgmd.json").read_text())["trained_sizes"]
    assert trained == [[9, 16, 16], [5, 16, 32], [9, 32, 16]]


@pytest.mark.parametrize(
    ("buckets", "words"),
    [
        ("{num_frames: 6, height: 16, width: 16}", "nearest are 5 or 9 frames, height 16, width"),
        ("{num_frames: 9, height: 20, width: 3}", "height 16 or 32, width 16"),
        ("{num_frames: 9, height: 24, width: 16}", r"multiples of 16 \(WanPipeline's rule"),
    ],
)
def test_a_size_that_does_not_divide_is_named_with_the_nearest_ones(
    make_recipe: MakeRecipe, buckets: str, words: str
) -> None:
    config = make_recipe(f"video.buckets=[{OWN}, {buckets}]")
    with pytest.raises(ShapeError, match=words) as caught:
        dry_run(config)
    assert "video.buckets[1]" in str(caught.value)


@pytest.mark.parametrize(
    ("buckets", "words"),
    [
        ("[{num_frames: 9, height: 16, width: 24}]", "16x16x9 among them"),
        (f"[{OWN}, {OWN}]", "16x16x9 twice"),
        ("[{num_frames: 9, height: 16, width: 16, weight: 0}]", "weight is 0.0, expected above 0"),
        ("[{num_frames: 9, height: 16, width: 16, weight: .nan}]", "finite"),
        ("[{num_frames: 0, height: 16, width: 16}]", "num_frames is 0, expected at least 1"),
        ("[{frames: 9, height: 16, width: 16}]", "num_frames is missing"),
        (
            f"[{', '.join(f'{{num_frames: {n}, height: 16, width: 16}}' for n in range(1, 67))}]",
            "at most 64",
        ),
    ],
)
def test_a_wrong_list_of_sizes_is_refused_with_its_place(
    make_recipe: MakeRecipe, buckets: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        make_recipe(f"video.buckets={buckets}")
    assert "video.buckets" in str(caught.value)


def test_tokens_of_every_size_must_divide_among_ranks_that_work_together(
    make_recipe: MakeRecipe,
) -> None:
    config = make_recipe(
        f"video.buckets=[{OWN}, {{num_frames: 5, height: 32, width: 16}}]",
        "batch={size: 4, micro_batches: 1}",
        "topology={mode: pools, generator: {ranks: 2}}",
        "generator.compute.ulysses=2",
    )
    dry_run(config)  # 3 x 2 x 2 tokens, and 2 x 4 x 2
    odd = config.with_settings(
        {
            "video.buckets": [
                {"num_frames": 9, "height": 16, "width": 16},
                {"num_frames": 1, "height": 24, "width": 24},
            ]
        }
    )
    with pytest.raises(ConfigError, match=r"9 tokens \(latents of 1x6x6\)"):
        dry_run(odd)
