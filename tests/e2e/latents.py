"""Runs that learn from latents of the data."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipelines.data.shards.schema import Encoding, encoded_schema
from pipelines.data.shards.values import pack_tensor, pack_text
from pipelines.distillation.run import distill
from tests.e2e.conftest import MakeRecipe
from tests.e2e.test_equivalence import drop_checkpoint, history, moments, state
from tests.helpers import tiny_wan
from tests.helpers.moves import assert_moves
from workers.models.content import fingerprint
from workers.models.wan_configs import LAYOUT


def write_encoded(folder: Path, wan: Path, seed: int, **changes: object) -> Path:
    """A shard with latents of the tiny Wan's size, and embeddings of no known text encoder."""
    facts: dict[str, object] = {
        "latent_shape": tiny_wan.LATENT_SHAPE,
        "text_shape": (tiny_wan.TEXT_LENGTH, 8),
        "dtype": "float32",
        "vae": fingerprint(wan, [LAYOUT.autoencoder]),
        "text_encoder": "another",
    }
    encoding = Encoding(**{**facts, **changes})  # type: ignore[arg-type]
    stream = torch.Generator().manual_seed(seed)
    latents = torch.randn(32, *encoding.latent_shape, generator=stream)
    columns = {
        "sample_id": [f"clip-{row}" for row in range(32)],
        "caption": ["a red circle moves left"] * 32,
        "latents": [pack_tensor(value, "float32") for value in latents],
        "text_embeds": [pack_text(torch.ones(tiny_wan.TEXT_LENGTH, 8), "float32")] * 32,
    }
    folder.mkdir(exist_ok=True)
    table = pa.table(columns, schema=encoded_schema(encoding))
    pq.write_table(table, folder / "one.parquet", row_group_size=8)
    return folder


def resume_with_latents(make_recipe: MakeRecipe, settings: list[str], others: Path) -> None:
    """Makes the run `whole` of 4 iterations, and the same as `parts`, which is resumed, to the bit.

    Args:
        make_recipe: Makes the recipes.
        settings: Theirs, with a checkpoint after 2 iterations.
        others: Data of the same captions and other latents, which move the numbers.
    """
    whole = make_recipe("name=whole", *settings)
    distill(whole)
    other = make_recipe("name=other", *settings, f"data.train={others}")
    distill(other)
    assert_moves(moments(whole, 4), moments(other, 4))
    distill(make_recipe("name=parts", *settings, "iterations=3"))
    parts = make_recipe("name=parts", *settings)
    drop_checkpoint(parts, 3)
    distill(parts, resume=True)
    assert history(parts) == history(whole)
    assert state(parts, 4) == state(whole, 4)
