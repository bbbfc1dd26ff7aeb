"""Report of `sgmd check`: counts and statistics, added up group by group."""

from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.data.checking.check_group import NUM_EXAMPLES, GroupFacts
from pipelines.data.clips.clip_decoding import ClipFacts
from pipelines.data.shards.rejection import Reason, Rejection
from pipelines.data.shards.seen import SeenIds

_QUANTILES = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Content of a folder.

    Attributes:
        folder: Its address.
        kind: captions, video, encoded or text (embeddings alone).
        num_shards: Parquet files, those without rows included.
        num_empty: Parquet files without rows or without a byte; nothing is wrong with them.
        others: Files that are not shards, in words; empty where there is none.
        columns: Stored names of the columns that are not named as ours, in words; empty where all
            are.
        num_rows: Rows that their footers promise.
        num_bytes: Size of the files.
        problems: What is wrong with the set as a whole.
        bad: Bad rows by reason.
        examples: The first bad rows in words.
        captions: Statistics: distinct ones, characters, tokens, how many are cut.
        decoded: Rows whose video or values were decoded.
        videos: Statistics of the decoded videos: sizes, rates, codecs, seconds, frames.
        encoding: How encoded values are stored, and which networks made them.
        max_bad_fraction: What was accepted.
        buckets: Clips of each size, of a set that has a folder for each; empty of others.
        unfinished: What is left to do, where the command that fills the folder has not come to its
            end; its rows are judged as they are.
    """

    folder: str
    kind: str
    num_shards: int
    num_empty: int
    others: str
    columns: str
    num_rows: int
    num_bytes: int
    problems: list[str]
    bad: dict[str, int]
    examples: list[str]
    captions: dict[str, Any]
    decoded: int
    videos: dict[str, Any]
    encoding: dict[str, Any] | None
    max_bad_fraction: float
    buckets: dict[str, int] = field(default_factory=dict)
    unfinished: str = ""

    @property
    def num_bad(self) -> int:
        """Bad rows."""
        return sum(self.bad.values())

    @property
    def is_usable(self) -> bool:
        """True without problems, if at most `max_bad_fraction` of the rows are bad, and not all."""
        few = self.num_bad <= self.max_bad_fraction * self.num_rows
        return not self.problems and self.num_bad < self.num_rows and few

    def to_json(self) -> dict[str, Any]:
        """The report's fields, with `usable` and `bad_rows`."""
        return {"usable": self.is_usable, "bad_rows": self.num_bad} | asdict(self)


class CheckTally:
    """Adds up what the row groups of a set hold.

    Args:
        text_length: Tokens that the model takes; None if tokens are not counted.

    Attributes:
        bad: Bad rows by their first reason.
        examples: The first of them.
        num_tried: Rows whose video or values were decoded.
    """

    def __init__(self, text_length: int | None) -> None:
        self.bad: Counter[str] = Counter()
        self.examples: list[Rejection] = []
        self.num_tried = 0
        self._text_length = text_length
        self._ids = SeenIds()
        self._captions = SeenIds()
        self._num_distinct = 0
        self._characters = array("i")
        self._tokens = array("i")
        self._seconds = array("d")
        self._frames = array("q")
        self._kinds: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, facts: GroupFacts) -> None:
        """Adds a row group; duplicates are found if groups come in the order of the set."""
        named = np.flatnonzero(facts.has_id)
        again = named[self._ids.add_digests(facts.ids[named])] + facts.first_row
        repeated = np.setdiff1d(again, facts.bad.rows)
        self.bad.update(facts.bad.reasons)
        if len(repeated):
            self.bad[str(Reason.DUPLICATE_ID)] += len(repeated)
        self._add_examples(facts, repeated)
        self._characters.frombytes(facts.characters.tobytes())
        self._tokens.frombytes(facts.tokens.tobytes())
        self._num_distinct += len(facts.captions) - len(self._captions.add_digests(facts.captions))
        self.num_tried += facts.num_tried
        for clip in facts.clips:
            self._add_clip(clip)

    def captions(self) -> dict[str, Any]:
        """Statistics of the captions."""
        found: dict[str, Any] = {
            "distinct": self._num_distinct,
            "characters": quantiles(self._characters),
        }
        if self._text_length is not None:
            found["tokens"] = quantiles(self._tokens)
            found["text_length"] = self._text_length
            found["cut"] = int((np.asarray(self._tokens) > self._text_length).sum())
        return found

    def videos(self) -> dict[str, Any]:
        """Statistics of the videos that could be decoded; nothing where there is none."""
        if not self._frames:
            return {}
        counts = {
            name: dict(found.most_common(NUM_EXAMPLES)) for name, found in self._kinds.items()
        }
        return {**counts, "seconds": quantiles(self._seconds), "frames": quantiles(self._frames)}

    def _add_examples(self, facts: GroupFacts, repeated: NDArray[np.int64]) -> None:
        detail = "an earlier row has the same id"
        repeats = (
            Rejection("", facts.shard, int(row), Reason.DUPLICATE_ID, detail)
            for row in repeated[:NUM_EXAMPLES]
        )
        found = sorted([*facts.bad.examples, *repeats], key=lambda each: each.row or 0)
        self.examples += found[: NUM_EXAMPLES - len(self.examples)]

    def _add_clip(self, clip: ClipFacts) -> None:
        self._kinds["sizes"][f"{clip.height}x{clip.width}"] += 1
        self._kinds["fps"][f"{clip.fps:.5g}"] += 1
        self._kinds["codecs"][clip.codec] += 1
        self._kinds["rates"]["steady" if clip.is_steady else "variable"] += 1
        self._kinds["sound"]["yes" if clip.has_audio else "no"] += 1
        self._seconds.append(clip.duration_s)
        self._frames.append(clip.num_frames)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Smallest, 5 %, median, 95 % and largest; nothing for no values."""
    if not len(values):
        return {}
    found = np.quantile(np.asarray(values, dtype=np.float64), list(_QUANTILES.values()))
    return {name: round(float(value), 3) for name, value in zip(_QUANTILES, found, strict=True)}
