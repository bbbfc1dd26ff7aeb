"""A whole small world for end-to-end runs: real shards, a real Wan folder, a recipe over both."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.data.shards.prompts import StoredPrompts, write_stored_prompts
from pipelines.data.shards.schema import Encoding, encoded_schema
from pipelines.data.shards.values import pack_text
from pipelines.shapes import ClipSplit, captions, write_shards
from tests.helpers import tiny_wan
from workers.models.content import fingerprint
from workers.models.wan_configs import LAYOUT
from workers.models.wan_folder import inspect_wan_folder
from workers.models.wan_text import load_text

MakeRecipe = Callable[..., DistillConfig]


@pytest.fixture(autouse=True)
def forked(forked_libraries: None) -> None:
    """Every process that a test here starts has its libraries already."""


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/` and `held_out/`: shards of rendered clips with real mp4 inside."""
    folder = tmp_path_factory.mktemp("world")
    write_shards(str(folder / "train"), num_clips=48, shard_size=16, seed=0)
    write_shards(
        str(folder / "held_out"), num_clips=16, shard_size=16, seed=0, split=ClipSplit.HELD_OUT
    )
    return folder


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a Wan with random weights that knows the words of the captions."""
    words = sorted(
        {word for split in ClipSplit for text in captions(split) for word in text.split()}
    )
    return tiny_wan.write_tiny_wan(tmp_path_factory.mktemp("wan") / "base", words)


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, world: Path, wan_folder: Path) -> Path:
    """A recipe of five iterations of two micro-batches, in one process."""
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(
        f"""
name: small
iterations: 5
model: {{folder: {wan_folder}, text_length: {tiny_wan.TEXT_LENGTH}, encoder_dtype: fp32}}
video:
  num_frames: {tiny_wan.NUM_FRAMES}
  height: {tiny_wan.HEIGHT}
  width: {tiny_wan.WIDTH}
  fps: 8
data:
  train: {world / "train"}
  validation: {world / "held_out"}
  read_ahead: {{readers: 0}}  # Ray Data is started where it is what a test shows
batch: {{size: 4, micro_batches: 2}}
schedule: {{shift: 3.0}}
generator: {{optimizer: {{lr: 1.0e-3}}}}
fake_score: {{optimizer: {{lr: 1.0e-3}}}}
teacher: {{guidance_scale: 2.0}}
export: {{dtype: fp32}}  # generators are compared to the bit
validation: {{every: 0, num_captions: 4, teacher_steps: 2}}
topology:
  mode: local
  generator: {{cpus: 0.5}}
  fake_score: {{cpus: 0.5}}
  teacher: {{cpus: 0.5}}
"""
    )
    return path


@pytest.fixture(scope="session")
def encoded(world: Path, wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training shards of the world with stored embeddings, and latents that nobody reads."""
    folder = tmp_path_factory.mktemp("encoded")
    return encode_captions(world / "train", wan_folder, folder)


def encode_captions(
    source: Path, wan_folder: Path, folder: Path, prompts: tuple[str, ...] = ()
) -> Path:
    """Shards of a set with stored embeddings, and prompts beside them if some are named."""
    encoder = load_text(wan_folder)
    width = inspect_wan_folder(wan_folder).text_width
    encoding = Encoding(
        latent_shape=(1, 1, 1, 1),
        text_shape=(tiny_wan.TEXT_LENGTH, width),
        dtype="float32",
        vae="none",
        text_encoder=fingerprint(wan_folder, LAYOUT.text),
    )
    packed = {
        text: pack_text(encoder.encode([text], tiny_wan.TEXT_LENGTH)[0], "float32")
        for text in prompts
    }
    if packed:
        write_stored_prompts(LocalFileSystem(), str(folder), StoredPrompts(encoding, packed))
    for shard in sorted(source.glob("*.parquet")):
        plain = pq.read_table(shard, columns=["sample_id", "caption"])
        texts = [
            pack_text(encoder.encode([caption], tiny_wan.TEXT_LENGTH)[0], "float32")
            for caption in plain["caption"].to_pylist()
        ]
        columns = {name: plain[name] for name in plain.column_names}
        columns |= {"latents": [bytes(4)] * len(texts), "text_embeds": texts}
        pq.write_table(pa.table(columns, schema=encoded_schema(encoding)), folder / shard.name)
    return folder


@pytest.fixture(scope="module")
def module_recipe(tmp_path_factory: pytest.TempPathFactory, recipe_file: Path) -> MakeRecipe:
    """As `make_recipe`, for runs that the tests of a module share."""
    output = tmp_path_factory.mktemp("runs")

    def make(*overrides: str) -> DistillConfig:
        return load_recipe(str(recipe_file), [f"output={output}", *overrides])

    return make


@pytest.fixture
def make_recipe(tmp_path: Path, recipe_file: Path) -> MakeRecipe:
    """Makes the recipe with overrides; runs go to the test's own folder."""

    def make(*overrides: str) -> DistillConfig:
        return load_recipe(str(recipe_file), [f"output={tmp_path / 'runs'}", *overrides])

    return make
