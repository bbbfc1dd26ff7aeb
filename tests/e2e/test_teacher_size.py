"""A teacher of another size: a run with it, what is refused beside it, and what a plan counts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel
from safetensors import safe_open

from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER
from pipelines.distillation.run import distill, dry_run
from pipelines.evaluation.plan import EvaluationOptions, EvaluationPlan, plan_evaluation
from pipelines.planning.memory import fake_score_memory, generator_memory, teacher_memory
from pipelines.planning.stage_work import stage_units
from pipelines.planning.traffic import gathered_bytes
from pipelines.planning.workload import Workload
from pipelines.run.folder import RunFolder, read_jsonl
from sgmd_core.errors import CheckpointError, ConfigError, ModelFolderError
from tests.e2e.conftest import MakeRecipe
from tests.helpers.tiny_wan import LATENT_CHANNELS, TEXT_DIM, with_seeded_weights

WIDTH, LAYERS = 48, 3


def write_wide(base: Path, folder: Path, seed: int = 0) -> Path:
    """A copy of a tiny Wan with a denoiser of three layers and three heads."""
    shutil.copytree(base, folder)
    network = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=WIDTH // 16,
        attention_head_dim=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=64,
        num_layers=LAYERS,
        rope_max_seq_len=16,
    )
    made = with_seeded_weights(network, seed)
    assert isinstance(made, WanTransformer3DModel)
    shutil.rmtree(folder / "transformer")
    made.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="module")
def wide(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(wan_folder, tmp_path_factory.mktemp("teacher") / "wide")


def evaluation_of(config: DistillConfig) -> EvaluationPlan:
    """What `sgmd evaluate RUN` would do."""
    options = EvaluationOptions(num_captions=2)
    return plan_evaluation(
        config.run_folder, teacher="", captions="", output="", cache="", options=options
    )


def width_of(run: RunFolder, role: str) -> int:
    """Width of the network in the latest state of a role."""
    file = max(run.checkpoints.rglob(f"{role}*/**/*.safetensors"))
    with safe_open(file, framework="pt") as weights:
        name = next(name for name in weights.keys() if "patch_embedding.bias" in name)  # noqa: SIM118
        return weights.get_slice(name).get_shape()[0]


@pytest.mark.slow
@pytest.mark.parametrize(("start", "width"), [("teacher", WIDTH), ("generator", 32)])
def test_a_wider_teacher_teaches_and_the_fake_score_starts_from_either(
    make_recipe: MakeRecipe, wide: Path, start: str, width: int
) -> None:
    size = ("iterations=2", "validation.every=2", "video.num_frames=9")
    alone = make_recipe("name=alone", *size)
    config = make_recipe("name=wide", *size, f"teacher.model={wide}", f"fake_score.start={start}")
    assert dry_run(config)["teacher"] == str(wide)
    for each in (alone, config):
        distill(each)
    runs = {each.name: RunFolder(each.run_folder) for each in (alone, config)}
    assert (width_of(runs["wide"], GENERATOR), width_of(runs["wide"], FAKE_SCORE)) == (32, width)
    losses = {name: read_jsonl(run.metrics)[-1]["losses"] for name, run in runs.items()}
    assert losses["wide"] != losses["alone"]
    plan = evaluation_of(config)
    assert plan.teacher.folder == wide


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_teacher(
    make_recipe: MakeRecipe, wan_folder: Path, wide: Path, tmp_path: Path
) -> None:
    wide_copy = shutil.copytree(wide, tmp_path / "copy")
    config = make_recipe("iterations=1", f"teacher.model={wide_copy}")
    distill(config)
    moved = shutil.copytree(wide, tmp_path / "moved")
    distill(config.with_settings({"iterations": 2, "teacher.model": str(moved)}), resume=True)
    other = write_wide(wan_folder, tmp_path / "other", seed=1)
    for teacher in (str(other), None):
        changed = config.with_settings({"iterations": 3, "teacher.model": teacher})
        with pytest.raises(CheckpointError, match=r"the transformer in teacher\.model has content"):
            distill(changed, resume=True)
    shutil.rmtree(wide_copy)
    shutil.copytree(other, wide_copy)
    with pytest.raises(ModelFolderError, match=r"teacher\.model has content"):
        evaluation_of(config)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda folder: edit(
                folder / "scheduler/scheduler_config.json", prediction_type="epsilon"
            ),
            "the generator's model predicts flow_prediction, and the teacher's epsilon",
        ),
        (
            lambda folder: edit(folder / "tokenizer/tokenizer_config.json", model_max_length=3),
            "tokenizer has other content in the teacher's folder",
        ),
        (
            lambda folder: edit(folder / "vae/config.json", latents_mean=[0.5] * LATENT_CHANNELS),
            "vae has other content in the teacher's folder",
        ),
    ],
)
def test_a_teacher_of_other_latents_text_or_schedule_is_refused(
    make_recipe: MakeRecipe,
    wide: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    words: str,
) -> None:
    folder = shutil.copytree(wide, tmp_path / "changed")
    change(folder)
    with pytest.raises(ConfigError, match=words):
        dry_run(make_recipe(f"teacher.model={folder}"))


@pytest.mark.slow
def test_weights_are_not_mixed_into_a_fake_score_of_another_size(
    make_recipe: MakeRecipe, wide: Path
) -> None:
    mixing = (
        f"teacher.model={wide}",
        "objective.method=dmd2",
        "fake_score.tracking=fresh",
        "fake_score.ida_decay=0.9",
    )
    with pytest.raises(ConfigError, match=r"fake_score\.ida_decay 0\.9 mixes .*start=generator"):
        dry_run(make_recipe(*mixing))
    dry_run(make_recipe(*mixing, "fake_score.start=generator"))


def test_a_plan_counts_both_sizes(make_recipe: MakeRecipe, wide: Path) -> None:
    alone, both, teacher = (
        Workload.of(make_recipe(*overrides))
        for overrides in (
            (),
            (f"teacher.model={wide}",),
            (f"teacher.model={wide}", "fake_score.start=generator"),
        )
    )
    ratio = both.shape_of(TEACHER).num_parameters / alone.shape.num_parameters
    assert ratio > 2
    assert teacher_memory(both, 1, 2).state == ratio * teacher_memory(alone, 1, 2).state
    assert fake_score_memory(both, 1, 2, 2).total > fake_score_memory(alone, 1, 2, 2).total
    assert fake_score_memory(teacher, 1, 2, 2) == fake_score_memory(alone, 1, 2, 2)
    assert generator_memory(both, 1, 2, 2) == generator_memory(alone, 1, 2, 2)
    for name, units in stage_units(both).items():
        assert (units > stage_units(alone)[name]) == (name[0] != GENERATOR)
    assert gathered_bytes(both)[TEACHER, "denoise"] > gathered_bytes(alone)[TEACHER, "denoise"]
