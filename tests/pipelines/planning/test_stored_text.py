"""Texts that lie with the data, and the memory that a plan counts without a text encoder."""

from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from pipelines.config.negatives import shipped_negatives
from pipelines.config.recipe import load_recipe
from pipelines.data.shards.prompts import (
    PROMPTS_NAME,
    StoredPrompts,
    read_stored_prompts,
    write_stored_prompts,
)
from pipelines.data.shards.schema import Encoding
from pipelines.planning.beside import bytes_beside
from pipelines.planning.stored_text import ENCODING, TEXT, VALIDATOR, encoding_sections
from pipelines.planning.workload import Workload
from sgmd_core.errors import DataError
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


def test_sections_whose_texts_are_all_stored_are_planned_without_a_text_encoder(tmp_path):
    train, held_out = tmp_path / "train", tmp_path / "held_out"
    for folder in (train, held_out):
        folder.mkdir()
    options = [f"data.train={train}", f"data.validation={held_out}"]
    config = load_recipe("tiny", options)
    assert encoding_sections(config) == ENCODING
    write_stored_prompts(FILES, str(train), stored("grey"))
    assert encoding_sections(config) == ENCODING
    write_stored_prompts(FILES, str(train), stored("", "grey"))
    assert encoding_sections(config) == {VALIDATOR}
    write_stored_prompts(FILES, str(held_out), stored(""))
    assert encoding_sections(config) == frozenset()
    for other in ("data.stored_text=false", "model.negative_prompt=loud", "model.text_length=7"):
        assert encoding_sections(load_recipe("tiny", [*options, other])) == ENCODING
    sizes, work = EncoderSizes(text=10**9, autoencoder=10**6), Workload.of(config)
    whole, none = (bytes_beside(config, work, sizes, 10**6, which) for which in (ENCODING, ()))
    assert (whole[TEXT], none[TEXT]) == (4e9, 0)
    assert whole[VALIDATOR] - none[VALIDATOR] == 4e9


def test_negative_prompts_come_from_recipes_of_a_model_of_that_name():
    wanted = load_recipe("wan21-14b").model.negative_prompt
    hub = "/x/models--Wan-AI--Wan2.1-T2V-14B-Diffusers/snapshots/0123"
    for folder in ("models/Wan2.1-T2V-14B-Diffusers", hub):
        assert {*shipped_negatives(Path(folder))} == {wanted}
    assert [*shipped_negatives(Path("models/mine"))] == []
