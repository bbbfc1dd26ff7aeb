"""Rows that are not taken: one record and one schema of `quarantine.parquet`, of sets and of runs.

    source  row_group  row  sample_id  reason  detail  num_rows  iteration

An entry stands for one row. Without `row` it stands for a whole row group, and without `row_group`
too for a whole file. Runs alone fill in `iteration`. Files that earlier versions wrote are read as
well.
"""

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.shards.opening import read_parquet
from sgmd_core.errors import DataError

_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("row_group", pa.int32()),
        ("row", pa.int64()),
        ("sample_id", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("num_rows", pa.int64()),
        ("iteration", pa.int64()),
    ]
)
_MAX_DETAIL = 400

Place = tuple[str, int | None, int | None]
"""(source, row group, row)"""


class Reason(StrEnum):
    """Reasons why a clip is not taken, besides `ClipFault`'s of its pictures."""

    MISSING_VIDEO = "missing_video"
    UNSERVED = "unserved"
    CUT_SHORT = "cut_short"
    TOO_LARGE = "too_large"
    MISSING_CAPTION = "missing_caption"
    UNREADABLE_CAPTION = "unreadable_caption"
    EMPTY_CAPTION = "empty_caption"
    LONG_CAPTION = "long_caption"
    DUPLICATE_ID = "duplicate_id"
    BAD_MANIFEST_ROW = "bad_manifest_row"
    UNREADABLE_ARCHIVE = "unreadable_archive"
    DAMAGED_ARCHIVE = "damaged_archive"
    UNREADABLE_MEMBER = "unreadable_member"
    NO_ID = "no_id"
    UNREADABLE_SHARD = "unreadable_shard"
    UNREADABLE_ROWS = "unreadable_rows"
    BAD_ENCODING = "bad_encoding"
    WORKER_DIED = "worker_died"


@dataclass(frozen=True, slots=True)
class Rejection:
    """One row that is not taken, or a place whose rows are not.

    Attributes:
        sample_id: Its id; empty where it has none.
        source: The file that names it: a video, a tar or a manifest; a shard by its path within
            the data folder.
        row: Its place in that file, from 0, or in its row group where there is one; None where it
            is the whole file or row group.
        reason: One of `Reason` or `ClipFault`, or what keeps a shard from being read.
        detail: What was found, in words.
        row_group: Number within the shard; None for a whole file, and where rows are counted
            through the file.
        num_rows: Rows that it stands for; None if unknown.
    """

    sample_id: str
    source: str
    row: int | None
    reason: str
    detail: str = ""
    row_group: int | None = None
    num_rows: int | None = 1

    @property
    def group(self) -> str:
        """The tar, manifest, shard or folder that a user would repair as a whole."""
        return self.source if self.row is not None else self.source.rpartition("/")[0]

    @property
    def place(self) -> Place:
        """Key by which two rejections are the same."""
        return self.source, self.row_group, self.row

    @property
    def is_whole_file(self) -> bool:
        """True if it stands for a file of the source of which nothing can be read."""
        return self.row is None and self.reason in (
            Reason.UNREADABLE_ARCHIVE,
            Reason.UNREADABLE_SHARD,
        )

    @property
    def why(self) -> str:
        """Reason and detail as one text."""
        return join_reason(self.reason, self.detail)

    def in_words(self) -> str:
        """Place and reason of the rejection: `part-0.parquet, row 3: empty_caption`."""
        place = self.source if self.row is None else f"{self.source}, row {self.row}"
        return f"{place}: {self.why}"


def join_reason(reason: str, detail: str) -> str:
    """Reason and detail as one text; `split_reason` takes it apart."""
    return f"{reason} ({detail})" if detail else str(reason)


def split_reason(text: str) -> tuple[str, str]:
    """The reason and the detail of `join_reason`."""
    reason, _, detail = text.partition(" (")
    return (reason, detail[:-1]) if detail.endswith(")") else (text, "")


def to_parquet(rejections: Iterable[Rejection], iterations: Sequence[int] | None = None) -> bytes:
    """The bytes of a quarantine file.

    Args:
        rejections: Its entries.
        iterations: Of a run: when each was met.
    """
    found = [*rejections]
    rows = [
        {
            "source": each.source,
            "row_group": each.row_group,
            "row": each.row,
            "sample_id": each.sample_id,
            "reason": str(each.reason),
            "detail": each.detail[:_MAX_DETAIL],
            "num_rows": each.num_rows,
            "iteration": iteration,
        }
        for each, iteration in zip(found, iterations or [None] * len(found), strict=True)
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes) -> list[tuple[Rejection, int | None]]:
    """Reads what `to_parquet` wrote, now or in an earlier version: entries and their iterations.

    Raises:
        OSError: These are not such bytes.
        pyarrow.ArrowException: As above.
        KeyError: A column is missing.
    """
    rows = read_parquet(io.BytesIO(data)).to_pylist()
    return [(_entry_of(row), row.get("iteration")) for row in rows]


def _entry_of(row: Mapping[str, Any]) -> Rejection:
    if "detail" in row:
        reason, detail = row["reason"], row["detail"] or ""
    else:
        # Runs used to write both as one text.
        reason, detail = split_reason(row["reason"])
    return Rejection(
        row["sample_id"] or "",
        row["source"] if "source" in row else row["shard"],
        row["row"],
        reason,
        detail,
        row.get("row_group"),
        row.get("num_rows", 1),
    )


def counts_by_reason(rejections: Iterable[Rejection]) -> dict[str, int]:
    """Counts the rejections of each reason, the most frequent first."""
    return dict(Counter(str(rejection.reason) for rejection in rejections).most_common())


def examples_by_reason(rejections: Iterable[Rejection]) -> dict[str, str]:
    """The first rejection of each reason, in one line each."""
    first: dict[str, Rejection] = {}
    for rejection in rejections:
        first.setdefault(str(rejection.reason), rejection)
    return {reason: rejection.in_words() for reason, rejection in first.items()}


def too_many_bad(
    attempted: str,
    rejections: Sequence[Rejection],
    num_clips: int,
    max_bad_fraction: float,
    remedy: str,
) -> DataError:
    """The error for a set of which too large a share is bad.

    It names the reasons, the worst places and the first of the bad clips.

    Args:
        attempted: What the command was doing.
        rejections: The bad ones.
        num_clips: All that were looked at, the bad ones included.
        max_bad_fraction: The largest share that is accepted.
        remedy: What the user can do.
    """
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts_by_reason(rejections).items())
    worst = Counter(rejection.group for rejection in rejections).most_common(3)
    places = ", ".join(f"{group} ({n})" for group, n in worst)
    return DataError(
        attempted,
        f"{len(rejections)} of {num_clips} clips are bad: {reasons}. Most of them in {places};"
        f" the first: {rejections[0].in_words()}",
        f"at most {max_bad_fraction:.3g} of the clips to be bad",
        remedy,
    )
