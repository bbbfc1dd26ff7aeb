"""A model is found by its folder, by the hub's cache or by an address; a hub id gets an answer."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config.recipe import load_recipe
from pipelines.config.recipe_files import shipped_recipes
from sgmd_core.errors import ModelFolderError
from tests.helpers.s3_server import serve_s3, use_server
from tests.helpers.tiny_wan import write_tiny_wan
from workers.models.addresses import is_address, local_model
from workers.models.content import fingerprint
from workers.models.families import family_of

HUB_ID = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
DOWNLOAD = f"hf download {HUB_ID} --local-dir models/Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_wan(tmp_path_factory.mktemp("wan"), ["a", "circle"])


def cached(model: Path, cache: Path, name: str) -> Path:
    """A snapshot as the hub's cache lays it out: links to blobs."""
    snapshot = cache / "snapshots" / name
    for number, file in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = cache / "blobs" / f"{name}-{number}"
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.slow
def test_a_folder_of_the_hubs_cache_means_the_snapshot_of_its_main_branch(model, tmp_path):
    cache = tmp_path / "models--Wan-AI--X"
    old = cached(model, cache, "old")
    assert local_model(cache) == old
    new = cached(model, cache, "new")
    with pytest.raises(ModelFolderError, match=r"2 snapshots, and refs/main names none"):
        local_model(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("new")
    assert local_model(cache) == local_model(new) == new
    folder = family_of(new).inspect(local_model(cache))
    assert fingerprint(folder.path) == fingerprint(model)
    assert family_of(new).load_denoiser(folder.path)


@pytest.mark.parametrize(
    "command",
    [
        ("distill", "tiny", f"model.folder={HUB_ID}", "--dry-run"),
        ("plan", "tiny", f"model.folder={HUB_ID}", "--gpus", "2"),
        ("generate", HUB_ID, "--prompt", "a"),
        ("evaluate", HUB_ID),
        ("encode", "src", "dst", "--model", HUB_ID),
        ("check", "src", "--model", HUB_ID),
        ("export", HUB_ID, "--output", "out"),
    ],
)
def test_a_hub_id_is_answered_with_the_line_that_downloads_it(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, command)
    assert said.exit_code
    assert DOWNLOAD in " ".join(said.stderr.split()), said.stderr


def test_a_folder_of_a_recipe_is_answered_with_the_id_of_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = [each.name for each in shipped_recipes() if each.name.startswith(("wan", "ltx"))]
    folders = {load_recipe(name).model.folder for name in own}
    assert len(folders) == 5
    for folder in (*folders, "/models/Wan2.1-T2V-14B-Diffusers"):
        with pytest.raises(ModelFolderError, match="no such folder") as refused:
            family_of(Path(folder))
        owner = "Lightricks" if "LTX" in folder else "Wan-AI"
        line = f"hf download {owner}/{Path(folder).name} --local-dir {folder}   and give {folder}"
        assert line in str(refused.value)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ModelFolderError, match="no such folder") as refused:
        family_of(Path("mine/model"))
    assert "hf download" not in str(refused.value)


@pytest.mark.parametrize(
    "page",
    [
        f"https://huggingface.co/{HUB_ID}",
        f"http://hf.co/{HUB_ID}/",
        f"https://huggingface.co/{HUB_ID}/tree/main/transformer",
    ],
)
def test_a_page_of_the_hub_is_answered_with_the_line_that_downloads_it(page):
    with pytest.raises(ModelFolderError) as refused:
        local_model(page)
    assert DOWNLOAD in str(refused.value)


def test_a_link_into_a_cache_that_was_cleared_is_no_torn_file(model, tmp_path):
    snapshot = cached(model, tmp_path / "models--Wan-AI--X", "main")
    link = snapshot / "transformer" / "diffusion_pytorch_model.safetensors"
    link.resolve().unlink()
    with pytest.raises(ModelFolderError, match=r"a link to .*blobs.* Download the model again"):
        family_of(snapshot).inspect(snapshot)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("checkpoints/step-000002/manifest.json", "a run, and no model.*sgmd export RUN"),
        ("ema/weights.safetensors", "a checkpoint of a run.*sgmd export RUN"),
        ("weights.safetensors", "one role of a checkpoint.*sgmd export RUN"),
        ("pytorch_lora_weights.safetensors", "a LoRA.*sgmd generate BASE --lora"),
        ("mine-bf16.safetensors", "weights in single files.*sgmd import FILE"),
    ],
)
def test_a_folder_of_something_else_is_answered_with_what_makes_a_model_of_it(
    tmp_path, file, words
):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(ModelFolderError, match=words):
        family_of(tmp_path)


def test_a_path_that_is_no_hub_id_is_not_offered_for_download(tmp_path):
    for path in (tmp_path / "nowhere", Path("models/a/b"), Path("nowhere")):
        with pytest.raises(ModelFolderError, match="no such folder") as refused:
            family_of(path)
        assert "hf download" not in str(refused.value)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder behind s3://bucket."""
    root = tmp_path / "s3"
    (root / "bucket").mkdir(parents=True)
    with serve_s3(root) as server:
        use_server(server.environment, monkeypatch)
        yield root / "bucket"


@pytest.mark.slow
def test_an_address_is_copied_once_a_content_and_whole(model, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address = "s3://bucket/model"
    there = bucket / "model"
    shutil.copytree(model, there)
    first = local_model(address)
    assert fingerprint(first) == fingerprint(model)
    made = first.stat().st_mtime_ns
    # Path makes one slash of two.
    assert local_model(Path(address)) == first
    assert first.stat().st_mtime_ns == made
    file = there / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    second = local_model(address)
    assert second != first
    assert fingerprint(second) != fingerprint(first)
    with pytest.raises(ModelFolderError, match="nothing there"):
        local_model(f"{address}-nowhere")


def test_a_file_address_is_a_path_and_a_store_without_tags_is_refused(model, monkeypatch):
    assert local_model(f"file://{model}") == model
    assert local_model(f"file:{model}") == model
    assert not is_address(f"file://{model}")
    store = fsspec.filesystem("memory")
    store.pipe("/untagged/model_index.json", b"{}")
    facts = {"/untagged/model_index.json": {"size": 2, "name": "/untagged/model_index.json"}}
    monkeypatch.setattr(type(store), "find", lambda self, *args, **options: facts)
    with pytest.raises(ModelFolderError, match="neither tag nor time"):
        local_model("memory://untagged")
