"""A source of rows: a folder of shards, and the columns and shapes wanted of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.data.clips.hang_guard import MAX_HANG_S
from pipelines.data.making.caption_file import open_set
from pipelines.data.shards.columns import ColumnNames
from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.parquet import RowGroupReader
from pipelines.data.shards.scan import ShardSet
from pipelines.data.shards.schema import Encoding

Decode = Callable[[bytes, float], NDArray[np.uint8]]
"""Turns an encoded file and its frames a second into pixels; raises where it cannot."""


@dataclass(frozen=True, slots=True)
class Source:
    """A set of shards, and the columns to read of it.

    Attributes:
        url: The folder: a path, or an address such as s3://bucket/clips.
        s3: Settings of the connection to an S3 server.
        columns: Columns to read in addition to ids and captions: `text_embeds`, `latents`,
            `video`, `fps`.
        encoding: Required shape and origin of latents and embeddings; None if they are not read.
        max_caption_chars: Longer captions are rejected.
        names: Names that the caller gives for the set's columns.
        settled: Names that its first shards have; None until they are read.
        decode: Applied to `video`; the column then holds the pixels' bytes.
        pixel_shape: (frames, height, width, 3) that `decode` must come to.
        further_shapes: Other shapes that `decode` may come to, all of them different; lines then
            have the column `bucket`, the number of their shape among all.
        max_hang_s: Time that one call of the decoder may take; a video that takes longer is
            rejected. 0 decodes in the reader's own process and sets no limit.
    """

    url: str
    s3: S3Settings = S3Settings()
    columns: tuple[str, ...] = ()
    encoding: Encoding | None = None
    max_caption_chars: int = 4096
    decode: Decode | None = None
    pixel_shape: tuple[int, ...] = ()
    names: ColumnNames = ColumnNames()
    settled: ColumnNames | None = None
    max_hang_s: float = MAX_HANG_S
    further_shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def pixel_shapes(self) -> tuple[tuple[int, ...], ...]:
        """All shapes that `decode` may come to."""
        return (self.pixel_shape, *self.further_shapes)

    def open(self, *, probe: bool = True) -> ShardSet:
        """Opens the folder; see `open_set`."""
        return open_set(self.url, self.s3, self.names, probe=probe)

    def reader_of(self, place: ShardSet) -> RowGroupReader:
        """A reader of the opened folder."""
        return RowGroupReader(place.filesystem, place.root, self.s3, self.settled or place.names)

    def open_reader(self) -> RowGroupReader:
        """Opens the folder for reading in this process."""
        return self.reader_of(self.open(probe=False))
