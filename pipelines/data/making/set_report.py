"""Reports of the commands that fill a folder with shards."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pipelines.data.making.journal import Journal
from pipelines.data.shards.rejection import Reason, counts_by_reason, examples_by_reason

_MISSING = {
    Reason.UNREADABLE_ARCHIVE: "tars of which nothing can be read",
    Reason.UNREADABLE_SHARD: "shards of which nothing can be read",
    Reason.DAMAGED_ARCHIVE: "tars of which the rest cannot be read",
}
"""Rejections that stand for an unknown number of clips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReport:
    """Content of a folder of shards at the end of a command.

    Attributes:
        folder: Its address.
        num_clips: Clips in the set.
        num_new: How many of them this run added.
        num_shards: Shards.
        num_bytes: Their size.
        rejected: Clips that were not taken, by reason.
        examples: The first rejection of each reason, in one line each.
        unread: Tars or shards of the source of which nothing could be read: the set lacks all
            their clips.
        seconds: Duration of this run.
    """

    folder: str
    num_clips: int
    num_new: int
    num_shards: int
    num_bytes: int
    rejected: dict[str, int]
    examples: dict[str, str]
    unread: Sequence[str]
    seconds: float

    REPAIR: ClassVar[str] = "repair or remove them, and run it again with --retry-bad"
    """Remedy for clips that are missing."""

    def to_json(self) -> dict[str, Any]:
        """Names and values as the command prints them."""
        return {
            "folder": self.folder,
            "clips": self.num_clips,
            "new_clips": self.num_new,
            "shards": self.num_shards,
            "bytes": self.num_bytes,
            "rejected": self.rejected,
            "unread": [*self.unread],
            "seconds": self.seconds,
        }

    def notes(self) -> Sequence[str]:
        """A line for each kind of what is not in the set."""
        return [
            f"{self._kind_of(reason)}: {count}, such as {self.examples[reason]}"
            for reason, count in self.rejected.items()
        ]

    def _kind_of(self, reason: str) -> str:
        for missing, words in _MISSING.items():
            if reason == missing:
                return f"clips are missing, {words} ({self.REPAIR})"
        return f"not taken, {reason}"


def set_facts(folder: str, journal: Journal, num_before: int, started: float) -> dict[str, Any]:
    """The fields of a `SetReport`.

    Args:
        folder: Address of the set.
        journal: What it holds.
        num_before: Clips that it held when the command began.
        started: `time.monotonic()` at that moment.
    """
    shards = journal.shards.values()
    return {
        "folder": folder,
        "num_clips": journal.num_good,
        "num_new": journal.num_good - num_before,
        "num_shards": len(shards),
        "num_bytes": sum(shard.num_bytes for shard in shards),
        "rejected": counts_by_reason(journal.rejections),
        "examples": examples_by_reason(journal.rejections),
        "unread": [each.in_words() for each in journal.rejections if each.is_whole_file],
        "seconds": time.monotonic() - started,
    }
