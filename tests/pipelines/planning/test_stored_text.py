"""Texts that lie with the data, and the memory that a plan counts without a text encoder."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipelines.config.negatives import shipped_negatives
from pipelines.config.recipe import load_recipe
from pipelines.data.shards.prompts import (
    MAX_PROMPT_BYTES,
    PROMPTS_NAME,
    StoredPrompts,
    read_stored_prompts,
    write_stored_prompts,
)
from pipelines.data.shards.schema import CAPTION, TEXT_EMBEDS, Encoding, encoded_schema
from pipelines.planning.beside import bytes_beside
from pipelines.planning.stored_text import (
    ENCODING,
    TEXT,
    VALIDATOR,
    encoding_sections,
    lacks_prompts_alone,
)
from pipelines.planning.workload import Workload
from sgmd_core.errors import DataError
from tests.pipelines.planning.test_planning import sgmd
from workers.models.folder import EncoderSizes

FILES = LocalFileSystem()
LENGTH = load_recipe("tiny").model.text_length


def stored(*texts: str, length: int = LENGTH) -> StoredPrompts:
    encoding = Encoding((), (length, 2), "float32", "", "0123456789abcdef")
    return StoredPrompts(encoding, {text: bytes(8) for text in texts})


def test_prompts_are_read_as_they_were_written_and_a_broken_file_is_named(tmp_path):
    assert read_stored_prompts(FILES, str(tmp_path)) is None
    write_stored_prompts(FILES, str(tmp_path), stored("", "grey"))
    assert read_stored_prompts(FILES, str(tmp_path)) == stored("", "grey")
    (tmp_path / PROMPTS_NAME).write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=f"{PROMPTS_NAME}.*sgmd encode"):
        read_stored_prompts(FILES, str(tmp_path))


def write_table(folder: Path, texts: pa.Array, embeds: pa.Array, **options: Any) -> None:
    schema = encoded_schema(stored().encoding)
    table = pa.table({CAPTION: texts, TEXT_EMBEDS: embeds}, metadata=schema.metadata)
    pq.write_table(table, folder / PROMPTS_NAME, **options)


def test_prompts_that_another_program_has_written_with_a_dictionary_are_read(tmp_path):
    embeds = pa.array([bytes(range(8))] * 3, pa.large_binary())
    write_table(tmp_path, pa.array(["", "grey", "ünïcode"]), embeds)
    found = read_stored_prompts(FILES, str(tmp_path))
    assert found is not None
    assert found.packed == dict.fromkeys(("", "grey", "ünïcode"), bytes(range(8)))


BAD = {
    "65 rows": lambda: (["a"] * 65, [bytes(8)] * 65),
    "bytes unpacked": lambda: (["a"], [bytes(257 * 2**20)]),
    "an embedding of 1048576 bytes": lambda: (["a"] * 64, [bytes(2**20)] * 64),
    "a text of 70000 bytes": lambda: (["a" * 70000], [bytes(8)]),
    "an embedding of 7 bytes": lambda: (["a"], [bytes(7)]),
    "text_embeds holds int64, not binary": lambda: (["a"], [1]),
    "caption holds int64, not string": lambda: ([1], [bytes(8)]),
    "a row without its text": lambda: ([None, "a"], [bytes(8)] * 2),
    "its embedding": lambda: (["a", "b"], [None, bytes(8)]),
}


@pytest.mark.parametrize("words", BAD)
@pytest.mark.slow
def test_prompts_that_no_encode_wrote_are_refused_before_they_take_memory(tmp_path, words):
    texts, embeds = (pa.array(values) for values in BAD[words]())
    write_table(tmp_path, texts, embeds, compression="zstd", write_statistics=False)
    assert (tmp_path / PROMPTS_NAME).stat().st_size < 2**20
    before = pa.total_allocated_bytes()
    with pytest.raises(DataError, match=rf"{PROMPTS_NAME}.*{words}.*sgmd encode"):
        read_stored_prompts(FILES, str(tmp_path))
    assert pa.total_allocated_bytes() - before < 2**24


@pytest.mark.slow
def test_a_file_of_prompts_past_the_bound_is_not_read_whole_nor_written(tmp_path):
    with (tmp_path / PROMPTS_NAME).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match=f"{PROMPTS_NAME}.*more than {MAX_PROMPT_BYTES} bytes"):
        read_stored_prompts(FILES, str(tmp_path))
    (tmp_path / PROMPTS_NAME).unlink()
    many = stored(*map(str, range(65)))
    with pytest.raises(DataError, match=r"65 prompts.*at most 64.*--negative"):
        write_stored_prompts(FILES, str(tmp_path), many)
    assert not [*tmp_path.iterdir()]


def write_shard_of(folder: Path, length: int = LENGTH) -> Path:
    folder.mkdir(exist_ok=True)
    schema = encoded_schema(stored(length=length).encoding)
    rows = {"sample_id": ["0"], CAPTION: ["a"], TEXT_EMBEDS: [bytes(8)]}
    pq.write_table(pa.table(rows, schema=schema), folder / "a.parquet")
    return folder


def test_sections_whose_texts_are_all_stored_are_planned_without_a_text_encoder(tmp_path):
    train, held_out = write_shard_of(tmp_path / "train"), tmp_path / "held_out"
    held_out.mkdir()
    options = [f"data.train={train}", f"data.validation={held_out}"]
    config = load_recipe("tiny", options)
    assert encoding_sections(config) == ENCODING
    assert lacks_prompts_alone(config)
    write_stored_prompts(FILES, str(train), stored("grey"))
    assert encoding_sections(config) == ENCODING
    write_stored_prompts(FILES, str(train), stored("", "grey"))
    assert encoding_sections(config) == {VALIDATOR}
    # The negative prompt may lie with the training set.
    write_shard_of(held_out)
    assert encoding_sections(config) == frozenset()
    for other in ("data.stored_text=false", "model.text_length=7"):
        assert encoding_sections(load_recipe("tiny", [*options, other])) == ENCODING
    write_stored_prompts(FILES, str(held_out), stored("loud"))
    loud = load_recipe("tiny", [*options, "model.negative_prompt=loud"])
    assert encoding_sections(loud) == {TEXT}
    sizes, work = EncoderSizes(text=10**9, autoencoder=10**6), Workload.of(config)
    whole, none = (bytes_beside(config, work, sizes, 10**6, which) for which in (ENCODING, ()))
    assert (whole[TEXT], none[TEXT]) == (4e9, 0)
    assert whole[VALIDATOR] - none[VALIDATOR] == 4e9


def test_prompts_may_lie_with_any_set_whose_captions_all_have_embeddings(tmp_path):
    train, also = (write_shard_of(tmp_path / name) for name in ("train", "also"))
    write_stored_prompts(FILES, str(also), stored(""))
    options = [f"data.train={train / 'a.parquet'}", "validation.every=0"]
    config = load_recipe("tiny", [*options, f"data.also=[{{source: {also}}}]"])
    assert TEXT not in encoding_sections(config)
    write_shard_of(train, length=7)
    assert encoding_sections(config) == ENCODING
    assert not lacks_prompts_alone(config)


@pytest.mark.slow
def test_a_plan_warns_of_sets_at_addresses_that_it_does_not_look_at(tmp_path):
    options = ("--model", "1.3b", "--gpus", 17, "--gpu-memory", 14, "--fit", "--json")
    settings = ("topology.text.gpus=1", "validation.every=0")
    here = write_shard_of(tmp_path / "here", 512)
    refused = sgmd("plan", "wan21-1.3b", *options, *settings, f"data.train={here}")
    assert refused.exit_code == 2
    assert "the prompts beside the stored embeddings" in refused.stderr
    told = sgmd("plan", "wan21-1.3b", *options, *settings, "data.train=s3://clips/train")
    assert told.exit_code == 0, told.stderr
    (line,) = [line for line in json.loads(told.stdout)["advice"] if "s3://clips/train" in line]
    assert "text does not fit: 11.4 GB" in line
    assert "not looked at" in line
    anew = (*settings, "data.train=s3://clips/train", "data.stored_text=false")
    assert sgmd("plan", "wan21-1.3b", *options, *anew).exit_code == 2


@pytest.mark.slow
def test_negative_prompts_come_from_recipes_of_a_model_of_that_name():
    wanted = load_recipe("wan21-14b").model.negative_prompt
    hub = "/x/models--Wan-AI--Wan2.1-T2V-14B-Diffusers/snapshots/0123"
    for folder in ("models/Wan2.1-T2V-14B-Diffusers", hub):
        assert {*shipped_negatives(Path(folder))} == {wanted}
    assert [*shipped_negatives(Path("models/mine"))] == []
