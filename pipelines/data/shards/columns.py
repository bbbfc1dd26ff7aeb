"""Columns by their stored names: names of other tools, read as the columns of `schema.py`.

    first footers -> settle_names -> the set's names
    a footer -> map_columns(schema, names, wanted) -> ColumnMap | Fault -> table -> our columns

A name that the caller gives is binding. Without one, our own name is taken, or else the one column
that has a usual name of captions in any case (`text`, `TEXT`, `Prompt`); two of them are a fault,
never a guess. The first shards settle the names of the whole set. A set without an id column has
ids made of the shard's path and the row's number in it, which stay the same wherever the folder
lies and however its row groups are cut.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from cluster.redaction import printable
from pipelines.data.shards.column_types import as_plain, fits, paths_alone
from pipelines.data.shards.reading import Fault
from pipelines.data.shards.schema import (
    CAPTION,
    ENCODING_KEY,
    FAULTS_KEY,
    FPS,
    LATENTS,
    REQUIRED_COLUMNS,
    SAMPLE_ID,
    TEXT_EMBEDS,
    VIDEO,
    ShardKind,
    faults_in,
)
from sgmd_core.errors import DataError

CAPTION_NAMES = ("caption", "prompt", "text")
"""Usual names of captions, the preferred one first."""

SETTLING_SHARDS = 8
"""First shards of a set that settle the names of its columns."""

_NUM_SHOWN = 12
_COMPETE = "each of these columns may be the {}:"


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """Names of a set's columns; null finds the column by its usual name.

    Attributes:
        caption: The caption; null takes `caption`, or the only one of `prompt` and `text`, in any
            case.
        sample_id: The id; null takes `sample_id`, or else derives ids from file and row.
        video: The encoded video: bytes, or a struct that has them in `bytes`; null takes `video`.
        fps: Frames a second; null takes `fps`. A set without such a column is read by the rates
            that the videos name.
    """

    caption: str | None = None
    sample_id: str | None = None
    video: str | None = None
    fps: str | None = None

    setting: ClassVar[str] = "names.{}"
    """Spelling of the setting of one of these names, by the caller."""

    def setting_of(self, column: str) -> str:
        """The setting by which the caller names one of our columns."""
        return type(self).setting.format(column)


class RecipeColumnNames(ColumnNames):
    """`ColumnNames` as a recipe holds them."""

    __slots__ = ()
    setting: ClassVar[str] = "data.columns.{}"


class OptionColumnNames(ColumnNames):
    """`ColumnNames` as commands hold them, in options."""

    __slots__ = ()
    setting: ClassVar[str] = "--{}-column"

    def setting_of(self, column: str) -> str:
        """The option that names one of our columns."""
        return type(self).setting.format("id" if column == SAMPLE_ID else column)


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """Stored names of the wanted columns of one shard.

    Attributes:
        stored: Stored name of each wanted column; None where the shard has none and does not need
            it: ids are then derived, and rates are null.
    """

    stored: Mapping[str, str | None]

    @property
    def sources(self) -> list[str]:
        """Stored columns to read."""
        return [name for name in dict.fromkeys(self.stored.values()) if name is not None]

    def apply(
        self, table: pa.Table, path: str, metadata: pq.FileMetaData, index: int, skipped: int = 0
    ) -> pa.Table:
        """Our columns, made of the stored ones.

        Args:
            table: The stored columns of some rows of a row group.
            path: The shard's path in its folder.
            metadata: Of the shard.
            index: Number of the row group.
            skipped: Rows of the row group before these.
        """
        columns: dict[str, Any] = {}
        for name, stored in self.stored.items():
            if stored is not None:
                columns[name] = as_plain(name, table.column(stored))
            elif name == SAMPLE_ID:
                before = (metadata.row_group(each).num_rows for each in range(index))
                first = sum(before) + skipped
                ids = [f"{path}#{row}" for row in range(first, first + table.num_rows)]
                columns[name] = pa.chunked_array([pa.array(ids, pa.string())])
            else:
                columns[name] = pa.chunked_array([pa.nulls(table.num_rows, pa.float64())])
        metadata_of_set = dict(table.schema.metadata or {})
        if isinstance(stored := self.stored.get(VIDEO), str):
            found = paths_alone(columns[VIDEO], table.column(stored))
            if found:
                faults = {skipped + row: fault for row, fault in found.items()}
                faults |= faults_in(table.schema, index)
                named = {f"{index}/{row}": fault for row, fault in faults.items()}
                metadata_of_set[FAULTS_KEY] = json.dumps(named).encode()
        return pa.table(columns).replace_schema_metadata(metadata_of_set or None)

    def in_words(self) -> str:
        """One line that names all columns that are not our own; empty where all are."""
        return printable("; ".join(self._found(all_of_them=False)))

    def in_full(self, names: Sequence[str]) -> str:
        """One line that names the source of each column, and the unused columns of a shard.

        Args:
            names: All columns of the shard. Where they are those of the format the line is empty.
        """
        others = [name for name in dict.fromkeys(names) if name not in self.sources]
        if not self.in_words() and not others:
            return ""
        left = [f"not read: {_shown(others)}"] if others else []
        return printable("; ".join([*self._found(all_of_them=True), *left]))

    def _found(self, *, all_of_them: bool) -> Iterator[str]:
        """Says which column is which, where its name is not our own or of all of them."""
        for name, stored in self.stored.items():
            if stored is not None and (all_of_them or stored != name):
                yield f"{name} is column {stored}"
        if self.stored.get(SAMPLE_ID, SAMPLE_ID) is None:
            yield "ids are derived from file and row (no column sample_id)"


def map_columns(schema: pa.Schema, names: ColumnNames, wanted: Sequence[str]) -> ColumnMap | Fault:
    """Finds the wanted columns of a shard.

    Args:
        schema: Of its footer.
        names: Names that the caller gives.
        wanted: Our names of the columns to be read.

    Returns:
        Where they are; or why the shard cannot be read: a column is missing, has an unreadable
        type, or two columns compete.
    """
    found: dict[str, str | None] = {}
    faults: dict[str, list[str]] = {}
    for name in dict.fromkeys(wanted):
        place = _find(schema, name, getattr(names, name, None))
        if isinstance(place, _Missing):
            faults.setdefault(place.reason, []).append(place.column)
        else:
            found[name] = place
    if faults:
        words = [f"{reason} {', '.join(columns)}" for reason, columns in faults.items()]
        return Fault(printable("; ".join(words)))
    return ColumnMap(found)


def settle_names(schemas: Iterable[pa.Schema], names: ColumnNames) -> ColumnNames | Fault:
    """Names of the columns of a whole set, by its first shards; our own name has precedence.

    Args:
        schemas: Of the first shards.
        names: Names that the caller gives.

    Returns:
        The names, null where no shard has the column; or which columns compete.
    """
    schemas = [*schemas]
    found: dict[str, str | None] = {}
    for name in (CAPTION, SAMPLE_ID, VIDEO, FPS):
        given = getattr(names, name)
        places = (_find(schema, name, given) for schema in schemas)
        stored = [*dict.fromkeys(place for place in places if isinstance(place, str))]
        if len(stored) > 1 and name not in stored:
            return Fault(printable(f"{_COMPETE.format(name)} {' and '.join(stored)}"))
        found[name] = given or (name if name in stored else next(iter(stored), None))
    return replace(names, **found)


def require_named(url: str, schemas: Iterable[pa.Schema], names: ColumnNames) -> None:
    """Checks that columns which the caller names are in a set.

    Args:
        url: The set.
        schemas: Of its first shards; nothing is checked where none can be read.
        names: Names that the caller gives.

    Raises:
        DataError: None of the shards has one of them; names the nearest.
    """
    schemas = list(schemas)
    found = list(dict.fromkeys(name for schema in schemas for name in schema.names))
    # Of a larger set the later ones may have it, and would be of another kind than these.
    where = f" in its first {len(schemas)} shards" if len(schemas) >= SETTLING_SHARDS else ""
    for column in (CAPTION, SAMPLE_ID, VIDEO, FPS):
        given = getattr(names, column)
        if found and given is not None and given not in found:
            nearest = nearest_column(given, found)
            raise DataError(
                f"reading {url}",
                f"no column {given} ({names.setting_of(column)}){where}; the columns are "
                f"{_shown(found)}",
                "a column of the set",
                f"The nearest is {printable(nearest)}" if nearest else "Name one of these, or none",
            )


def nearest_column(given: str, found: Sequence[str]) -> str | None:
    """The column that was probably meant, if any comes close; cases count as one."""
    by_name = {name.casefold(): name for name in reversed(found)}
    close = difflib.get_close_matches(given.casefold(), by_name, n=1)
    return by_name[close[0]] if close else None


def column_error(
    url: str,
    shard: str,
    fault: Fault,
    names: ColumnNames,
    wanted: Sequence[str] = REQUIRED_COLUMNS,
) -> DataError:
    """The error of a set whose columns are not clear.

    Args:
        url: The set.
        shard: A shard of it.
        fault: What `map_columns` returned for it.
        names: Names that the caller gave; they know its settings.
        wanted: Our columns that the caller reads.
    """
    settings = ", ".join(names.setting_of(name) for name in wanted)
    return DataError(
        f"reading {url}",
        f"no usable row in {shard}: {fault.reason}",
        f"one column for each of {', '.join(wanted)}; ids may be missing",
        f"Say which column is which: {settings}",
    )


def competing_captions(stored: Sequence[str]) -> list[str]:
    """Columns of which any may be the captions; one where it is clear, none where there is none.

    Args:
        stored: Names of a file's columns.
    """
    return competing_columns(stored, CAPTION_NAMES)


def competing_columns(stored: Sequence[str], usual: Sequence[str]) -> list[str]:
    """Columns that have a usual name in any case; the preferred name alone where it is there.

    Args:
        stored: Names of a file's columns.
        usual: Usual names, the preferred one first.
    """
    if usual[0] in stored:
        return [usual[0]]
    return [name for name in stored if name.casefold() in usual]


def kind_of(schema: pa.Schema, names: ColumnNames = ColumnNames()) -> ShardKind:
    """Returns the kind of shard that has this schema; extra columns do no harm."""
    if {LATENTS, TEXT_EMBEDS} <= set(schema.names):
        return ShardKind.ENCODED
    if TEXT_EMBEDS in schema.names and ENCODING_KEY in (schema.metadata or {}):
        return ShardKind.TEXT
    is_video = isinstance(_find(schema, VIDEO, names.video), str)
    return ShardKind.VIDEO if is_video else ShardKind.CAPTIONS


@dataclass(frozen=True, slots=True)
class _Missing:
    column: str
    reason: str = "missing column"


def _find(schema: pa.Schema, name: str, given: str | None) -> str | _Missing | None:
    """Stored name of one of our columns; None where it may be missing."""
    if given is not None:
        if given not in schema.names:
            others = f" (for {name}; the columns are {_shown(schema.names)})"
            return _Missing(given if given == name else given + others)
        return _checked(schema, name, given)
    usual = CAPTION_NAMES if name == CAPTION else (name,)
    if schema.names.count(name) == 1 and _is_filled(schema, name, name):
        return name
    others = [each for each in schema.names if each != name and each.casefold() in usual]
    filled = [each for each in dict.fromkeys(others) if _is_filled(schema, name, each)]
    if len(filled) == 1 and schema.names.count(filled[0]) == 1:
        return filled[0]
    if filled:
        return _Missing(f"{' and '.join(filled)}", _COMPETE.format(name))
    if name in schema.names:
        return _checked(schema, name, name)
    if name in (SAMPLE_ID, FPS):
        return None
    return _Missing(f"{name} (the columns are {_shown(schema.names)})")


def _checked(schema: pa.Schema, name: str, stored: str) -> str | _Missing:
    if schema.names.count(stored) > 1:
        return _Missing(stored, "more than one column is named")
    kind = schema.field(stored).type
    if not fits(name, kind):
        return _Missing(f"{stored} ({kind})", "a type that cannot be read in column")
    return stored


def _is_filled(schema: pa.Schema, name: str, stored: str) -> bool:
    """Tells whether all columns of that name have a type that fits and values."""
    kinds = [field.type for field in schema if field.name == stored]
    return all(fits(name, kind) and not pa.types.is_null(kind) for kind in kinds)


def _shown(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _NUM_SHOWN else ""
    return printable(", ".join(names[:_NUM_SHOWN])) + more
