"""A first look at a folder before anything is started: is it usable, how large, what does it hold.

Reads one listing page or the index, the footers of a section, and windows until a row can be used:
keys that can list but not read fail here, not an hour later.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data.shards.columns import (
    ColumnMap,
    ColumnNames,
    column_error,
    kind_of,
    map_columns,
)
from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.index import unfinished_in_words
from pipelines.data.shards.parquet import Footer
from pipelines.data.shards.reading import Fault
from pipelines.data.shards.rejection import Rejection, split_reason
from pipelines.data.shards.schema import (
    CAPTION,
    REQUIRED_COLUMNS,
    SAMPLE_ID,
    TEXT_EMBEDS,
    Encoding,
    ShardKind,
    encoding_of,
)
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.content import digests
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.plan import ShuffleSettings, Window
from pipelines.data.stream.quarantine import summarize_rejects
from pipelines.data.stream.source import Source
from pipelines.data.stream.stream import plan_windows
from pipelines.data.stream.window import REASON, read_window
from sgmd_core.errors import ConfigError, DataError

_CAPTIONS_AT_ONCE = 4096
# Embeddings take 8 MB each before the zeros at their end are cut off.
_TEXTS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class FolderFacts:
    """Result of a first look.

    Attributes:
        num_shards: Shards listed by now.
        num_rows: Rows of the folder; None where only listing and opening everything would tell.
        kind: What the first readable shard holds.
        encoding: How, if it is an encoded one.
        first: Digests of the row groups of the first window that has a usable row.
        captions: The usable captions of the first window that has some.
        columns: Where the first readable shard has ids and captions.
        names: Names of the set's columns.
        unfinished: What is left to do, where the command that fills the folder has not come to its
            end; empty where it has.
    """

    num_shards: int
    num_rows: int | None
    kind: ShardKind
    encoding: Encoding | None
    first: tuple[dict[str, Any], ...]
    captions: tuple[str, ...] = ()
    columns: ColumnMap = field(default_factory=lambda: ColumnMap({}))
    names: ColumnNames = ColumnNames()
    unfinished: str = ""

    @property
    def found(self) -> str:
        """One line that names the columns that were taken for ours; empty where they are ours."""
        return self.columns.in_words()


def inspect_folder(source: Source, seed: int, shuffle: ShuffleSettings) -> FolderFacts:
    """Looks a folder or a file of captions over; reads as little as shows that it can be streamed.

    Args:
        source: The folder; only ids and captions are read.
        seed: The run's seed.
        shuffle: How well rows are mixed.

    Raises:
        DataError: The folder cannot be opened, listed or read, or its first section of shards has
            no usable row; says what is wrong with them.
    """
    source = replace(source, columns=(), encoding=None, decode=None)
    place = source.open()
    catalogue = Catalogue(
        place.filesystem, place.root, shuffle.chapter_shards, source.s3, only=place.only
    )
    names = catalogue.settle_names(place.names)
    source = replace(source, settled=names)
    reader = source.reader_of(place)
    rejects: list[Rejection] = []
    first_section = misfit = None
    for planned in plan_windows(catalogue, seed, shuffle):
        cursor = planned.window.cursor
        first_section = first_section or cursor
        if replace(cursor, window=0) != first_section:
            break
        rejects += planned.rejects
        table = read_window(reader, source, planned.window)
        footer, columns = None, None
        for group in planned.window.groups:
            footer = reader.footers([(group.shard, group.num_bytes)])[0]
            if not isinstance(footer, Fault):
                columns = map_columns(footer.schema, names, REQUIRED_COLUMNS)
                if isinstance(columns, ColumnMap):
                    break
                misfit = misfit or (group.shard, columns)
        has_usable = table.column(REASON).null_count
        if isinstance(footer, Footer) and isinstance(columns, ColumnMap) and has_usable:
            return FolderFacts(
                catalogue.num_shards,
                catalogue.num_rows,
                kind_of(footer.schema, names),
                encoding_of(footer.schema),
                tuple(digests(planned.window, table)),
                tuple(table.filter(table.column(REASON).is_null()).column(CAPTION).to_pylist()),
                columns,
                names,
                "" if place.only else unfinished_in_words(place.filesystem, place.root),
            )
        rejects += _rejected_rows(planned.window, table)
    if misfit is not None:
        raise column_error(source.url, *misfit, source.names)
    raise DataError(
        f"reading the first shards of {source.url}",
        f"no usable row: {summarize_rejects(rejects)}",
        f"the columns {SAMPLE_ID} and {CAPTION}, filled",
        "`sgmd check` says what is wrong with each shard",
    )


def _rejected_rows(window: Window, table: pa.Table) -> list[Rejection]:
    """The rows of a window that has no usable one."""
    return [
        Rejection("", window.groups[line["group"]].shard, None, *split_reason(line[REASON]))
        for line in table.select(("group", REASON)).to_pylist()
    ]


def first_texts(
    source: Source, seed: int, captions: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """Stored embeddings of what `first_captions` returned.

    Args:
        source: The folder, with the encoding of its embeddings.
        seed: As for `first_captions`.
        captions: As returned.

    Returns:
        Each embedding by its caption, (rows, width), without the zeros at its end.

    Raises:
        DataError: An embedding cannot be read.
    """
    assert source.encoding is not None, "embeddings are read of encoded sets"
    settings = StreamSettings(replace(source, columns=(TEXT_EMBEDS,)), seed, max_bad_fraction=0.0)
    found: dict[str, NDArray[np.float32]] = {}
    num_taken = 0
    with Feed(settings, FeedProgress(), min(len(captions), _CAPTIONS_AT_ONCE)) as feed:
        while num_taken < len(captions):
            batch = feed.take(min(len(captions) - num_taken, _TEXTS_AT_ONCE))
            if batch.stop is not None:
                raise DataError(*batch.stop)
            for caption, text in zip(batch.captions, feed.embeddings(batch.number), strict=True):
                rows = text.any(dim=1).nonzero()
                found[caption] = text[: int(rows[-1]) + 1 if len(rows) else 0].numpy().copy()
            num_taken += len(batch.captions)
    return found


_FEWEST = 2
"""Captions that can be measured with; settings ask for as many at least."""


def first_captions(
    url: str,
    s3: S3Settings,
    seed: int,
    wanted: int,
    names: ColumnNames = ColumnNames(),
    at_least: int | None = None,
    setting: str = "",
) -> tuple[str, ...]:
    """The first captions of a folder's seeded order, to validate or evaluate with.

    Figures of two runs are compared over them, so they depend on folder and seed alone, and nothing
    is left out: one bad row is an error.

    Args:
        url: The folder, or a file of captions.
        s3: Requests to an S3 server.
        seed: Of the order.
        wanted: Captions that are taken.
        names: Names of the set's columns.
        at_least: All are taken where there are fewer than `wanted` and no fewer than these; None:
            fewer are an error.
        setting: Words that set `wanted`, for the error; `{}` is the number.

    Raises:
        DataError: The folder cannot be read, or a row met on the way cannot be used.
        ConfigError: It holds fewer rows.
    """
    least = wanted if at_least is None else at_least
    settings = StreamSettings(Source(url, s3, names=names), seed, max_bad_fraction=0.0)
    found: list[str] = []
    with Feed(settings, FeedProgress(), min(wanted, _CAPTIONS_AT_ONCE)) as feed:
        while len(found) < wanted:
            # In parts, so that a number far above the rows does not go round and round.
            batch = feed.take(min(wanted - len(found), _CAPTIONS_AT_ONCE))
            if batch.stop is not None:
                raise DataError(
                    f"reading held-out captions from {url}",
                    batch.stop[1],
                    "captions of which every one can be used",
                    f"Repair or remove these rows: sgmd check {url} names them",
                )
            found += batch.captions
            if batch.epochs[-1][0] > 0:
                num_rows = len(found) - sum(count for epoch, count in batch.epochs if epoch > 0)
                if num_rows >= least:
                    return tuple(found[:num_rows])
                raise ConfigError(
                    f"choosing {least} captions from {url}",
                    f"{num_rows} rows",
                    f"at least {least}",
                    f"Set {setting.format(num_rows)}, or add captions"
                    if setting and num_rows >= _FEWEST
                    else f"Add captions; {_FEWEST} are the fewest to measure with",
                )
    return tuple(found)
