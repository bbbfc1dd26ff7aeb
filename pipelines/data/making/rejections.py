"""Clips that are not taken, each with its place and its reason, and when there are too many."""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.shards.parquet import read_parquet
from sgmd_core.errors import DataError

_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
_MAX_DETAIL = 400


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
    NO_ID = "no_id"
    UNREADABLE_SHARD = "unreadable_shard"
    UNREADABLE_ROWS = "unreadable_rows"
    BAD_ENCODING = "bad_encoding"
    WORKER_DIED = "worker_died"


@dataclass(frozen=True, slots=True)
class Rejection:
    """One clip that is not taken, or a place where none could be found.

    Attributes:
        sample_id: Its id; empty where it has none.
        source: The file that names it: a video, a tar, a manifest or a shard.
        row: Its place in that file, from 0; None where the file is the clip.
        reason: One of `Reason` or `ClipFault`.
        detail: What was found, in words.
    """

    sample_id: str
    source: str
    row: int | None
    reason: str
    detail: str = ""

    @property
    def group(self) -> str:
        """The tar, manifest, shard or folder that a user would repair as a whole."""
        return self.source if self.row is not None else self.source.rpartition("/")[0]

    def in_words(self) -> str:
        """One line."""
        place = self.source if self.row is None else f"{self.source}, row {self.row}"
        return f"{place}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def to_parquet(rejections: Iterable[Rejection]) -> bytes:
    """The quarantine file."""
    rows = [
        asdict(rejection)
        | {"reason": str(rejection.reason), "detail": rejection.detail[:_MAX_DETAIL]}
        for rejection in rejections
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes) -> list[Rejection]:
    """Reads what `to_parquet` wrote."""
    return [Rejection(**row) for row in read_parquet(io.BytesIO(data)).to_pylist()]


def counts_by_reason(rejections: Iterable[Rejection]) -> dict[str, int]:
    """Counts the rejections of each reason, the most frequent first."""
    return dict(Counter(str(rejection.reason) for rejection in rejections).most_common())


def examples_by_reason(rejections: Iterable[Rejection]) -> dict[str, str]:
    """The first rejection of each reason, in one line each."""
    first: dict[str, Rejection] = {}
    for rejection in rejections:
        first.setdefault(str(rejection.reason), rejection)
    return {reason: rejection.in_words() for reason, rejection in first.items()}


def require_few(
    attempted: str,
    rejections: Sequence[Rejection],
    num_clips: int,
    max_bad_fraction: float,
    remedy: str,
) -> None:
    """Stops where too large a share of all clips is bad.

    Args:
        attempted: What the command was doing.
        rejections: The bad ones.
        num_clips: All that were looked at, the bad ones included.
        max_bad_fraction: The largest share that is accepted.
        remedy: What the user can do.

    Raises:
        DataError: names the reasons, the worst places and the first of the bad clips.
    """
    if len(rejections) <= max_bad_fraction * num_clips:
        return
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts_by_reason(rejections).items())
    worst = Counter(rejection.group for rejection in rejections).most_common(3)
    places = ", ".join(f"{group} ({n})" for group, n in worst)
    raise DataError(
        attempted,
        f"{len(rejections)} of {num_clips} clips are bad: {reasons}. Most of them in {places};"
        f" the first: {rejections[0].in_words()}",
        f"at most {max_bad_fraction:.3g} of the clips to be bad",
        remedy,
    )
