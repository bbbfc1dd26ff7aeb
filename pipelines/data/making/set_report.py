"""Reports of the commands that fill a folder with shards."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.data.making.journal import Journal
from pipelines.data.shards.rejection import counts_by_reason, examples_by_reason


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
        seconds: Duration of this run.
    """

    folder: str
    num_clips: int
    num_new: int
    num_shards: int
    num_bytes: int
    rejected: dict[str, int]
    examples: dict[str, str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Names and values as the command prints them."""
        return {
            "folder": self.folder,
            "clips": self.num_clips,
            "new_clips": self.num_new,
            "shards": self.num_shards,
            "bytes": self.num_bytes,
            "rejected": self.rejected,
            "seconds": self.seconds,
        }

    def notes(self) -> Sequence[str]:
        """A line for each kind of what is not in the set."""
        return [
            f"not taken, {reason}: {count}, such as {self.examples[reason]}"
            for reason, count in self.rejected.items()
        ]


def set_facts(folder: str, journal: Journal, num_before: int, started: float) -> dict[str, Any]:
    """The fields of a `SetReport`.

    Args:
        folder: Address of the set.
        journal: What it holds.
        num_before: Clips that it held when the command began.
        started: `time.monotonic()` at that moment.
    """
    shards = journal.shards.values()
    num_clips = sum(shard.num_rows for shard in shards)
    return {
        "folder": folder,
        "num_clips": num_clips,
        "num_new": num_clips - num_before,
        "num_shards": len(shards),
        "num_bytes": sum(shard.num_bytes for shard in shards),
        "rejected": counts_by_reason(journal.rejections),
        "examples": examples_by_reason(journal.rejections),
        "seconds": time.monotonic() - started,
    }
