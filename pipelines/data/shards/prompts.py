"""Prompts of a set: embeddings of texts that stand for no sample, such as the negative prompt.

    _prompts.parquet    caption  text_embeds    beside the index; type and maker in its metadata

They are stored as the captions of the set are, so that a run whose captions bring their embeddings
needs no text encoder for the prompts either.
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa
from fsspec import AbstractFileSystem

from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.opening import open_parquet
from pipelines.data.shards.reading import fetch_file
from pipelines.data.shards.schema import (
    CAPTION,
    SAMPLE_ID,
    TEXT_EMBEDS,
    Encoding,
    encoded_schema,
    encoding_of,
)
from pipelines.data.shards.shard_writing import ShardBuilder, write_file
from sgmd_core.errors import DataError

PROMPTS_NAME = "_prompts.parquet"
MAX_PROMPTS = 64
MAX_PROMPT_BYTES = 256 * 2**20
"""Bounds of the file: what a set of another makes this machine read. 512 tokens of width 4096 in
`float32` are 8 MB."""
_MAX_TEXT_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class StoredPrompts:
    """Embeddings of prompts.

    Attributes:
        encoding: Shape, type and maker of the embeddings.
        packed: Bytes of each embedding by its text, as `pipelines.data.shards.values` packs them.
    """

    encoding: Encoding
    packed: Mapping[str, bytes]


def text_part(encoding: Encoding) -> Encoding:
    """Returns what an encoding says of embeddings alone."""
    return replace(encoding, latent_shape=(), vae="")


def require_few_prompts(count: int, attempted: str) -> None:
    """Checks that a set holds no more prompts than are read back.

    Raises:
        DataError: There are too many.
    """
    if count > MAX_PROMPTS:
        raise DataError(
            attempted,
            f"{count} prompts",
            f"at most {MAX_PROMPTS} in a set, with the empty one",
            "Name fewer with --negative",
        )


def write_stored_prompts(filesystem: AbstractFileSystem, root: str, prompts: StoredPrompts) -> None:
    """Writes the prompts of a set; an older file is replaced as a whole.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.
        prompts: The whole content.

    Raises:
        DataError: The store refuses it, or there are more than are read back.
    """
    attempted = f"writing {root}/{PROMPTS_NAME}"
    require_few_prompts(len(prompts.packed), attempted)
    builder = ShardBuilder(encoded_schema(text_part(prompts.encoding)))
    for number, (text, packed) in enumerate(sorted(prompts.packed.items())):
        builder.add({SAMPLE_ID: f"prompt-{number}", CAPTION: text, TEXT_EMBEDS: packed})
    content = builder.finish()[0]
    if len(content) > MAX_PROMPT_BYTES:
        raise DataError(
            attempted,
            f"{len(content)} bytes",
            f"at most {MAX_PROMPT_BYTES}",
            "Name fewer with --negative, or store them in bfloat16",
        )
    write_file(filesystem, f"{root}/{PROMPTS_NAME}", content)


def read_stored_prompts(
    filesystem: AbstractFileSystem, root: str, s3: S3Settings = S3Settings()
) -> StoredPrompts | None:
    """The prompts of a set; None for a set that has none.

    The set may be anybody's: no more than `MAX_PROMPT_BYTES` are read, and one row is unpacked at a
    time.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.
        s3: Requests to an S3 server.

    Raises:
        DataError: The file is there and cannot be read, is too large or makes no sense.
    """
    content = fetch_file(filesystem, f"{root}/{PROMPTS_NAME}", s3, most=MAX_PROMPT_BYTES + 1)
    if content is None:
        return None
    try:
        if len(content) > MAX_PROMPT_BYTES:
            raise ValueError(f"more than {MAX_PROMPT_BYTES} bytes")
        return _prompts_in_file(content)
    except (OSError, ValueError, KeyError, pa.ArrowException, DataError) as error:
        raise DataError(
            f"reading {root}/{PROMPTS_NAME}",
            f"{type(error).__name__}: {error}",
            f"at most {MAX_PROMPTS} prompts with their embeddings, as `sgmd encode` writes them",
            "Delete the file, and run `sgmd encode` again with the same DST",
        ) from error


def _prompts_in_file(content: bytes) -> StoredPrompts:
    file = open_parquet(io.BytesIO(content))
    schema, metadata = file.schema_arrow, file.metadata
    encoding = encoding_of(schema)
    if encoding is None:
        raise ValueError("no encoding in its metadata")
    if not all(isinstance(size, int) and size > 0 for size in encoding.text_shape):
        raise ValueError(f"text_shape {encoding.text_shape}")
    kinds = {
        CAPTION: (pa.string(), pa.large_string()),
        TEXT_EMBEDS: (pa.binary(), pa.large_binary()),
    }
    for name, allowed in kinds.items():
        if schema.field(name).type not in allowed:
            raise ValueError(f"{name} holds {schema.field(name).type}, not {allowed[0]}")
    if metadata.num_rows > MAX_PROMPTS:
        raise ValueError(f"{metadata.num_rows} rows")
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    unpacked = sum(group.total_byte_size for group in groups)
    if unpacked > MAX_PROMPT_BYTES:
        raise ValueError(f"{unpacked} bytes unpacked")
    found: dict[str, bytes] = {}
    # Row by row: a dictionary may stand for far more than its bytes in the file.
    for batch in file.iter_batches(1, columns=[*kinds], use_threads=False):
        found.update(_checked_rows(batch, encoding))
    return StoredPrompts(encoding, found)


def _checked_rows(batch: pa.RecordBatch, encoding: Encoding) -> Iterator[tuple[str, bytes]]:
    positions, width = encoding.text_shape
    row_bytes = width * encoding.item_bytes
    for text, packed in zip(batch.column(CAPTION), batch.column(TEXT_EMBEDS), strict=True):
        if not text.is_valid or not packed.is_valid:
            raise ValueError("a row without its text or its embedding")
        num_bytes, text_bytes = packed.as_buffer().size, text.as_buffer().size
        if text_bytes > _MAX_TEXT_BYTES:
            raise ValueError(f"a text of {text_bytes} bytes")
        if num_bytes % row_bytes or num_bytes > positions * row_bytes:
            raise ValueError(f"an embedding of {num_bytes} bytes, not {positions} x {row_bytes}")
        yield text.as_py(), packed.as_py()
