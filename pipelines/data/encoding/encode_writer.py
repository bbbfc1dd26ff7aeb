"""Encoded rows come back from Ray and become shards: counted, and each part written once."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pipelines.data.encoding import encode_stages as stages
from pipelines.data.encoding.encode_plan import Part
from pipelines.data.making.journal import MIN_JUDGED, Journal
from pipelines.data.shards.rejection import Reason, Rejection
from pipelines.data.shards.schema import SAMPLE_ID, Encoding, encoded_schema
from pipelines.data.shards.seen import SeenIds
from pipelines.data.shards.shard_writing import ShardBuilder
from pipelines.data.stream.window_decoding import BUCKET
from sgmd_core.errors import DataError


class PartWriter:
    """Gathers encoded rows into parts, and writes each part when its last row has come.

    Args:
        journal: Where parts go.
        missing: Parts that are to be written.
        encodings: What the rows of each bucket are, by the folder within the set's that takes them.
        max_bad_fraction: How many bad clips are too many.
        attempted: Work that an error names.

    Attributes:
        num_waiting: Rows that have not come yet.
    """

    def __init__(
        self,
        journal: Journal,
        missing: Sequence[Part],
        encodings: Mapping[str, Encoding],
        max_bad_fraction: float,
        attempted: str,
    ) -> None:
        self._journal = journal
        self._schemas = {folder: encoded_schema(each) for folder, each in encodings.items()}
        self._folders = [*encodings]
        self._max_bad_fraction = max_bad_fraction
        self._attempted = attempted
        self._parts = {part.number: part for part in missing}
        self._open: dict[int, tuple[dict[str, ShardBuilder], list[Rejection]]] = {}
        self._seen = SeenIds(found.sample_id for found in journal.rejections)
        for sample_ids in journal.sample_ids():
            self._seen.add(sample_ids)
        self.num_waiting = sum(part.num_rows for part in missing)
        for part in missing:
            if not part.num_rows:
                reason = Reason.UNREADABLE_SHARD
                self._commit(part, [Rejection("", part.shard, None, reason, part.fault)])

    def take(self, line: Mapping[str, Any]) -> None:
        """One row, good or bad.

        Raises:
            DataError: the server failed where the row was read, or too many rows are bad.
        """
        if line[stages.REASON] == stages.SERVER_FAILED:
            raise DataError(*json.loads(line[stages.DETAIL]))
        part = self._parts[line[stages.PART]]
        builders, rejections = self._open.setdefault(part.number, ({}, []))
        rejection = self._rejection(part, line)
        if rejection is None:
            folder = self._folders[line[BUCKET]]
            schema = self._schemas[folder]
            builder = builders.setdefault(folder, ShardBuilder(schema))
            builder.add({name: line[name] for name in schema.names})
        else:
            rejections.append(rejection)
        self.num_waiting -= 1
        num_good = sum(builder.num_rows for builder in builders.values())
        if num_good + len(rejections) == part.num_rows:
            del self._open[part.number]
            self._commit(part, rejections, builders)
            if self._journal.num_judged >= MIN_JUDGED:
                self._judge()

    def close(self) -> None:
        """Makes sure that nothing was lost.

        Raises:
            DataError: rows did not come back, or too many are bad.
        """
        if self._parts:
            raise DataError(
                self._attempted,
                f"{self.num_waiting} rows of {len(self._parts)} parts did not come back from Ray",
                "every row once",
                "Run the command again: it goes on with these",
            )
        self._judge()

    def _rejection(self, part: Part, line: Mapping[str, Any]) -> Rejection | None:
        sample_id = line[SAMPLE_ID] or ""
        reason, detail = line[stages.REASON], line[stages.DETAIL]
        if sample_id and self._seen.add([sample_id]) and reason is None:
            reason, detail = Reason.DUPLICATE_ID, "an earlier row has the same id"
        if reason is None:
            return None
        return Rejection(sample_id, part.shard, line[stages.ROW], reason, detail)

    def _commit(
        self,
        part: Part,
        rejections: Sequence[Rejection],
        builders: Mapping[str, ShardBuilder] = MappingProxyType({}),
    ) -> None:
        self._journal.commit(part.name, builders, rejections)
        del self._parts[part.number]

    def _judge(self) -> None:
        self._journal.require_few_bad(
            self._attempted,
            self._max_bad_fraction,
            "Raise --max-bad-fraction, or repair the source and encode it into another folder",
        )
