"""Recognise the data of a run by content, wherever they lie.

    ids and captions of the first row groups -> digests, recorded when the run begins
    latents of the first one, where they are read
    recorded names, sizes, digests | the folder now -> what differs

Sizes of all shards that the run has listed are compared, and the rows of the first window. Another
shard of the same name and size further on is not noticed: that would cost reading all data.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute

from pipelines.data.shards.listing import sizes_of
from pipelines.data.shards.parquet import RowGroupReader
from pipelines.data.shards.schema import CAPTION, LATENTS, SAMPLE_ID
from pipelines.data.stream.plan import Cursor, RowGroup, Window
from pipelines.data.stream.source import Source
from pipelines.data.stream.window import GROUP, ROW, WHOLE_GROUP, read_window

# Arrow makes these functions while it is imported, where a type checker does not see them.
pc: Any = pyarrow.compute

_NAMED = 5
"""Shards that an error names, of those that differ alike."""


def digests(window: Window, table: pa.Table) -> list[dict[str, Any]]:
    """Digest ids and captions of each row group of a window that can be read.

    Args:
        window: What was read.
        table: All of its rows, as `read_window` returns them.

    Returns:
        For each row group its fields and `content`, as `data_differences` takes them.
    """
    found: list[dict[str, Any]] = []
    unreadable = table.filter(pc.equal(table.column(ROW), WHOLE_GROUP)).column(GROUP).to_pylist()
    for number, group in enumerate(window.groups):
        if number not in unreadable:
            rows = table.filter(pc.equal(table.column(GROUP), number)).sort_by(ROW)
            columns = rows.select([SAMPLE_ID, CAPTION]).to_pydict()
            content = hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:16]
            found.append({**asdict(group), "content": content})
    return found


def with_latents(source: Source, first: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Adds the digest of the first row group's latents to what `digests` returned.

    Another encoding of the same clips has the same ids, captions and sizes.

    Args:
        source: The folder.
        first: What `digests` returned.

    Raises:
        DataError: The server failed.
    """
    found = [dict(group) for group in first]
    if found:
        reader = source.reader_of(source.open())
        found[0]["latents"] = _latents_digest(source, reader, found[0])
    return found


def _latents_digest(source: Source, reader: RowGroupReader, group: Mapping[str, Any]) -> str:
    encoded = replace(source, columns=(LATENTS,), decode=None)
    table = read_window(reader, encoded, _window([group]))
    digest = hashlib.sha256()
    for chunk in table.sort_by(ROW).column(LATENTS).chunks:
        for latents in chunk:
            digest.update(latents.as_buffer() or b"")
    return digest.hexdigest()[:16]


def data_differences(
    source: Source, listed: Iterable[Mapping[str, Any]], first: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Every way in which a folder is not the one that a run began with, with both values.

    Shards that came since are none, and lost ones are left to the quarantine unless all are lost.

    Args:
        source: The folder now.
        listed: Lines of the run's catalogue: names and sizes.
        first: What `digests` returned when the run began.

    Raises:
        DataError: The server failed.
    """
    before = {group["shard"]: int(group["num_bytes"]) for group in first}
    before |= {path: size for line in listed for path, size, _ in line.get("shards", ())}
    place = source.open()
    now = sizes_of(place.filesystem, place.root, before)
    if before and not now:
        return [f"data.train has none of its {len(before)} shards, such as {min(before)}"]
    resized = [
        f"{path} in data.train has {now[path]} bytes, and had {before[path]}"
        for path in sorted(now)
        if now[path] != before[path]
    ]
    same = [group for group in first if now.get(group["shard"]) == group["num_bytes"]]
    reader = source.reader_of(place)
    return [*_shortened(resized), *_shortened(list(_rewritten(source, reader, same)))]


def captions_digest(captions: Sequence[str]) -> str:
    """Digest of some captions in their order."""
    return hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:16]


def _rewritten(
    source: Source, reader: RowGroupReader, first: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    if not first:
        return
    window = _window(first)
    plain = replace(source, columns=(), encoding=None, decode=None)
    now = digests(window, read_window(reader, plain, window))
    found = {(one["shard"], one["index"]): one["content"] for one in now}
    for one in first:
        content = found.get((one["shard"], one["index"]), one["content"])
        if content != one["content"]:
            yield (
                f"row group {one['index']} of {one['shard']} in data.train has ids and captions of "
                f'content "{content}", and had "{one["content"]}"'
            )

    for one in first:
        if "latents" in one and (now_is := _latents_digest(source, reader, one)) != one["latents"]:
            yield (
                f"row group {one['index']} of {one['shard']} in data.train has latents of content "
                f'"{now_is}", and had "{one["latents"]}"'
            )


def _window(groups: Sequence[Mapping[str, Any]]) -> Window:
    found = (RowGroup(g["shard"], g["num_bytes"], g["index"], g["num_rows"]) for g in groups)
    return Window(Cursor(), tuple(found), (0,))


def _shortened(found: Sequence[str]) -> list[str]:
    rest = len(found) - _NAMED
    return [*found[:_NAMED], *([f"{rest} more alike"] if rest > 0 else [])]
