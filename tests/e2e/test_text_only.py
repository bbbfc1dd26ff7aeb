"""`sgmd encode --text-only`: a set of text embeddings without latents, and distillation from it."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.data.checking.check import CheckOptions, check_shards
from pipelines.data.clips.clip_format import ClipFormat
from pipelines.data.encoding.encode import encode
from pipelines.data.encoding.encode_options import EncodeOptions
from pipelines.data.shards.columns import OptionColumnNames
from pipelines.data.shards.prompts import read_stored_prompts
from pipelines.data.shards.schema import encoding_of
from pipelines.data.shards.values import unpack_text
from pipelines.distillation.run import distill, dry_run
from sgmd_core.errors import DataError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.test_encoded import reversed_words
from tests.e2e.test_equivalence import history, moments, state
from tests.helpers import tiny_wan
from tests.helpers.moves import assert_moves
from workers.models.vocabulary import UnknownWords
from workers.models.wan_text import load_text

OPTIONS = EncodeOptions(ClipFormat(), tiny_wan.TEXT_LENGTH, text_only=True)
SHARD_CAPTIONS = 16
NEGATIVE = "a red circle moves left"

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


class StoppedError(Exception):
    """Ends an encoding in the middle."""


def stop_after_a_shard(unit: str, done: int, total: int) -> None:
    assert (unit, total) == ("captions", 48)
    if done > SHARD_CAPTIONS:
        raise StoppedError


@pytest.fixture(scope="module")
def captions_only(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training set of the world without its videos."""
    folder = tmp_path_factory.mktemp("captions")
    for shard in sorted((world / "train").glob("*.parquet")):
        pq.write_table(pq.read_table(shard, columns=["sample_id", "caption"]), folder / shard.name)
    return folder


@pytest.fixture(scope="module")
def texts(
    captions_only: Path,
    wan_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    ray_cluster: None,
) -> Path:
    """The captions encoded by a call that was stopped and a command that went on."""
    target = tmp_path_factory.mktemp("texts") / "set"
    options = replace(OPTIONS, shard_clips=SHARD_CAPTIONS)
    with pytest.raises(StoppedError):
        encode(str(captions_only), str(target), str(wan_folder), options, stop_after_a_shard)
    command = ["encode", captions_only, target, "--model", wan_folder, "--text-only", "--json"]
    command += ["--text-length", tiny_wan.TEXT_LENGTH, "--shard-clips", SHARD_CAPTIONS]
    command += ["--negative", NEGATIVE]
    done = CliRunner().invoke(app, [str(each) for each in command])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["clips"] == 48
    assert 0 < report["new_clips"] < 48
    assert report["prompts"] == 2
    return target


def test_the_empty_and_the_negative_prompt_are_stored_beside_them(
    texts: Path, wan_folder: Path
) -> None:
    stored = read_stored_prompts(LocalFileSystem(), str(texts))
    assert stored is not None
    assert stored.packed.keys() == {"", NEGATIVE}
    encoder = load_text(wan_folder)
    for text, packed in stored.packed.items():
        expected = encoder.encode([text], tiny_wan.TEXT_LENGTH)[0]
        assert torch.equal(unpack_text(packed, stored.encoding), expected)


def test_embeddings_are_those_of_the_text_encoder(
    texts: Path, captions_only: Path, wan_folder: Path
) -> None:
    encoder = load_text(wan_folder)
    wanted = {
        line["sample_id"]: line["caption"]
        for shard in captions_only.glob("*.parquet")
        for line in pq.read_table(shard).to_pylist()
    }
    found = {}
    for shard in texts.glob("part-*.parquet"):
        table = pq.read_table(shard)
        assert table.column_names == ["sample_id", "caption", "text_embeds"]
        encoding = encoding_of(table.schema)
        assert encoding is not None
        for line in table.to_pylist():
            found[line["sample_id"]] = line["caption"]
            expected = encoder.encode([line["caption"]], tiny_wan.TEXT_LENGTH)[0]
            assert torch.equal(unpack_text(line["text_embeds"], encoding), expected)
    assert found == wanted
    report = check_shards(str(texts), CheckOptions(num_processes=0))
    assert (report.is_usable, report.kind, report.decoded) == (True, "text", 48)


def test_distillation_reads_them_and_makes_the_same_bits(
    make_recipe: MakeRecipe, texts: Path, tmp_path: Path
) -> None:
    stored = make_recipe("name=stored", "iterations=1", f"data.train={texts}")
    computed = make_recipe(
        "name=computed", "iterations=1", f"data.train={texts}", "data.stored_text=false"
    )
    assert [dry_run(each)["stored_text"] for each in (stored, computed)] == [True, False]
    train = reversed_words(texts, tmp_path / "reversed")
    other = make_recipe("name=other", "iterations=1", f"data.train={train}")
    for config in (stored, computed, other):
        distill(config)
    assert_moves(moments(computed, 1), moments(other, 1))
    assert history(stored) == history(computed)
    assert state(stored, 1) == state(computed, 1)


def test_a_file_of_captions_is_encoded_and_unknown_words_and_bad_rows_are_named(
    wan_folder: Path, tmp_path: Path
) -> None:
    lines = [{"prompt": f"a red circle moves {way}", "text": ""} for way in ("left", "sideways")]
    source = tmp_path / "prompts.jsonl"
    source.write_text("\n".join([*map(json.dumps, lines), "{broken", json.dumps(lines[0])]))
    options = replace(OPTIONS, names=OptionColumnNames(caption="prompt"), max_bad_fraction=0.5)
    report = encode(str(source), str(tmp_path / "set"), str(wan_folder), options)
    assert (report.num_clips, report.rejected) == (3, {"bad_manifest_row": 1})
    assert "row 2 of the file" in report.examples["bad_manifest_row"]
    assert report.unknown_words == UnknownWords(3, 1, ("sideways",))
    assert "1 of the 3 captions read have words" in report.notes()[-1]
    table = pq.read_table(tmp_path / "set" / "part-00000.parquet")
    assert table["caption"].to_pylist() == [lines[row]["prompt"] for row in (0, 1, 0)]


def test_a_set_of_videos_gives_its_captions_and_is_not_filled_up_with_latents(
    world: Path, wan_folder: Path, tmp_path: Path
) -> None:
    source, target = str(world / "held_out"), str(tmp_path / "set")
    report = encode(source, target, str(wan_folder), OPTIONS)
    assert (report.num_clips, report.encoding["latent_shape"]) == (16, ())
    wanted = ClipFormat(tiny_wan.NUM_FRAMES, tiny_wan.HEIGHT, tiny_wan.WIDTH, 8)
    with pytest.raises(DataError, match="text_only = True"):
        encode(source, target, str(wan_folder), replace(OPTIONS, text_only=False, wanted=wanted))
