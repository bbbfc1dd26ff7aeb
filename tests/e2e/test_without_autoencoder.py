"""A model folder without an autoencoder trains to the bit where nothing is decoded, and says so."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config.recipe import DistillConfig
from pipelines.data.clips.clip_format import ClipFormat
from pipelines.data.encoding.encode import encodings_for
from pipelines.data.encoding.encode_options import EncodeOptions
from pipelines.distillation.preflight import run_preflight
from pipelines.distillation.run import distill, dry_run
from pipelines.doctoring.models import look_at_model
from pipelines.evaluation.run import evaluate
from pipelines.experts import make_experts
from pipelines.run.folder import RunFolder
from pipelines.study.judging import require_measurable
from sgmd_core.errors import CheckpointError, ConfigError, ModelFolderError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.latents import write_encoded
from tests.e2e.test_adversarial import GAN
from tests.e2e.test_equivalence import history, moments, state
from tests.e2e.test_without_text_encoder import PROMPT, Notes
from tests.helpers import tiny_ltx
from tests.helpers.moves import assert_moves
from workers.models.content import fingerprint, model_digests
from workers.models.families import family_of
from workers.models.wan_configs import LAYOUT

NEEDED = r"no weights in .*vae.*hf download REPOSITORY --include 'vae/\*'"


def without_weights(folder: Path, copy: Path) -> Path:
    """A copy without the autoencoder's weights, as `hf download --exclude 'vae/*.safetensors'`."""
    shutil.copytree(folder, copy)
    for file in (copy / "vae").glob("*.safetensors"):
        file.unlink()
    return copy


@pytest.fixture(scope="module")
def bare(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_weights(wan_folder, tmp_path_factory.mktemp("bare") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, wan_folder: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("latents")
    return [write_encoded(folder / str(seed), wan_folder, seed) for seed in range(2)]


@pytest.fixture(scope="module")
def runs(module_recipe: MakeRecipe, bare: Path) -> dict[str, DistillConfig]:
    """Two iterations on captions alone, of a whole folder and of one without autoencoder."""
    given = ("iterations=2", "checkpoint.every=1")
    found = {
        "whole": module_recipe("name=whole", *given),
        "bare": module_recipe("name=bare", *given, f"model.folder={bare}"),
    }
    for config in found.values():
        distill(config)
    return found


@pytest.mark.slow
def test_captions_alone_train_to_the_bits_of_the_whole_folder_and_export_a_folder(
    runs: dict[str, DistillConfig], wan_folder: Path, tmp_path: Path
) -> None:
    whole, bare = runs["whole"], runs["bare"]
    assert history(bare) == history(whole)
    assert state(bare, 2) == state(whole, 2)
    assert_moves(moments(whole, 1), moments(whole, 2))
    folder = RunFolder(bare.run_folder)
    assert "vae" not in json.loads(folder.identity.read_text())["model"]
    assert [path.name for path in (folder.generator / "vae").iterdir()] == ["config.json"]
    generator = family_of(folder.generator).inspect(folder.generator)
    assert not generator.has_autoencoder
    left_out = [
        json.loads(RunFolder(run.run_folder).summary.read_text())["left_out"]
        for run in (bare, whole)
    ]
    assert left_out == [["vae"], []]
    assert generator.geometry == family_of(wan_folder).inspect(wan_folder).geometry
    # The one folder that is missing makes it whole.
    completed = shutil.copytree(folder.generator, tmp_path / "completed")
    shutil.copytree(wan_folder / "vae", completed / "vae", dirs_exist_ok=True)
    theirs = model_digests(RunFolder(whole.run_folder).generator)
    assert model_digests(completed) == theirs


@pytest.mark.slow
def test_whatever_decodes_or_encodes_says_which_download_completes_the_folder(
    runs: dict[str, DistillConfig], make_recipe: MakeRecipe, bare: Path, tmp_path: Path
) -> None:
    run, whole = RunFolder(runs["bare"].run_folder).root, runs["whole"].run_folder
    options = EncodeOptions(ClipFormat(9, 16, 16, 8), 6)
    for ask in (
        lambda: run_preflight(make_recipe(f"model.folder={bare}", "validation.every=1")),
        lambda: evaluate(run, output=tmp_path / "evaluation"),
        lambda: evaluate(whole, teacher=bare, output=tmp_path / "evaluation"),
        lambda: encodings_for(str(bare), options),
        lambda: require_measurable(make_recipe(f"model.folder={bare}")),
    ):
        with pytest.raises(ModelFolderError, match=NEEDED):
            ask()
    lora = tmp_path / "lora.safetensors"
    for given in ([], ["--checkpoint", "1"], ["--lora", str(lora)]):
        said = CliRunner().invoke(app, ["generate", str(run), "--prompt", PROMPT, *given])
        assert said.exit_code == 2
        # Not in a folder that would be made for the sampling, nor after a LoRA was opened.
        place = bare if "--checkpoint" in given else run / "generator"
        assert f"noweightsin{place}/vae" in "".join(said.stderr.split())
    # Captions are embedded without one, and experts are made of what is there.
    assert encodings_for(str(bare), EncodeOptions(ClipFormat(), 6, text_only=True))
    experts = make_experts(bare, tmp_path / "experts", 0.5)
    assert not family_of(experts).inspect(experts).has_autoencoder
    assert "without weights: vae" in look_at_model(str(bare)).found


@pytest.mark.parametrize(("first", "then"), [("whole", "bare"), ("bare", "whole")])
@pytest.mark.slow
def test_a_run_on_latents_goes_on_with_a_folder_that_lost_or_found_its_autoencoder(
    first: str, then: str, make_recipe: MakeRecipe, data: list[Path], wan_folder: Path, bare: Path
) -> None:
    folders = {"whole": wan_folder, "bare": bare}
    given = (*GAN, f"data.train={data[0]}", "iterations=2", "checkpoint.every=1")
    straight = make_recipe("name=straight", *given)
    distill(straight)
    distill(make_recipe("name=parts", *given, f"model.folder={folders[first]}", "iterations=1"))
    parts, said = make_recipe("name=parts", *given, f"model.folder={folders[then]}"), Notes()
    maker = fingerprint(wan_folder, [LAYOUT.autoencoder])
    assert dry_run(parts, resume=True)["autoencoder_named"] == (maker if then == "bare" else "")
    distill(parts, resume=True, observer=said)
    assert state(parts, 2) == state(straight, 2)
    assert (maker in " ".join(said.notes)) == (then == "bare")


@pytest.mark.slow
def test_latents_of_several_makers_and_a_resume_on_those_of_another_one_are_refused(
    make_recipe: MakeRecipe, data: list[Path], wan_folder: Path, bare: Path, tmp_path: Path
) -> None:
    foreign = write_encoded(tmp_path / "foreign", wan_folder, 1, vae="0123456789abcdef")
    given = (*GAN, f"model.folder={bare}", "iterations=1", f"data.train={data[0]}")
    also = json.dumps([{"source": str(foreign)}])
    with pytest.raises(ConfigError, match=r"0123456789abcdef of .*foreign.*one autoencoder"):
        run_preflight(make_recipe(*given, f"data.also={also}"))
    nameless = write_encoded(tmp_path / "nameless", wan_folder, 1, vae="")
    with pytest.raises(ConfigError, match=r"do not name what made them, in .*nameless"):
        run_preflight(make_recipe(*given, f"data.train={nameless}"))
    whole = make_recipe(*given, f"model.folder={wan_folder}", f"data.train={foreign}")
    with pytest.raises(ConfigError, match="latents of another autoencoder"):
        run_preflight(whole)
    config = make_recipe("name=named", *given)
    distill(config)
    told = CliRunner().invoke(app, ["ledger", str(config.run_folder)])
    maker = fingerprint(wan_folder, [LAYOUT.autoencoder])
    words = " ".join(told.stdout.split())
    assert f"latents were not verified; they name as their maker {maker}" in words
    again = make_recipe("name=named", *given, f"data.train={foreign}", "iterations=2")
    with pytest.raises(CheckpointError, match=r"the vae in model\.folder has content"):
        distill(again, resume=True)


@pytest.mark.slow
def test_a_teacher_without_autoencoder_teaches_and_one_with_another_does_not(
    make_recipe: MakeRecipe,
    data: list[Path],
    wan_folder: Path,
    bare: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_preflight(make_recipe(f"teacher.model={bare}"))
    assert "the teacher's folder has no autoencoder" in caplog.text
    run_preflight(make_recipe(f"model.folder={bare}", f"teacher.model={wan_folder}"))
    assert "the generator's folder has no autoencoder" in caplog.text
    # Latents that the generator takes on their word tell which autoencoder is its own.
    named = (*GAN, f"data.train={data[0]}", f"model.folder={bare}")
    run_preflight(make_recipe(*named, f"teacher.model={wan_folder}"))
    other = shutil.copytree(wan_folder, tmp_path / "other")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(weights).items()}, weights)
    for given in ((f"model.folder={wan_folder}",), named):
        with pytest.raises(ConfigError, match="vae has other content in the teacher's"):
            run_preflight(make_recipe(*given, f"teacher.model={other}"))


@pytest.mark.slow
def test_ltx_trains_without_one_and_a_folder_without_its_configuration_is_sized_as_released(
    make_recipe: MakeRecipe, bare: Path, tmp_path: Path
) -> None:
    words = ["a", "red", "circle", "moves", "left"]
    whole = tiny_ltx.write_tiny_ltx(tmp_path / "ltx", words)
    folder = without_weights(whole, tmp_path / "bare")
    clip = ("video.num_frames=9", "video.height=32", "video.width=64")
    straight = make_recipe("name=whole", *clip, "iterations=1", f"model.folder={whole}")
    config = make_recipe("name=bare", *clip, "iterations=1", f"model.folder={folder}")
    distill(straight)
    distill(config)
    assert state(config, 1) == state(straight, 1)
    generator = RunFolder(config.run_folder).generator
    assert not family_of(generator).inspect(generator).has_autoencoder
    # An export without the other components keeps the configuration, by which positions are made.
    family = family_of(whole)
    weights = dict(family.load_denoiser(whole).named_parameters())
    family.export(tmp_path / "alone", whole, weights, flow_shift=None, components="none")
    assert [path.name for path in (tmp_path / "alone/vae").iterdir()] == ["config.json"]
    assert family.load_denoiser(tmp_path / "alone")
    for model in (folder, shutil.copytree(bare, tmp_path / "wan")):
        shutil.rmtree(model / "vae")
        # The channels of these are those of no released model.
        with pytest.raises(ModelFolderError, match=r"no vae/config\.json.*hf download REPOSITORY"):
            family_of(model).inspect(model)
