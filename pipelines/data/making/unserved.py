"""Clips that cannot be read, before it is known if the clip or the storage fails."""

from dataclasses import dataclass

from pipelines.data.making.source_clip import FileRange
from pipelines.data.shards.rejection import Reason, Rejection
from sgmd_core.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Unserved(Rejection):
    """A rejection that holds if other objects can be read; see `Witnesses`.

    Attributes:
        file: The object that cannot be read.
        error: What the storage said.
    """

    file: FileRange
    error: DataError


def unserved(
    sample_id: str,
    source: str,
    row: int | None,
    file: FileRange,
    error: DataError,
    reason: Reason = Reason.UNSERVED,
) -> Unserved:
    """The rejection of a clip, or of a tar, that cannot be read."""
    return Unserved(sample_id, source, row, reason, error.found, file=file, error=error)
