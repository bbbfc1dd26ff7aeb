"""What is in a shard: the columns, and which of three kinds a Parquet file is.

    captions   sample_id  caption
    video      sample_id  caption  video (encoded file)      fps
    encoded    sample_id  caption  latents (x0, raw values)  text_embeds (raw values)

Latents and embeddings are the plain bytes of their values, little-endian, because Parquet reads a
binary value with one copy while it decodes a list number by number, and because Arrow has no
bfloat16. Shape and type are the same in a whole shard and stand in the schema's metadata, under
`sgmd.encoding`. Zeros after the end of a caption are not stored; reading puts them back.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import prod
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sgmd_core.errors import DataError

SAMPLE_ID = "sample_id"
CAPTION = "caption"
VIDEO = "video"
FPS = "fps"
LATENTS = "latents"
TEXT_EMBEDS = "text_embeds"

REQUIRED_COLUMNS = (SAMPLE_ID, CAPTION)
ENCODING_KEY = b"sgmd.encoding"

TEXT_COMPONENTS = ("text_encoder", "tokenizer")
"""What an embedding depends on, in the order in which its fingerprint is taken."""

DTypeName = Literal["float32", "bfloat16", "float16"]


class ShardKind(StrEnum):
    """What a shard holds besides ids and captions."""

    CAPTIONS = "captions"
    VIDEO = "video"
    ENCODED = "encoded"


@dataclass(frozen=True, slots=True)
class Encoding:
    """How the values of an encoded shard are to be read.

    Attributes:
        latent_shape: (channels, frames, rows, columns) of each sample's latents.
        text_shape: (positions, width) of each caption's embedding, zeros at the end included.
        dtype: Type of both; float32 makes the bits that encoding on the way would make.
        vae: Fingerprint of the autoencoder that made the latents (component "vae").
        text_encoder: Fingerprint of what made the embeddings (components `TEXT_COMPONENTS`).
    """

    latent_shape: tuple[int, int, int, int]
    text_shape: tuple[int, int]
    dtype: DTypeName
    vae: str
    text_encoder: str

    @property
    def latent_bytes(self) -> int:
        """Size of one sample's latents."""
        return prod(self.latent_shape) * torch_dtype(self.dtype).itemsize


def caption_schema() -> pa.Schema:
    """Captions alone: all that distillation needs."""
    return pa.schema([(SAMPLE_ID, pa.string()), (CAPTION, pa.string())])


def video_schema() -> pa.Schema:
    """Captioned clips; `video` is a whole encoded file, `fps` its frames a second."""
    return pa.schema([*caption_schema(), (VIDEO, pa.binary()), (FPS, pa.float64())])


def encoded_schema(encoding: Encoding) -> pa.Schema:
    """Latents and embeddings, with shape and type in the metadata."""
    columns = [*caption_schema(), (LATENTS, pa.binary()), (TEXT_EMBEDS, pa.binary())]
    return pa.schema(columns, metadata={ENCODING_KEY: json.dumps(asdict(encoding)).encode()})


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Arguments of `pyarrow.parquet.write_table` that suit a shard of this schema.

    Encoded video and noise-like floats do not get smaller; compressing them costs time only. With
    checksums, a page that a disk or a network has damaged is noticed when it is read.
    """
    raw = {VIDEO, LATENTS, TEXT_EMBEDS}
    return {
        "compression": {name: "none" if name in raw else "zstd" for name in schema.names},
        "use_dictionary": False,
        "write_statistics": False,
        "write_page_checksum": True,
    }


def kind_of(schema: pa.Schema) -> ShardKind:
    """Which kind of shard has this schema; extra columns do no harm."""
    if {LATENTS, TEXT_EMBEDS} <= set(schema.names):
        return ShardKind.ENCODED
    return ShardKind.VIDEO if VIDEO in schema.names else ShardKind.CAPTIONS


def missing_columns(schema: pa.Schema, wanted: Sequence[str] = REQUIRED_COLUMNS) -> list[str]:
    """Columns that a shard lacks, or has in a type that cannot be read as what they should be."""
    return [
        name
        for name in wanted
        if name not in schema.names or not _fits(name, schema.field(name).type)
    ]


def require_columns(
    schema: pa.Schema, shard: str, wanted: Sequence[str] = REQUIRED_COLUMNS
) -> None:
    """Checks that a shard can be read.

    Raises:
        DataError: A column is missing or of a wrong type; names the shard and the columns it has.
    """
    missing = missing_columns(schema, wanted)
    if missing:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(
            f"reading the footer of {shard}",
            f"columns {found}; missing {', '.join(missing)}",
            f"the columns {', '.join(wanted)}",
            "Write the shard again with these columns",
        )


def encoding_of(schema: pa.Schema) -> Encoding | None:
    """The encoding that a shard names; None where it names none.

    Raises:
        DataError: The metadata are there and make no sense.
    """
    stored = (schema.metadata or {}).get(ENCODING_KEY)
    if stored is None:
        return None
    try:
        fields = json.loads(stored)
        latent, text = tuple(fields["latent_shape"]), tuple(fields["text_shape"])
        torch_dtype(fields["dtype"])
        if len(latent) != 4 or len(text) != 2:
            raise ValueError(f"latent_shape {latent}, text_shape {text}")
        makers = str(fields["vae"]), str(fields["text_encoder"])
        return Encoding(latent, text, fields["dtype"], *makers)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"reading the metadata {ENCODING_KEY.decode()}",
            f"{stored.decode(errors='replace')} ({type(error).__name__}: {error})",
            "latent_shape, text_shape, dtype, vae and text_encoder",
            "Encode the videos again with `sgmd encode`",
        ) from error


def torch_dtype(name: DTypeName) -> torch.dtype:
    """The type of that name.

    Raises:
        ValueError: We do not store values of that type.
    """
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype {name!r}")
    return cast("torch.dtype", getattr(torch, name))


def pack(values: Tensor, dtype: DTypeName) -> bytes:
    """The bytes of a tensor's values as a shard stores them."""
    stored = values.detach().to("cpu", torch_dtype(dtype)).contiguous()
    return stored.view(torch.uint8).numpy().tobytes()


def pack_text(embedding: Tensor, dtype: DTypeName) -> bytes:
    """The bytes of an embedding (positions, width) up to its last row that is not zero."""
    rows = embedding.any(dim=1).nonzero()
    return pack(embedding[: int(rows[-1]) + 1 if len(rows) else 0], dtype)


def unpack_latents(stored: bytes, encoding: Encoding) -> Tensor:
    """Latents (channels, frames, rows, columns) in their stored type.

    Raises:
        DataError: These bytes are no latents of that shape.
    """
    if len(stored) != encoding.latent_bytes:
        raise DataError(
            "reading latents",
            f"{len(stored)} bytes",
            f"{encoding.latent_bytes} bytes for {encoding.latent_shape} in {encoding.dtype}",
        )
    return _values(stored, encoding.dtype).view(encoding.latent_shape)


def unpack_text(stored: bytes, encoding: Encoding) -> Tensor:
    """An embedding (positions, width) in its stored type, with the zeros at its end.

    Raises:
        DataError: These bytes are no embedding of that shape.
    """
    positions, width = encoding.text_shape
    row_bytes = width * torch_dtype(encoding.dtype).itemsize
    if len(stored) % row_bytes or len(stored) > positions * row_bytes:
        raise DataError(
            "reading a text embedding",
            f"{len(stored)} bytes",
            f"at most {positions} rows of {row_bytes} bytes",
        )
    embedding = torch.zeros(positions, width, dtype=torch_dtype(encoding.dtype))
    values = _values(stored, encoding.dtype).view(-1, width)
    embedding[: len(values)] = values
    return embedding


def _values(stored: bytes, dtype: DTypeName) -> Tensor:
    # A copy: the bytes may be a read-only view into shared memory.
    kind = torch_dtype(dtype)
    values = torch.empty(len(stored) // kind.itemsize, dtype=kind)
    values.view(torch.uint8).numpy()[:] = np.frombuffer(stored, dtype=np.uint8)
    return values


def _fits(name: str, stored: pa.DataType) -> bool:
    if name in (SAMPLE_ID, CAPTION):
        # A dictionary of strings reads as strings; ids may be numbers.
        plain = stored.value_type if isinstance(stored, pa.DictionaryType) else stored
        is_text = pa.types.is_string(plain) or pa.types.is_large_string(plain)
        return is_text or (name == SAMPLE_ID and pa.types.is_integer(plain))
    if name == FPS:
        return pa.types.is_integer(stored) or pa.types.is_floating(stored)
    return pa.types.is_binary(stored) or pa.types.is_large_binary(stored)
