"""Prompts of a set: embeddings of texts that stand for no sample, such as the negative prompt.

    _prompts.parquet    caption  text_embeds    beside the index; type and maker in its metadata

They are stored as the captions of the set are, so that a run whose captions bring their embeddings
needs no text encoder for the prompts either.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fsspec import AbstractFileSystem

from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.parquet import read_parquet
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


def write_stored_prompts(filesystem: AbstractFileSystem, root: str, prompts: StoredPrompts) -> None:
    """Writes the prompts of a set; an older file is replaced as a whole.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.
        prompts: All that the file shall hold.

    Raises:
        DataError: The store refuses it.
    """
    builder = ShardBuilder(encoded_schema(text_part(prompts.encoding)))
    for number, (text, packed) in enumerate(sorted(prompts.packed.items())):
        builder.add({SAMPLE_ID: f"prompt-{number}", CAPTION: text, TEXT_EMBEDS: packed})
    write_file(filesystem, f"{root}/{PROMPTS_NAME}", builder.finish()[0])


def read_stored_prompts(
    filesystem: AbstractFileSystem, root: str, retry: S3Settings = S3Settings()
) -> StoredPrompts | None:
    """The prompts of a set; None for a set that has none.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.
        retry: How patiently they are read.

    Raises:
        DataError: The file is there and cannot be read or makes no sense.
    """
    content = fetch_file(filesystem, f"{root}/{PROMPTS_NAME}", retry)
    if content is None:
        return None
    try:
        table = read_parquet(io.BytesIO(content))
        encoding = encoding_of(table.schema)
        if encoding is None:
            raise ValueError("no encoding in its metadata")
        texts, packed = (table.column(name).to_pylist() for name in (CAPTION, TEXT_EMBEDS))
        if None in texts or None in packed:
            raise ValueError("a row without its text or its embedding")
    except (OSError, ValueError, KeyError, DataError) as error:
        raise DataError(
            f"reading {root}/{PROMPTS_NAME}",
            f"{type(error).__name__}: {error}",
            "prompts with their embeddings, as `sgmd encode` writes them",
            "Delete the file, and run `sgmd encode` again with the same DST",
        ) from error
    return StoredPrompts(encoding, dict(zip(texts, packed, strict=True)))
