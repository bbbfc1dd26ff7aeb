"""All shards of a set by their footers: those that can be read, and those that cannot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from fsspec import AbstractFileSystem

from pipelines.data.shards.columns import (
    SETTLING_SHARDS,
    ColumnMap,
    ColumnNames,
    kind_of,
    map_columns,
    require_named,
    settle_names,
)
from pipelines.data.shards.index import Shard
from pipelines.data.shards.parquet import Footer
from pipelines.data.shards.reading import Fault
from pipelines.data.shards.rejection import Reason, Rejection
from pipelines.data.shards.scan import ScannedShard, scan_folder
from pipelines.data.shards.schema import (
    CAPTION,
    FPS,
    REQUIRED_COLUMNS,
    VIDEO,
    Encoding,
    ShardKind,
    encoding_of,
)
from sgmd_core.errors import DataError

_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class OpenShard:
    """A shard whose footer could be read."""

    shard: Shard
    kind: ShardKind
    encoding: Encoding | None
    columns: ColumnMap
    stored: tuple[str, ...]


@dataclass(slots=True)
class OpenedSet:
    """All shards as scanned; those with rows that can be used; and those that cannot."""

    url: str
    names: ColumnNames
    listed: list[ScannedShard] = field(default_factory=list)
    shards: list[OpenShard] = field(default_factory=list)
    unreadable: list[Rejection] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    is_settled: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of the shards that can be opened."""
        return sum(each.shard.num_rows for each in self.shards)

    @property
    def num_unread(self) -> int:
        """Rows of the shards that cannot be opened: each counts as many as the others have."""
        per_shard = max(1, round(self.num_rows / len(self.shards))) if self.shards else 1
        return per_shard * len(self.unreadable)

    def take(self, some: Sequence[ScannedShard]) -> None:
        """Sorts shards that have bytes; the first of them settle the names of the columns.

        Raises:
            DataError: A column that the caller names is in none of the first shards.
        """
        if not self.is_settled:
            first = [
                each.footer.schema for each in some[:SETTLING_SHARDS] if each.footer is not None
            ]
            require_named(self.url, first, self.names)
            settled = settle_names(first, self.names)
            if isinstance(settled, Fault):
                setting = self.names.setting_of(CAPTION)
                self.problems.append(f"{settled.reason}, in different shards; see {setting}")
            else:
                self.names = settled
            self.is_settled = True
        for each in some:
            if each.footer is None:
                self.unreadable.append(_unreadable(each.shard, each.fault))
            elif not each.is_empty:
                found = _open(each.shard, each.footer, self.names)
                if isinstance(found, Rejection):
                    self.unreadable.append(found)
                else:
                    self.shards.append(found)


def open_all_shards(
    filesystem: AbstractFileSystem,
    root: str,
    only: str,
    names: ColumnNames,
    on_progress: Callable[[str, int, int], None],
) -> OpenedSet:
    """Reads the footer of every shard of a folder.

    Args:
        filesystem: The folder's file system.
        root: The folder's path in it.
        only: The one file that is the set; empty: the whole folder.
        names: Names of the set's columns.
        on_progress: Called with (what, done, in all).

    Raises:
        DataError: The folder cannot be read, or a column that the caller names is in no shard.
    """
    opened = OpenedSet(filesystem.unstrip_protocol(root), names)
    waiting: list[ScannedShard] = []
    for scanned in scan_folder(filesystem, root, only=only):
        # Thousands of footers would take more memory than all else.
        opened.listed.append(replace(scanned, footer=None))
        if scanned.shard.num_bytes:
            waiting.append(scanned)
        if len(waiting) == _AT_ONCE:
            opened.take(waiting)
            waiting = []
            on_progress("footers", len(opened.listed), len(opened.listed))
    opened.take(waiting)
    on_progress("footers", len(opened.listed), len(opened.listed))
    _require_rates(opened)
    return opened


def _open(shard: Shard, footer: Footer, names: ColumnNames) -> OpenShard | Rejection:
    kind = kind_of(footer.schema, names)
    wanted = (*REQUIRED_COLUMNS, *((VIDEO, FPS) if kind is ShardKind.VIDEO else ()))
    columns = map_columns(footer.schema, names, wanted)
    if isinstance(columns, Fault):
        hint = "" if CAPTION not in columns.reason else f"; see {names.setting_of(CAPTION)}"
        return _unreadable(shard, columns.reason + hint)
    encoding = None
    if kind in (ShardKind.ENCODED, ShardKind.TEXT):
        try:
            encoding = encoding_of(footer.schema)
        except DataError as error:
            return _unreadable(shard, error.found)
        if encoding is None:
            return _unreadable(shard, "latents without the metadata that say what they are")
    return OpenShard(shard, kind, encoding, columns, tuple(footer.schema.names))


def _unreadable(shard: Shard, detail: str) -> Rejection:
    return Rejection("", shard.path, None, Reason.UNREADABLE_SHARD, detail)


def _require_rates(opened: OpenedSet) -> None:
    """Sets shards of videos without rates apart, where others of the set have them."""
    videos = [each for each in opened.shards if each.kind is ShardKind.VIDEO]
    without = [each for each in videos if each.columns.stored.get(FPS) is None]
    if len(without) < len(videos):
        detail = f"missing column {FPS}, which other shards of the set have"
        opened.unreadable += [_unreadable(each.shard, detail) for each in without]
        opened.shards = [each for each in opened.shards if each not in without]
