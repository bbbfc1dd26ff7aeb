"""Order in which the rows of a folder come: a pure function of its listing and a seed.

    epoch     every row once
    chapter   a thousand shards, as listed; from the second epoch on in a seeded order
    section   some shards of a chapter's seeded order; their footers are read together
    window    some row groups of a section's seeded order; read together, their rows permuted

An index of the folder saves listing and footers, but changes nothing of the order. A cursor says
where in this order a run stands; going on from it costs one section's footers, however far in.
Without a seed everything comes as it is stored.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipelines.data.shards.index import Shard
from sgmd_core.errors import CheckpointError, ConfigError

# First number of each seed, so that no two kinds of draws share a stream.
_CHAPTERS, _SHARDS, _ROW_GROUPS, _ROWS = range(4)


@dataclass(frozen=True, slots=True)
class ShuffleSettings:
    """Quality of the shuffle, and its cost in memory and waiting.

    Attributes:
        chapter_shards: Shards of a chapter; the first batch waits until one is listed.
        shards: Shards of a section; their row groups are permuted together.
        row_groups: Row groups of a window, at most.
        window_mb: Size of a window on disk, at most; a larger row group stands alone.
    """

    chapter_shards: int = 1000
    shards: int = 16
    row_groups: int = 8
    window_mb: float = 64.0

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("chapter_shards", "shards", "row_groups", "window_mb"):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigError(
                    "reading the settings", f"data.shuffle.{name}: {value}", "above 0"
                )


@dataclass(frozen=True, slots=True, order=True)
class Cursor:
    """A place in the endless stream: the row that comes next.

    Attributes:
        epoch: Passes over the data before this one.
        chapter: Place in the epoch's order of chapters.
        section: Place in the chapter.
        window: Place in the section.
        row: Place in the window's order, counting rows that cannot be used.
    """

    epoch: int = 0
    chapter: int = 0
    section: int = 0
    window: int = 0
    row: int = 0

    def to_json(self) -> dict[str, int]:
        """As a checkpoint's manifest and metrics.jsonl hold it."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Any) -> Self:  # noqa: ANN401 - JSON can be anything
        """Reads what `to_json` made.

        Raises:
            CheckpointError: It is something else.
        """
        try:
            return cls(**{name: int(value) for name, value in stored.items()})
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                "reading a position in the data",
                repr(stored),
                "epoch, chapter, section, window and row",
                "This checkpoint was written by another version; start a new run",
            ) from error


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One readable unit of a shard.

    Attributes:
        shard: Path relative to the folder.
        num_bytes: Size of the whole shard.
        index: Number of the row group within the shard.
        num_rows: Rows it holds.
    """

    shard: str
    num_bytes: int
    index: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Window:
    """Row groups that are read together.

    Attributes:
        cursor: Where it begins; `row` is the first row that is still wanted.
        groups: What to read.
        seed: Seeds the order of the rows; empty: as they are stored.
        stop: The first row that is not wanted any more; None: all are.
    """

    cursor: Cursor
    groups: tuple[RowGroup, ...]
    seed: tuple[int, ...] = ()
    stop: int | None = None

    @property
    def num_rows(self) -> int:
        """Rows of all its row groups."""
        return sum(group.num_rows for group in self.groups)

    @property
    def num_wanted(self) -> int:
        """Rows of them that are wanted."""
        return (self.num_rows if self.stop is None else self.stop) - self.cursor.row

    def order(self) -> NDArray[np.int64]:
        """The permutation of the rows, counted through the row groups one after another."""
        return _order(self.seed, self.num_rows)


def chapter_order(seed: int | None, epoch: int, num_chapters: int) -> list[int]:
    """The chapters of an epoch from the second one on; the first one takes them as listed."""
    numbers = () if epoch == 0 else _numbers(_CHAPTERS, seed, epoch)
    return _order(numbers, num_chapters).tolist()


def sections_of(
    seed: int | None, epoch: int, chapter: int, shards: Sequence[Shard], size: int
) -> list[tuple[Shard, ...]]:
    """A chapter's shards in the epoch's order, cut into sections.

    Args:
        seed: The run's seed; None: as stored.
        epoch: Which pass.
        chapter: Number of the chapter as listed.
        shards: Its shards as listed.
        size: Shards of a section.
    """
    order = _order(_numbers(_SHARDS, seed, epoch, chapter), len(shards))
    shuffled = [shards[place] for place in order]
    return [tuple(shuffled[start : start + size]) for start in range(0, len(shuffled), size)]


def windows_of(
    seed: int | None,
    epoch: int,
    chapter: int,
    section: int,
    groups: Sequence[RowGroup],
    shuffle: ShuffleSettings,
) -> list[tuple[tuple[RowGroup, ...], tuple[int, ...]]]:
    """A section's row groups in the epoch's order, cut into windows.

    Args:
        seed: The run's seed; None: as stored.
        epoch: Which pass.
        chapter: Number of the chapter as listed.
        section: Place of the section in the chapter.
        groups: The row groups of its shards.
        shuffle: How large a window may be.

    Returns:
        Row groups and the seed of the row order, for each window.
    """
    numbers = (epoch, chapter, section)
    order = _order(_numbers(_ROW_GROUPS, seed, *numbers), len(groups))
    row_bytes = _bytes_per_row(groups)
    limit = shuffle.window_mb * 2**20
    windows: list[list[RowGroup]] = []
    room = 0.0
    for place in order:
        group = groups[place]
        size = group.num_rows * row_bytes[group.shard]
        if not windows or len(windows[-1]) == shuffle.row_groups or size > room:
            windows.append([])
            room = limit
        windows[-1].append(group)
        room -= size
    return [
        (tuple(window), _numbers(_ROWS, seed, *numbers, place))
        for place, window in enumerate(windows)
    ]


def _numbers(kind: int, seed: int | None, *place: int) -> tuple[int, ...]:
    """Numbers that seed a draw; none without a seed."""
    return () if seed is None else (kind, seed, *place)


def _order(numbers: tuple[int, ...], size: int) -> NDArray[np.int64]:
    """The permutation that some numbers seed; none of them: as it is."""
    return np.random.default_rng(numbers).permutation(size) if numbers else np.arange(size)


def _bytes_per_row(groups: Sequence[RowGroup]) -> dict[str, float]:
    rows: dict[str, int] = {}
    for group in groups:
        rows[group.shard] = rows.get(group.shard, 0) + group.num_rows
    return {group.shard: group.num_bytes / rows[group.shard] for group in groups}
