"""A damaged model folder is loaded, or refused in words, and asks for no memory that it lacks."""

import shutil
from pathlib import Path

import pytest
import torch

from cluster.errors import ClusterError
from sgmd_core.errors import SgmdError
from tests.fuzz.mutations import NUM_CASES, mutate_bytes, mutate_text, time_limit
from tests.helpers.tiny_wan import write_tiny_wan
from workers.models.families import family_of

FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_wan(tmp_path_factory.mktemp("written") / "wan", ["a", "red", "circle"])


def _damaged(whole: bytes, seed: int, *, is_text: bool) -> bytes:
    if is_text and seed % 2:
        return mutate_text(whole.decode(), seed).encode("utf-8", "surrogatepass")
    # The header of a file of tensors is what decides; the rest is numbers.
    head = whole if is_text else whole[:2048]
    return mutate_bytes(head, seed) + whole[len(head) :]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_model_folder_is_loaded_or_refused_in_words(
    name: str, written: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "wan"))
    path, refusals = folder / name, list[str]()
    whole = path.read_bytes()
    for seed in range(max(1, NUM_CASES // 2)):
        path.write_bytes(_damaged(whole, seed, is_text=name.endswith(".json")))
        try:
            with time_limit():
                family = family_of(folder)
                family.inspect(folder)
                if name.startswith("transformer"):
                    family.load_denoiser(folder, torch.float32, device=torch.device("cpu"))
                elif name.startswith("vae"):
                    family.load_autoencoder(folder, torch.float32)
                elif name.startswith("t"):
                    family.load_text(folder, torch.float32).encode(["a red circle"], 6)
        except (SgmdError, ClusterError) as error:
            refusals.append(str(error))
    assert all(len(words) < 20_000 for words in refusals)
    assert refusals or "scheduler" in name or "tokenizer" in name
