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
from uuid import UUID

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from cluster.redaction import printable
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

# Arrow makes these functions while it is imported, where a type checker does not see them.
pc: Any = pyarrow.compute

CAPTION_NAMES = ("caption", "prompt", "text")
"""Usual names of captions, the preferred one first."""

SETTLING_SHARDS = 8
"""First shards of a set that settle the names of its columns."""

_BYTES, _PATH = "bytes", "path"
_MAX_PATH_CHARS = 200
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
    """How the caller spells the setting of one of these names."""

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
            found = _paths_alone(columns[VIDEO], table.column(stored))
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
        """One line that names the column of each of ours, and what is left of a shard's columns.

        Args:
            names: All columns of the shard. Where they are exactly our own the line is empty.
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
    """The error of a set whose columns cannot be told.

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
    if CAPTION in stored:
        return [CAPTION]
    return [name for name in stored if name.casefold() in CAPTION_NAMES]


def kind_of(schema: pa.Schema, names: ColumnNames = ColumnNames()) -> ShardKind:
    """Returns the kind of shard that has this schema; extra columns do no harm."""
    if {LATENTS, TEXT_EMBEDS} <= set(schema.names):
        return ShardKind.ENCODED
    if TEXT_EMBEDS in schema.names and ENCODING_KEY in (schema.metadata or {}):
        return ShardKind.TEXT
    is_video = isinstance(_find(schema, VIDEO, names.video), str)
    return ShardKind.VIDEO if is_video else ShardKind.CAPTIONS


def fits(name: str, stored: pa.DataType) -> bool:
    """Tells whether a stored type can be read as one of our columns."""
    if pa.types.is_null(stored):
        return True
    if name in (SAMPLE_ID, CAPTION):
        # A dictionary of strings reads as strings; ids may be numbers. Text that an old Spark or
        # Hive has written has no mark that it is text.
        plain = stored.value_type if isinstance(stored, pa.DictionaryType) else stored
        is_id = name == SAMPLE_ID and (pa.types.is_integer(plain) or _is_uuid(plain))
        whole = name == SAMPLE_ID and pa.types.is_decimal(plain) and plain.scale == 0
        return _is_text(plain) or _is_bytes(plain) or is_id or whole
    if name == FPS:
        return pa.types.is_integer(stored) or pa.types.is_floating(stored)
    if name == VIDEO and isinstance(stored, pa.StructType):
        place = stored.get_field_index(_BYTES)
        return place >= 0 and _is_bytes(stored.field(place).type)
    return _is_bytes(stored) or pa.types.is_fixed_size_binary(stored)


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


def _is_text(kind: pa.DataType) -> bool:
    return any(
        is_kind(kind)
        for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


def _is_bytes(kind: pa.DataType) -> bool:
    return any(
        is_kind(kind)
        for is_kind in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    )


def _is_uuid(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.uuid"


def as_plain(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column in a type that the rest of the pipeline casts; our own types stay as they are."""
    kind = column.type
    if name == FPS:
        return column.cast(pa.float64()) if pa.types.is_null(kind) else column
    if name not in (SAMPLE_ID, CAPTION):
        if isinstance(kind, pa.StructType):
            column = pc.struct_field(column, _BYTES)
        is_plain = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
        return column if is_plain else column.cast(pa.binary())
    if _is_uuid(kind):
        texts = [None if value is None else str(UUID(bytes=value)) for value in _storage(column)]
        return pa.chunked_array([pa.array(texts, pa.string())])
    if isinstance(kind, pa.DictionaryType) and _is_bytes(kind.value_type):
        column, kind = column.cast(pa.binary()), pa.binary()
    if _is_bytes(kind):
        options = pc.CastOptions(target_type=pa.string(), allow_invalid_utf8=True)
        return pc.cast(column, options=options)
    ours = pa.types.is_integer(kind) or isinstance(kind, pa.DictionaryType)
    if ours or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column
    return column.cast(pa.string())


def _storage(column: pa.ChunkedArray) -> list[bytes | None]:
    return [value for chunk in column.chunks for value in chunk.storage.to_pylist()]


def _paths_alone(content: pa.ChunkedArray, column: pa.ChunkedArray) -> dict[int, str]:
    """Faults of videos that are structs with a path and without bytes, by row.

    Such a path leads to a file on the machine that wrote the set, which may be any file here.
    """
    kind = column.type
    if not isinstance(kind, pa.StructType) or kind.get_field_index(_PATH) < 0:
        return {}
    if not _is_text(kind.field(_PATH).type):
        return {}
    # A module of rejections reads Parquet files, and so imports this one.
    from pipelines.data.shards.rejection import Reason, join_reason

    paths = pc.struct_field(column, _PATH)
    is_empty = pc.equal(pc.fill_null(pc.binary_length(content), 0), 0)
    if not pc.any(is_empty).as_py():
        return {}
    found = {}
    for row, (alone, path) in enumerate(zip(is_empty.to_pylist(), paths.to_pylist(), strict=True)):
        if alone and path:
            shown = printable(path[:_MAX_PATH_CHARS])
            detail = f"a path alone, {shown}; its file is not in the set"
            found[row] = join_reason(Reason.MISSING_VIDEO, detail)
    return found
