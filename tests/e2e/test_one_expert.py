"""One expert of two is trained alone, and the other one comes out as it went in."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from pipelines.config.recipe import DistillConfig
from pipelines.distillation.run import distill
from pipelines.exporting.export import ExportOptions, export
from pipelines.generate import generate
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.shapes import ClipSplit, captions
from sgmd_core.errors import SgmdError
from tests.e2e.conftest import MakeRecipe
from tests.helpers import tiny_wan

PROMPT = "a red circle moves left"
PARTS = {"high": "transformer", "low": "transformer_2"}
# Of the four steps at shift 3 two are on either side.
BOUNDARY = 0.8
LORA = {"rank": 2, "alpha": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = sorted({word for text in captions(ClipSplit.TRAIN) for word in text.split()})
    root = tmp_path_factory.mktemp("one") / "model"
    return tiny_wan.write_tiny_experts(root, words, boundary=BOUNDARY)


@pytest.fixture(scope="module")
def run_of(module_recipe: MakeRecipe, folder: Path) -> Callable[..., RunFolder]:
    """Runs of two iterations in one process, made once each."""

    def run(expert: str, **settings: object) -> RunFolder:
        name = "-".join([expert, *("lora" for key in settings if key == "lora")])
        config = module_recipe(
            f"name={name}",
            "iterations=2",
            f"model.folder={folder}",
            f"model.expert={expert}",
            f"model.boundary={BOUNDARY}",
            "checkpoint={every: 1, keep: 2}",
            "export.dtype=fp32",
            "validation={every: 2, num_captions: 2, teacher_steps: 2}",
        )
        if "lora" in settings:
            config = config.with_settings({"generator.lora": LORA, "fake_score.lora": LORA})
        found = RunFolder(config.run_folder)
        if not found.generator.exists():
            distill(config)
        return found

    return run


def weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def moved(folder: Path, base: Path, part: str) -> set[str]:
    before = weights(base, part)
    after = weights(folder, part)
    assert after.keys() == before.keys()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, {"lora": True}], ids=["full", "lora"])
@pytest.mark.parametrize("expert", PARTS)
def test_its_export_has_the_other_expert_byte_for_byte_and_the_pipeline_samples_it(
    expert: str, lora: dict, folder: Path, run_of: Callable[..., RunFolder], tmp_path: Path
) -> None:
    run = run_of(expert, **lora)
    other = PARTS["low" if expert == "high" else "high"]
    assert moved(run.generator, folder, PARTS[expert])
    file = f"{other}/diffusion_pytorch_model.safetensors"
    assert (run.generator / file).read_bytes() == (folder / file).read_bytes()

    for step in (1, 2):
        state = run.checkpoints / f"step-{step:06d}"
        for role in ("generator", "fake_score", "ema"):
            names = load_file(state / role / "weights.safetensors")
            assert names
            assert all(name.startswith(f"{expert}.") for name in names), role

    pipeline = WanPipeline.from_pretrained(run.generator)
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        PROMPT,
        num_frames=tiny_wan.NUM_FRAMES,
        height=tiny_wan.HEIGHT,
        width=tiny_wan.WIDTH,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=tiny_wan.TEXT_LENGTH,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames[0]
    (ours,) = generate(run.root, [PROMPT], output=tmp_path, seed=[3], formats=["gif"])
    assert np.abs(ours.frames - np.round(255 * video).astype(int)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("form", ["diffusers", "single-file", "lora"])
def test_a_checkpoint_of_it_is_exported_in_every_form(
    form: str, folder: Path, run_of: Callable[..., RunFolder], tmp_path: Path
) -> None:
    run = run_of("low")
    made = export(
        run.root,
        checkpoint="1",
        output=tmp_path / form,
        options=ExportOptions(form=form, dtype="fp32", rank=2 if form == "lora" else None),
    )
    assert "low-noise expert" in (made.folder / "README.md").read_text()
    if form == "lora":
        # Of the trained expert alone, and the card's line puts it there.
        assert [path.name for path in made.folder.glob("*.safetensors")] == [
            "pytorch_lora_weights-low_noise.safetensors"
        ]
        card = (made.folder / "README.md").read_text()
        assert "load_into_transformer_2=True" in card
        assert card.count("load_lora_weights") == 1
    if form == "diffusers":
        assert not moved(made.folder, folder, "transformer")
        assert moved(made.folder, folder, "transformer_2")


@pytest.mark.slow
def test_the_second_expert_is_trained_after_the_first_from_its_export(
    folder: Path, run_of: Callable[..., RunFolder], make_recipe: MakeRecipe
) -> None:
    first = run_of("high")
    config = make_recipe(
        "name=second",
        "iterations=1",
        f"model.folder={first.generator}",
        f"teacher.model={folder}",
        "model.expert=low",
        f"model.boundary={BOUNDARY}",
        "export.dtype=fp32",
    )
    distill(config)
    made = RunFolder(config.run_folder).generator
    assert not moved(made, first.generator, "transformer")
    assert moved(made, folder, "transformer")
    assert moved(made, first.generator, "transformer_2")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_ranks_of_a_pool_train_the_low_expert_as_one_process_does(
    run_of: Callable[..., RunFolder], module_recipe: MakeRecipe, folder: Path
) -> None:
    one = run_of("low")
    config = module_recipe(
        "name=low-pools",
        "iterations=2",
        f"model.folder={folder}",
        "model.expert=low",
        f"model.boundary={BOUNDARY}",
        "export.dtype=fp32",
        "topology.mode=pools",
        "topology.generator.ranks=2",
        "validation.every=0",
    )
    distill(config)
    found = RunFolder(config.run_folder)
    assert not moved(found.generator, folder, "transformer")
    for name, value in weights(found.generator, "transformer_2").items():
        expected = weights(one.generator, "transformer_2")[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=2e-5)
    # Both updates moved the weights by far more.
    assert (
        max(
            (value - weights(folder, "transformer_2")[name]).abs().max()
            for name, value in weights(one.generator, "transformer_2").items()
        )
        > 1e-3
    )
    rows = [row["losses"] for row in read_jsonl(found.metrics)]
    assert len(rows) == 2


def refusal(config: Callable[[], DistillConfig]) -> str:
    with pytest.raises(SgmdError) as caught:
        distill(config())
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.boundary=0.7"], "Set model.boundary=0.8"),
        (["model.boundary=0.3"], "none of them below model.boundary 0.3"),
        (["schedule.score_level_min=900"], "Widen schedule.score_level_min"),
        (["schedule.score_window=below"], "set schedule.score_window=none"),
        (["objective={method: phased_dmd}", "fake_score.tracking=fresh"], "phases of its own"),
        (["objective={method: rcm}", "schedule.renoise=true"], "learns from latents"),
        (["generator.diversity.weight=0.1"], "set generator.diversity.weight=0"),
        (["model.expert=middle"], "both"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_a_network_is_read(
    settings: list[str], words: str, folder: Path, make_recipe: MakeRecipe
) -> None:
    given = ["model.expert=low", f"model.boundary={BOUNDARY}", *settings]
    assert words in refusal(lambda: make_recipe(f"model.folder={folder}", *given))


def test_a_model_of_one_denoiser_has_no_expert_to_train(make_recipe: MakeRecipe) -> None:
    words = refusal(lambda: make_recipe("model.expert=high", f"model.boundary={BOUNDARY}"))
    assert "one denoiser" in words
    assert "Set model.expert=both" in words
