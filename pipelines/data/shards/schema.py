"""Columns of a shard, and the four kinds of Parquet files.

    captions   sample_id  caption
    video      sample_id  caption  video (encoded file)      fps
    encoded    sample_id  caption  latents (x0, raw values)  text_embeds (raw values)
    text       sample_id  caption                            text_embeds (raw values)

Latents and embeddings are the plain bytes of their values, little-endian, because Parquet reads a
binary value with one copy while it decodes a list number by number, and because Arrow has no
bfloat16. Shape and type are the same in a whole shard and stand in the schema's metadata, under
`sgmd.encoding`. Zeros after the end of a caption are not stored; reading puts them back.
"""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import prod
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sgmd_core.errors import DataError

SAMPLE_ID = "sample_id"
CAPTION = "caption"
VIDEO = "video"
FPS = "fps"
LATENTS = "latents"
TEXT_EMBEDS = "text_embeds"

REQUIRED_COLUMNS = (SAMPLE_ID, CAPTION)
ENCODING_KEY = b"sgmd.encoding"
FAULTS_KEY = b"sgmd.faults"
"""Metadata of shards made of a file of captions: why a row of the file is not a caption."""

QUARANTINE_NAME = "quarantine.parquet"
"""Beside the shards that a command wrote: what it did not take."""

DTypeName = Literal["float32", "bfloat16", "float16"]


class ShardKind(StrEnum):
    """Content of a shard besides ids and captions."""

    CAPTIONS = "captions"
    VIDEO = "video"
    ENCODED = "encoded"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Encoding:
    """Format of the values of an encoded shard.

    Attributes:
        latent_shape: (channels, frames, rows, columns) of each sample's latents; empty where text
            embeddings are stored alone.
        text_shape: (positions, width) of each caption's embedding, zeros at the end included.
        dtype: Type of both; float32 makes the bits that encoding on the way would make.
        vae: Fingerprint of the autoencoder that made the latents (`FolderLayout.autoencoder`);
            empty where there are none.
        text_encoder: Fingerprint of what made the embeddings (`FolderLayout.text`).
    """

    latent_shape: tuple[int, ...]
    text_shape: tuple[int, int]
    dtype: DTypeName
    vae: str
    text_encoder: str

    @property
    def item_bytes(self) -> int:
        """Size of one value."""
        return 4 if self.dtype == "float32" else 2

    @property
    def latent_bytes(self) -> int:
        """Size of one sample's latents; 0 where none are stored."""
        return prod(self.latent_shape) * self.item_bytes if self.latent_shape else 0


def caption_schema() -> pa.Schema:
    """Captions alone: all that distillation needs."""
    return pa.schema([(SAMPLE_ID, pa.string()), (CAPTION, pa.string())])


def video_schema() -> pa.Schema:
    """Captioned clips; `video` is a whole encoded file, `fps` its frames a second."""
    return pa.schema([*caption_schema(), (VIDEO, pa.binary()), (FPS, pa.float64())])


def encoded_schema(encoding: Encoding) -> pa.Schema:
    """Latents and embeddings, or embeddings alone; shape and type stand in the metadata."""
    latents = [(LATENTS, pa.binary())] if encoding.latent_shape else []
    columns = [*caption_schema(), *latents, (TEXT_EMBEDS, pa.binary())]
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
        if len(latent) not in (0, 4) or len(text) != 2:
            raise ValueError(f"latent_shape {latent}, text_shape {text}")
        if fields["dtype"] not in get_args(DTypeName):
            raise ValueError(f"dtype {fields['dtype']!r}")
        makers = str(fields["vae"]), str(fields["text_encoder"])
        return Encoding(latent, text, fields["dtype"], *makers)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"reading the metadata {ENCODING_KEY.decode()}",
            f"{stored.decode(errors='replace')} ({type(error).__name__}: {error})",
            "latent_shape, text_shape, dtype, vae and text_encoder",
            "Encode the set again with `sgmd encode`",
        ) from error


def faults_in(schema: pa.Schema, group: int) -> dict[int, str]:
    """Returns why rows of a row group have no caption, by their number in it; see `FAULTS_KEY`."""
    stored = (schema.metadata or {}).get(FAULTS_KEY)
    if stored is None:
        return {}
    try:
        places = ((key.split("/"), str(fault)) for key, fault in json.loads(stored).items())
        return {int(row): fault for (number, row), fault in places if int(number) == group}
    except (ValueError, AttributeError):
        return {}


def join_names(values: pa.ChunkedArray) -> NDArray[np.uint8]:
    """The bytes of a binary column, one value after the other.

    Without a copy where the column is in one piece; read-only then.
    """
    array = values.combine_chunks()
    _, borders, content = array.buffers()
    width = np.int64 if pa.types.is_large_binary(array.type) else np.int32
    places = np.frombuffer(borders, dtype=width)[array.offset :][: len(array) + 1]
    return np.frombuffer(content, dtype=np.uint8)[places[0] : places[-1]]
