"""Digests of the weights of a model folder: written with it, checked where it is loaded."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from sgmd_core.errors import ModelFolderError
from tests.helpers.tiny_wan import write_tiny_wan
from workers.models.weight_digests import (
    SETTINGS_FILE,
    require_same_weights,
    write_model_settings,
)

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_tiny_wan(tmp_path / "model", ["a", "red", "circle"])
    write_model_settings(folder, {"num_steps": 4})
    return folder


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def change_settings(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / SETTINGS_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_every_weight_file_has_a_digest_beside_the_settings(folder):
    content = json.loads((folder / SETTINGS_FILE).read_text())
    assert content["num_steps"] == 4
    stored = set(content["sha256"])
    assert stored == {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}
    assert {Path(name).parts[0] for name in stored} == {"transformer", "vae", "text_encoder"}
    require_same_weights(folder)


def test_a_flipped_bit_is_refused_by_the_name_of_its_file(folder):
    flip_a_bit(folder / WEIGHTS)
    with pytest.raises(ModelFolderError, match=rf"{WEIGHTS} has SHA-256 .*Copy the folder again"):
        require_same_weights(folder)


def test_a_weight_file_that_is_gone_is_named(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelFolderError, match=rf"{WEIGHTS} is missing"):
        require_same_weights(folder)


@pytest.mark.parametrize(
    "digests", [None, [], 3, {"../other.safetensors": "ab"}, {"/etc/x.safetensors": "ab"}, {"a": 1}]
)
def test_digests_of_another_shape_or_of_files_elsewhere_are_refused(folder, digests):
    change_settings(folder, lambda content: content.update(sha256=digests))
    with pytest.raises(ModelFolderError, match="not a table of weight files"):
        require_same_weights(folder)


@pytest.mark.parametrize("text", ["null", "[]", "3", "{", "\xff"])
def test_settings_that_are_no_object_are_refused(folder, text):
    (folder / SETTINGS_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(ModelFolderError, match=SETTINGS_FILE):
        require_same_weights(folder)


def test_a_folder_of_an_older_version_loads_and_that_is_said_once(folder, caplog, monkeypatch):
    # Libraries that configure logging disable loggers of others.
    logger = logging.getLogger("workers.models.weight_digests")
    monkeypatch.setattr(logger, "disabled", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    change_settings(folder, lambda content: content.pop("sha256"))
    flip_a_bit(folder / WEIGHTS)
    with caplog.at_level(logging.WARNING):
        require_same_weights(folder)
        require_same_weights(folder)
    assert [record.message for record in caplog.records] == [
        f"{folder} was written by an older version, without digests: its weights are not checked"
        " for damage"
    ]


def test_a_folder_of_another_program_loads_without_a_word(folder, caplog):
    (folder / SETTINGS_FILE).unlink()
    with caplog.at_level(logging.WARNING):
        require_same_weights(folder)
    assert not caplog.records
