"""A damaged model folder is refused in words, and asks for no memory that its files do not need."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.media.inference import read_inference_settings
from sgmd_core.errors import SgmdError
from tests.fuzz.mutations import NUM_CASES, mutate_bytes, mutate_json, time_limit
from tests.helpers import tiny_ltx, tiny_wan
from workers.models.content import model_digests
from workers.models.families import family_of

ROOM_BYTES = 4 * 2**30
WORDS = ("a", "red", "circle", "moves", "left")
FILES = (
    *("model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json"),
    *("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"),
    *("tokenizer/tokenizer.json", "sgmd.json"),
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    *("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"),
)
LTX_FILES = (
    *("model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json"),
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
CASES = max(1, NUM_CASES // 4)


@contextmanager
def limited_memory() -> Iterator[None]:
    """Lets this process grow by `ROOM_BYTES` and no further."""
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (own + ROOM_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def mutate_weights(data: bytes, seed: int) -> bytes:
    """Damages a safetensors file: its bytes, or its header as JSON."""
    if seed % 2:
        return mutate_bytes(data, seed)
    size = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + size], seed)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole folders by family; of Wan the denoiser is in two shards."""
    ltx = tiny_ltx.write_tiny_ltx(tmp_path_factory.mktemp("ltx") / "base", WORDS)
    folder = tiny_wan.write_tiny_wan(tmp_path_factory.mktemp("wan") / "base", WORDS)
    transformer = tiny_wan.tiny_velocity().transformer
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size="80KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) == 2
    (folder / "sgmd.json").write_text(json.dumps({"num_steps": 4, "flow_shift": 3.0}))
    return {"wan": folder, "ltx": ltx}


def use(folder: Path) -> None:
    """Checks a folder and loads all of it."""
    family = family_of(folder)
    family.inspect(folder)
    family.read_shape(folder)
    if (folder / "sgmd.json").exists():
        read_inference_settings(folder)
    model_digests(folder)
    family.load_tokenizer(folder).unknown_words(["a red circle"])
    family.load_text(folder).encode(["a red circle", ""], tiny_wan.TEXT_LENGTH)
    family.load_denoiser(folder)
    family.load_autoencoder(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name"),
    [*(("wan", name) for name in FILES), *(("ltx", name) for name in LTX_FILES)],
)
def test_a_damaged_model_folder_is_loaded_or_refused_in_words(
    family: str, name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(models[family], tmp_path / "model"))
    whole = (folder / name).read_bytes()
    use(folder)
    change = mutate_weights if name.endswith(".safetensors") else mutate_json
    outcomes = set()
    for seed in range(CASES):
        (folder / name).write_bytes(change(whole, seed))
        with time_limit(), limited_memory():
            try:
                use(folder)
            except SgmdError as error:
                outcomes.add(type(error))
    assert outcomes or CASES < 5 or name.endswith("tokenizer_config.json")
