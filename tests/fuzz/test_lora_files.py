"""A damaged LoRA, or damaged settings of one, is merged as it says or refused in words."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from sgmd_core.errors import SgmdError
from tests.fuzz.mutations import NUM_CASES, mutate_json, time_limit
from tests.fuzz.test_model_folder import mutate_weights
from tests.helpers.tiny_wan import tiny_velocity
from workers.models.lora_files import lora_changes, read_lora
from workers.models.wan_exchange import names_in_loras

SETTINGS = {
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {"to_q": 2},
    "alpha_pattern": {"to_k": 1.5},
    "use_rslora": True,
    "peft_type": "LORA",
    "init_lora_weights": True,
}


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    state = tiny_velocity().transformer.state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


def content(settings: bytes | None = None) -> bytes:
    """A whole LoRA, with settings in its header if some are given."""
    layers = [f"transformer.blocks.{block}.attn1.to_{name}" for block in (0, 1) for name in "qk"]
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 32) for layer in layers}
    tensors |= {f"{layer}.lora_B.weight": torch.ones(32, 2) for layer in layers}
    tensors |= {"diffusion_model.blocks.0.norm3.diff": torch.ones(32)}
    header = {} if settings is None else {"lora_adapter_metadata": settings.decode("latin-1")}
    return save(tensors, metadata={"format": "pt", **header})


def use(path: Path, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Merges a file; returns True if it could be merged."""
    try:
        with time_limit():
            found = lora_changes(read_lora(path), shapes, names_in_loras(shapes), 1.0)
            values = [change.values(torch.device("cpu")) for change in found.values()]
    except SgmdError:
        return False
    assert all(value.isfinite().all() for value in values)
    return True


def test_damaged_files_are_merged_or_refused(tmp_path: Path, shapes) -> None:
    path = tmp_path / "lora.safetensors"
    whole = content(json.dumps(SETTINGS).encode())
    path.write_bytes(whole)
    assert use(path, shapes)
    was_merged = set()
    for seed in range(NUM_CASES):
        path.write_bytes(mutate_weights(whole, seed))
        was_merged.add(use(path, shapes))
    assert False in was_merged, "no case was damaged enough to be refused"


@pytest.mark.parametrize("place", ["header", "beside"])
def test_damaged_settings_are_followed_or_refused(tmp_path: Path, shapes, place: str) -> None:
    path, settings = tmp_path / "adapter_model.safetensors", json.dumps(SETTINGS).encode()
    path.write_bytes(content())
    was_merged = set()
    for seed in range(2 * NUM_CASES):
        damaged = mutate_json(settings, seed)
        if place == "header":
            path.write_bytes(content(damaged))
        else:
            (tmp_path / "adapter_config.json").write_bytes(damaged)
        was_merged.add(use(path, shapes))
    assert was_merged == {True, False}, "some settings are still whole, others say nothing usable"
