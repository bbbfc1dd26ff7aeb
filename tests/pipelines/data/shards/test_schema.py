"""Shards of three kinds: what is in them comes back out, and what is missing is named."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.data.shards.columns import kind_of
from pipelines.data.shards.schema import (
    ENCODING_KEY,
    DTypeName,
    Encoding,
    ShardKind,
    caption_schema,
    encoded_schema,
    encoding_of,
    parquet_options,
    video_schema,
)
from pipelines.data.shards.values import pack_tensor, pack_text, unpack_latents, unpack_text
from sgmd_core.errors import DataError

DTYPES = ("float32", "bfloat16", "float16")


def encoding(dtype: DTypeName = "float32") -> Encoding:
    return Encoding((4, 3, 2, 2), (5, 8), dtype, vae="v", text_encoder="t")


@pytest.mark.parametrize("dtype", DTYPES)
def test_latents_and_embeddings_survive_a_shard(tmp_path: Path, dtype) -> None:
    how = encoding(dtype)
    latents = torch.randn(6, *how.latent_shape)
    texts = torch.randn(6, *how.text_shape)
    for row, length in enumerate((0, 1, 2, 3, 4, 5)):
        texts[row, length:] = 0
    schema = encoded_schema(how)
    table = pa.table(
        {
            "sample_id": [str(row) for row in range(6)],
            "caption": ["a"] * 6,
            "latents": [pack_tensor(value, dtype) for value in latents],
            "text_embeds": [pack_text(value, dtype) for value in texts],
        },
        schema=schema,
    )
    path = tmp_path / "one.parquet"
    pq.write_table(table, path, **parquet_options(schema))
    stored = pq.read_table(path)
    assert encoding_of(pq.read_schema(path)) == how
    rounded = latents.to(getattr(torch, dtype)), texts.to(getattr(torch, dtype))
    for row in range(6):
        found = unpack_latents(stored["latents"][row].as_py(), how)
        assert torch.equal(found, rounded[0][row])
        assert torch.equal(unpack_text(stored["text_embeds"][row].as_py(), how), rounded[1][row])


def test_the_zeros_after_a_caption_are_not_stored() -> None:
    text = torch.zeros(5, 8)
    text[1, 3] = 1.0
    assert len(pack_text(text, "bfloat16")) == 2 * 8 * 2


def test_bytes_of_another_shape_are_refused() -> None:
    how = encoding()
    with pytest.raises(DataError, match=r"188 bytes.*192 bytes"):
        unpack_latents(bytes(188), how)
    with pytest.raises(DataError, match=r"at most 5 rows"):
        unpack_text(bytes(6 * 8 * 4), how)
    with pytest.raises(DataError, match=r"31 bytes"):
        unpack_text(bytes(31), how)


def test_the_kind_is_told_by_the_columns() -> None:
    assert kind_of(caption_schema()) is ShardKind.CAPTIONS
    assert kind_of(video_schema()) is ShardKind.VIDEO
    assert kind_of(encoded_schema(encoding())) is ShardKind.ENCODED
    assert encoding_of(caption_schema()) is None


def test_embeddings_alone_are_a_kind_of_their_own() -> None:
    how = Encoding((), (5, 8), "float32", vae="", text_encoder="t")
    schema = encoded_schema(how)
    assert schema.names == ["sample_id", "caption", "text_embeds"]
    assert kind_of(schema) is ShardKind.TEXT
    assert encoding_of(schema) == how
    # A column of that name in another tool's captions does no harm.
    assert kind_of(schema.remove_metadata()) is ShardKind.CAPTIONS
    with pytest.raises(DataError, match=r"4 bytes.*0 bytes"):
        unpack_latents(bytes(4), how)


def test_metadata_that_make_no_sense_are_told() -> None:
    broken = caption_schema().with_metadata({ENCODING_KEY: b'{"latent_shape": [1, 2]}'})
    with pytest.raises(DataError, match=r"sgmd\.encoding.*sgmd encode"):
        encoding_of(broken)
