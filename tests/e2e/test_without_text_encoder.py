"""A model folder without a text encoder trains on stored embeddings, to the bit, and says so."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.data.clips.clip_format import ClipFormat
from pipelines.data.encoding.encode import encodings_for
from pipelines.data.encoding.encode_options import EncodeOptions
from pipelines.data.shards.prompts import read_stored_prompts, write_stored_prompts
from pipelines.distillation.audit import audit
from pipelines.distillation.preflight import run_preflight
from pipelines.distillation.run import distill, dry_run
from pipelines.evaluation.run import evaluate
from pipelines.run.folder import RunFolder
from pipelines.run.observer import RunObserver
from sgmd_core.errors import CheckpointError, ConfigError, ModelFolderError
from tests.e2e.conftest import MakeRecipe, encode_captions
from tests.e2e.test_encoded import count_loads, reversed_words
from tests.e2e.test_equivalence import history, moments, state
from tests.helpers import tiny_wan
from tests.helpers.moves import assert_moves
from workers.models.content import fingerprint
from workers.models.families import family_of
from workers.models.wan_configs import LAYOUT

PROMPT = "a red circle moves left"


class Notes(RunObserver):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def bare(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as `hf download --exclude 'text_encoder/*'` leaves it."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    return shutil.copytree(wan_folder, folder, ignore=lambda _, names: {"text_encoder"} & {*names})


@pytest.fixture(scope="module")
def sets(world: Path, wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` and `held_out` with embeddings, and the empty prompt."""
    root = tmp_path_factory.mktemp("sets")
    for name in ("train", "held_out"):
        (root / name).mkdir()
        encode_captions(world / name, wan_folder, root / name, ("",))
    return root


def stored(sets: Path, *overrides: str) -> tuple[str, ...]:
    both = (f"data.train={sets / 'train'}", f"data.validation={sets / 'held_out'}")
    return (*both, "iterations=2", "validation.every=2", *overrides)


@pytest.mark.slow
def test_a_run_makes_the_bits_of_the_whole_folder_and_says_whose_word_it_took(
    make_recipe: MakeRecipe, sets: Path, bare: Path, wan_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    maker = fingerprint(wan_folder, LAYOUT.text)
    whole = make_recipe("name=whole", *stored(sets))
    without = make_recipe("name=without", *stored(sets, f"model.folder={bare}"))
    assert dry_run(whole)["text_encoder_named"] == ""
    assert dry_run(without)["text_encoder_named"] == maker
    loads = count_loads(monkeypatch)
    distill(whole)
    said = Notes()
    distill(without, observer=said)
    assert not loads
    assert any("no text encoder" in note and maker in note for note in said.notes)
    assert history(without) == history(whole)
    assert state(without, 2) == state(whole, 2)
    train = reversed_words(sets / "train", tmp_path / "reversed")
    shutil.copy(sets / "train/_prompts.parquet", train)
    other = make_recipe("name=other", *stored(sets, f"data.train={train}"))
    distill(other)
    assert_moves(moments(whole, 2), moments(other, 2))
    folder = RunFolder(without.run_folder)
    assert audit(folder.root).to_json()["text_encoder_named"] == maker
    assert "text_encoder_named" not in audit(whole.run_folder).to_json()
    told = CliRunner().invoke(app, ["ledger", str(folder.root)])
    assert f"were not verified; they name as their maker {maker}" in " ".join(told.stdout.split())
    # Its generator has no text encoder either, and lacks nothing else.
    assert not (folder.generator / "text_encoder").exists()
    assert not family_of(folder.generator).inspect(folder.generator).has_text_encoder
    for ask in (
        lambda: evaluate(folder.root, output=tmp_path / "evaluation"),
        lambda: evaluate(whole.run_folder, teacher=bare, output=tmp_path / "evaluation"),
        lambda: encodings_for(str(bare), EncodeOptions(ClipFormat(), 6, text_only=True)),
    ):
        with pytest.raises(ModelFolderError, match=r"hf download REPOSITORY --include 'text_enc"):
            ask()
    said_no = CliRunner().invoke(app, ["generate", str(folder.root), "--prompt", PROMPT])
    assert said_no.exit_code == 2
    assert "no weights in" in " ".join(said_no.stderr.split())


@pytest.mark.slow
def test_a_run_goes_on_with_a_folder_that_was_completed_since_and_the_reverse(
    make_recipe: MakeRecipe, sets: Path, bare: Path, wan_folder: Path, tmp_path: Path
) -> None:
    ends = {"whole": wan_folder, "bare": bare}
    straight = make_recipe("name=straight", *stored(sets, "validation.every=0"))
    distill(straight)
    for first, then in (("whole", "bare"), ("bare", "whole")):
        settings = stored(sets, "validation.every=0", "checkpoint.every=1")
        name = f"name={first}"
        distill(make_recipe(name, *settings, f"model.folder={ends[first]}", "iterations=1"))
        again = make_recipe(name, *settings, f"model.folder={ends[then]}")
        distill(again, resume=True)
        assert state(again, 2) == state(straight, 2)
    # Another text encoder is still another model.
    other = tiny_wan.write_tiny_wan(tmp_path / "other", ["a", "red", "circle"], seed=4)
    for part in ("transformer", "vae"):
        shutil.rmtree(other / part)
        shutil.copytree(wan_folder / part, other / part)
    again = make_recipe("name=bare", *settings, f"model.folder={other}", "iterations=3")
    with pytest.raises(CheckpointError, match=r"text_encoder in model\.folder has content"):
        distill(again, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("data.stored_text=false",), "no stored embeddings of training captions"),
        (("model.negative_prompt=blurry",), "of the negative prompt"),
        (("data.prompt_dropout=0.1", "model.negative_prompt=blurry"), "of the negative prompt"),
        (("model.text_length=7",), "of training captions, validation captions"),
        (("data.validation={world}/held_out",), "of validation captions"),
        (("data.train={world}/train",), "no stored embeddings of training captions"),
    ],
)
def test_a_text_without_embedding_is_refused_before_anything_starts(
    make_recipe: MakeRecipe, sets: Path, world: Path, bare: Path, changes, words: str
) -> None:
    given = [change.format(world=world) for change in changes]
    config = make_recipe(*stored(sets, f"model.folder={bare}", *given))
    with pytest.raises(ConfigError, match=f"{words}.*--negative") as refused:
        run_preflight(config)
    assert "which has no text encoder" in str(refused.value)
    run_preflight(make_recipe(*stored(sets, *given)))


@pytest.mark.slow
def test_embeddings_of_several_makers_are_refused_and_prompts_of_another_one_count_for_none(
    make_recipe: MakeRecipe, sets: Path, world: Path, wan_folder: Path, bare: Path, tmp_path: Path
) -> None:
    other = tiny_wan.write_tiny_wan(tmp_path / "other", ["a", "red", "circle"], seed=4)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    encode_captions(world / "held_out", other, foreign)
    also = json.dumps([{"source": str(foreign)}])
    config = make_recipe(*stored(sets, f"model.folder={bare}", f"data.also={also}"))
    with pytest.raises(ConfigError, match=f"{fingerprint(other, LAYOUT.text)} of .*foreign"):
        run_preflight(config)
    mixed = shutil.copytree(sets / "train", tmp_path / "mixed")
    files = LocalFileSystem()
    prompts = read_stored_prompts(files, str(mixed))
    assert prompts is not None
    encoding = replace(prompts.encoding, text_encoder=fingerprint(other, LAYOUT.text))
    write_stored_prompts(files, str(mixed), replace(prompts, encoding=encoding))
    given = (f"model.folder={bare}", f"data.train={mixed}", "validation.every=0")
    with pytest.raises(ConfigError, match=r"made by .* of the negative prompt"):
        run_preflight(make_recipe(*stored(sets, *given)))


@pytest.mark.slow
def test_a_teacher_without_text_encoder_teaches_and_one_with_another_does_not(
    make_recipe: MakeRecipe, sets: Path, wan_folder: Path, bare: Path, tmp_path: Path, caplog
) -> None:
    given = stored(sets, "validation.every=0")
    run_preflight(make_recipe(*given, f"teacher.model={bare}"))
    assert "the teacher's folder has no text encoder" in caplog.text
    run_preflight(make_recipe(*given, f"model.folder={bare}", f"teacher.model={wan_folder}"))
    other = shutil.copytree(wan_folder, tmp_path / "other")
    words = tiny_wan.write_tiny_wan(tmp_path / "words", ["a", "red", "circle"], seed=4)
    shutil.rmtree(other / "text_encoder")
    shutil.copytree(words / "text_encoder", other / "text_encoder")
    config = make_recipe(*given, f"model.folder={bare}", f"teacher.model={other}")
    with pytest.raises(ConfigError, match="text_encoder has other content"):
        run_preflight(config)


@pytest.mark.parametrize("named", [True, False])
def test_an_index_may_say_that_there_is_none_and_pickles_are_no_absence(
    bare: Path, tmp_path: Path, named: bool
) -> None:
    folder = shutil.copytree(bare, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    if named:
        index["text_encoder"] = [None, None]
    else:
        del index["text_encoder"]
    (folder / "model_index.json").write_text(json.dumps(index))
    family = family_of(folder)
    assert not family.inspect(folder).has_text_encoder
    assert family.load_denoiser(folder)
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder/pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelFolderError, match="text_encoder"):
        family.inspect(folder)


@pytest.mark.ray
@pytest.mark.slow
def test_pools_on_ray_load_no_text_encoder_either(
    make_recipe: MakeRecipe, sets: Path, bare: Path, ray_cluster: None
) -> None:
    given = stored(sets, f"model.folder={bare}")
    local, pools = (
        make_recipe(f"name={mode}", *given, f"topology.mode={mode}") for mode in ("local", "pools")
    )
    distill(local)
    distill(pools)
    assert history(pools) == history(local)
    assert state(pools, 2) == state(local, 2)
