"""Another model, other data or settings are refused; the same ones at another path are not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file, save_file

from cluster.checkpoints import Checkpoints
from pipelines.config.model_folders import PROJECT_ROOT
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.data.shards.prompts import (
    PROMPTS_NAME,
    read_stored_prompts,
    write_stored_prompts,
)
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.distillation.audit import audit
from pipelines.distillation.position import Position, begin, resume_position
from pipelines.distillation.preflight import run_preflight
from pipelines.run.data_log import DataLog
from pipelines.run.folder import RunFolder
from sgmd_core.errors import CheckpointError, DataError
from tests.e2e.conftest import encode_captions
from tests.helpers.s3_server import serve_s3, use_server
from tests.helpers.tiny_wan import TEXT_LENGTH
from workers.models.content import model_digests


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(PROJECT_ROOT / "assets" / "tiny-wan", tmp_path / "model")


def write_rows(path: Path, caption: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"sample_id": [f"{path.stem}-{row}" for row in range(4)], "caption": [caption] * 4}
    pq.write_table(pa.table(rows), path, row_group_size=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("train/a", "train/b", "train/c", "held_out/a"):
        write_rows(tmp_path / "data" / f"{name}.parquet", "a red circle moves left")
    return tmp_path / "data"


def recipe(model: Path, data: Path, *overrides: str) -> DistillConfig:
    paths = [f"data.train={data / 'train'}", f"data.validation={data / 'held_out'}"]
    small = ["validation.num_captions=4", "data.shuffle.row_groups=4"]
    return load_recipe("tiny", [f"model.folder={model}", *paths, *small, *overrides])


@pytest.fixture
def run(tmp_path: Path, model: Path, data: Path) -> RunFolder:
    folder, config = RunFolder(tmp_path / "run"), recipe(model, data)
    checked = run_preflight(config)
    begin(config, checked, folder)
    with Feed(StreamSettings(checked.source, 0, config.data.shuffle), FeedProgress(), 4) as feed:
        batches, data_log = [feed.take(4)], DataLog(folder)
    data_log.record_arrival(0, batches)
    data_log.record(0, batches)
    return folder


def resumed(run: RunFolder, model: Path, data: Path, *overrides: str) -> Position:
    config = recipe(model, data, *overrides)
    return resume_position(config, run_preflight(config), run, Checkpoints(str(run.checkpoints)))


def refusal(run: RunFolder, model: Path, data: Path, *overrides: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        resumed(run, model, data, *overrides)
    return str(caught.value)


@pytest.mark.slow
def test_the_same_model_and_data_at_other_paths_are_resumed(
    run, model, data, tmp_path, monkeypatch
) -> None:
    moved = model.rename(tmp_path / "moved"), data.rename(tmp_path / "other")
    assert resumed(run, *moved, "iterations=7") == Position()
    monkeypatch.chdir(tmp_path)
    assert resumed(run, Path("moved"), Path("./other")) == Position()


@pytest.mark.slow
def test_the_same_data_on_an_s3_server_are_resumed(run, model, data, tmp_path, monkeypatch) -> None:
    shutil.copytree(data, tmp_path / "s3" / "bucket")
    with serve_s3(tmp_path / "s3") as server:
        use_server(server.environment, monkeypatch)
        config = recipe(model, data).with_settings(
            {"data.train": "s3://bucket/train", "data.validation": "s3://bucket/held_out"}
        )
        checkpoints = Checkpoints(str(run.checkpoints))
        assert resume_position(config, run_preflight(config), run, checkpoints) == Position()


@pytest.mark.slow
def test_a_ledger_is_checked_where_the_data_are_now(run, data, tmp_path) -> None:
    moved = data.rename(tmp_path / "other")
    with pytest.raises(DataError, match="with --data"):
        audit(run.root)
    found = audit(run.root, str(moved / "train"))
    assert (found.samples, found.is_clean) == (4, True)


@pytest.mark.slow
def test_shards_that_are_new_or_lost_do_not_stop_a_resume(run, model, data) -> None:
    write_rows(data / "train" / "0-before-all-others.parquet", "a blue square moves up")
    (data / "train" / "b.parquet").unlink()
    assert resumed(run, model, data) == Position()


@pytest.mark.slow
def test_a_shard_of_another_size_is_refused_with_both_sizes(run, model, data) -> None:
    shard = data / "train" / "b.parquet"
    before = shard.stat().st_size
    write_rows(shard, "a red circle moves left and right again")
    assert (
        f"b.parquet in data.train has {shard.stat().st_size} bytes, and had {before}"
    ) in refusal(run, model, data)


@pytest.mark.slow
def test_other_captions_in_as_many_bytes_are_refused_with_both_digests(run, model, data) -> None:
    sizes = {path.name: path.stat().st_size for path in (data / "train").iterdir()}
    (before, *_) = json.loads(run.identity.read_text())["train"]
    shard = data / "train" / before["shard"]
    write_rows(shard, "a red circle moves down"[:23])
    assert shard.stat().st_size == sizes[shard.name]
    message = refusal(run, model, data)
    assert f"row group {before['index']} of {before['shard']} in data.train" in message
    assert f'and had "{before["content"]}"' in message


@pytest.mark.slow
def test_a_folder_of_other_shards_is_refused(run, model, data) -> None:
    for name in "abc":
        (data / "train" / f"{name}.parquet").rename(data / "train" / f"other-{name}.parquet")
    assert "data.train has none of its 3 shards, such as a.parquet" in refusal(run, model, data)


@pytest.mark.slow
def test_other_held_out_captions_are_refused_but_another_number_is_not(run, model, data) -> None:
    write_rows(data / "held_out" / "a.parquet", "a green square moves up")
    assert "the first 4 captions of data.validation have content" in refusal(run, model, data)
    assert resumed(run, model, data, "validation.num_captions=3") == Position()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_another_model_at_the_same_path_is_refused_by_component(run, model, data, part) -> None:
    before = model_digests(model)[part]
    (weights,) = (model / part).glob("*.safetensors")
    save_file({name: 1.05 * value for name, value in load_file(weights).items()}, weights)
    after = model_digests(model)[part]
    message = refusal(run, model, data)
    assert f'the {part} in model.folder has content "{after}", and had "{before}"' in message


@pytest.mark.slow
def test_every_setting_that_differs_is_named_with_both_values(run, model, data) -> None:
    changes = ("teacher.guidance_scale=2.5", "objective.lambda_nr=0.2")
    message = refusal(run, model, data, *changes)
    assert "teacher.guidance_scale is 2.5, and was " in message
    assert "objective.lambda_nr is 0.2, and was 0.1" in message


@pytest.mark.slow
def test_a_run_of_an_older_version_goes_on_under_the_settings_that_came_later(
    run, model, data
) -> None:
    content = json.loads(run.identity.read_text())
    later = ("generator.optimizer.decay", "data.prompt_dropout", "model.encoder_dtype")
    assert content["settings"]["model.encoder_dtype"] == "fp32"
    for key in later:
        del content["settings"][key]
    run.identity.write_text(json.dumps(content))
    assert resumed(run, model, data) == Position()
    # What the run could not do then is another run.
    message = refusal(run, model, data, "data.prompt_dropout=0.5", "model.encoder_dtype=bf16")
    assert "data.prompt_dropout is 0.5, and was 0.0" in message
    # Encoders had float32 then, which is no longer the default.
    assert 'model.encoder_dtype is "bf16", and was "fp32"' in message
    run.identity.unlink()
    said = list[str]()
    config = recipe(model, data)
    resume_position(
        config, run_preflight(config), run, Checkpoints(str(run.checkpoints)), said.append
    )
    (line,) = said
    assert "model and data were not compared" in line


@pytest.mark.slow
def test_other_embeddings_of_the_prompts_are_refused_wherever_they_come_from(
    model, data, tmp_path
) -> None:
    sets = [tmp_path / name for name in ("without", "right", "other", "more")]
    for folder in sets:
        folder.mkdir()
    encode_captions(data / "train", model, sets[0])
    for folder in sets[1:]:
        encode_captions(data / "train", model, folder, ("", "grey"))
    files = LocalFileSystem()
    right = read_stored_prompts(files, str(sets[1]))
    assert right is not None
    swapped = right.packed | {"": right.packed["grey"]}
    write_stored_prompts(files, str(sets[2]), replace(right, packed=swapped))
    more = right.packed | {"loud": right.packed["grey"]}
    write_stored_prompts(files, str(sets[3]), replace(right, packed=more))

    def trained(folder: Path) -> tuple[str, str]:
        return f"data.train={folder}", f"model.text_length={TEXT_LENGTH}"

    runs = [RunFolder(tmp_path / "runs" / folder.name) for folder in sets]
    for run, folder in zip(runs, sets, strict=True):
        config = recipe(model, data, *trained(folder))
        begin(config, run_preflight(config), run)
        assert resumed(run, model, data, *trained(folder)) == Position()
    without, stored = runs[:2]
    # Prompts that the run does not use decide nothing.
    assert resumed(stored, model, data, *trained(sets[3])) == Position()
    (digest,) = json.loads(stored.identity.read_text())["prompts"].values()
    was = f'was stored with content "{digest}"'
    assert was in refusal(stored, model, data, *trained(sets[2]))
    message = refusal(stored, model, data, *trained(sets[0]))
    assert f'the prompt "" is embedded by the text encoder, and {was}' in message
    # Runs of older versions record none, and used none.
    content = json.loads(without.identity.read_text())
    assert content.pop("prompts") == {}
    without.identity.write_text(json.dumps(content))
    assert resumed(without, model, data, *trained(sets[0])) == Position()
    message = refusal(without, model, data, *trained(sets[1]))
    assert f'stored with content "{digest}", and was embedded by the text encoder' in message
    assert PROMPTS_NAME in message
