"""`sgmd check`: is a folder of shards usable, and what does it hold.

    listing against the index -> footers -> row groups, in processes -> counts, statistics, verdict

A set is usable when it has rows, its shards agree with each other and with its index, and no more
than the accepted share of rows is bad.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from fsspec import AbstractFileSystem
from numpy.typing import NDArray

from pipelines.data.checking.check_group import GroupFacts, GroupTask, check_group, choose_rows
from pipelines.data.checking.check_report import NUM_EXAMPLES, CheckReport, CheckTally, CountTokens
from pipelines.data.clips.clip_format import ClipLimits
from pipelines.data.making.caption_file import shard_folder
from pipelines.data.making.ordered_pool import Died, map_in_order
from pipelines.data.making.rejections import Reason, Rejection, counts_by_reason
from pipelines.data.shards.filesystem import S3Settings, open_folder
from pipelines.data.shards.index import Shard, read_index
from pipelines.data.shards.indexing import index_folder
from pipelines.data.shards.listing import list_chapters
from pipelines.data.shards.parquet import Fault, Footer, read_footers
from pipelines.data.shards.schema import (
    FPS,
    REQUIRED_COLUMNS,
    VIDEO,
    Encoding,
    ShardKind,
    encoding_of,
    kind_of,
    missing_columns,
)
from sgmd_core.errors import DataError

_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """Depth of a check.

    Attributes:
        sample: Rows whose video or values are decoded; None decodes all. Ids and captions of all
            rows are always read.
        seed: Which rows those are.
        max_caption_chars: A longer caption is bad.
        limits: What a video may ask for.
        max_bad_fraction: The set is usable while no larger share of its rows is bad.
        count_tokens: Lengths of captions in tokens; None leaves them out.
        text_length: Tokens that the model takes; the rest of a caption is cut.
        num_processes: Processes that read and decode; 0 works in this one, None takes all cores.
        write_index: Write the index anew, for the shards that are there.
    """

    sample: int | None = None
    seed: int = 0
    max_caption_chars: int = 4096
    limits: ClipLimits = field(default_factory=ClipLimits)
    max_bad_fraction: float = 0.01
    count_tokens: CountTokens | None = None
    text_length: int = 512
    num_processes: int | None = None
    write_index: bool = False


@dataclass(frozen=True, slots=True)
class _OpenShard:
    """A shard whose footer could be read."""

    shard: Shard
    kind: ShardKind
    encoding: Encoding | None


def check_shards(
    url: str,
    options: CheckOptions = CheckOptions(),
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> CheckReport:
    """Looks at every shard of a folder.

    Args:
        url: Local path or `s3://bucket/prefix` of a folder, or of a file of captions.
        options: How closely.
        on_progress: Called with (what, done, in all).

    Raises:
        DataError: the folder cannot be opened, or holds no shard.
    """
    folder = shard_folder(url)
    filesystem, root = open_folder(folder)
    listed, shards, unreadable = _open_all(filesystem, root, on_progress)
    if not listed:
        raise DataError(
            f"checking {url}",
            "no such folder, or no shard in it",
            "Parquet shards",
            "`sgmd prepare` makes some",
        )
    if options.write_index and not unreadable:
        index_folder(filesystem, root, [opened.shard for opened in shards])
    num_rows = sum(opened.shard.num_rows for opened in shards)
    chosen = choose_rows(num_rows, options.sample, options.seed)
    tasks = list(_tasks(folder, shards, chosen, options))
    processes = options.num_processes
    if processes is None:
        processes = len(os.sched_getaffinity(0))
    tally = CheckTally(options.count_tokens, options.text_length)
    for done, facts in enumerate(map_in_order(check_group, tasks, processes), start=1):
        tally.add(_nothing_read(facts) if isinstance(facts, Died) else facts)
        on_progress("row groups", done, len(tasks))

    # A shard that cannot be opened counts as many rows as the others have.
    per_shard = max(1, round(num_rows / len(shards))) if shards else 1
    bad = counts_by_reason(tally.rejections)
    if unreadable:
        bad[Reason.UNREADABLE_SHARD] = per_shard * len(unreadable)
    problems = _misfits(shards) + _index_problems(read_index(filesystem, root), listed, shards)
    encoding = shards[0].encoding if shards else None
    return CheckReport(
        folder=url,
        kind=shards[0].kind.value if shards else "",
        num_shards=len(listed),
        num_rows=num_rows + per_shard * len(unreadable),
        num_bytes=sum(shard.num_bytes for shard in listed),
        problems=problems if num_rows else [*problems, "no rows"],
        bad=bad,
        examples=[each.in_words() for each in [*unreadable, *tally.rejections][:NUM_EXAMPLES]],
        captions=tally.captions(),
        decoded=tally.num_tried,
        videos=tally.videos(),
        encoding=None if encoding is None else asdict(encoding),
        max_bad_fraction=options.max_bad_fraction,
    )


def _open_all(
    filesystem: AbstractFileSystem, root: str, on_progress: Callable[[str, int, int], None]
) -> tuple[list[Shard], list[_OpenShard], list[Rejection]]:
    """All shards as listed; those whose footer can be used; and those whose cannot."""
    listed: list[Shard] = []
    shards: list[_OpenShard] = []
    unreadable: list[Rejection] = []
    for chapter in list_chapters(filesystem, root, _AT_ONCE):
        # Spark writes parts of no byte; training leaves them out too.
        chapter = tuple(shard for shard in chapter if shard.num_bytes)
        listed += chapter
        files = [(f"{root}/{shard.path}", shard.num_bytes) for shard in chapter]
        footers = read_footers(filesystem, files, S3Settings())
        for shard, footer in zip(chapter, footers, strict=True):
            opened = _open(shard, footer)
            if isinstance(opened, Rejection):
                unreadable.append(opened)
            else:
                shards.append(opened)
        on_progress("footers", len(listed), len(listed))
    return listed, shards, unreadable


def _open(shard: Shard, footer: Footer | Fault) -> _OpenShard | Rejection:
    if isinstance(footer, Fault):
        return Rejection("", shard.path, None, Reason.UNREADABLE_SHARD, footer.reason)
    kind = kind_of(footer.schema)
    wanted = (*REQUIRED_COLUMNS, *((VIDEO, FPS) if kind is ShardKind.VIDEO else ()))
    missing = missing_columns(footer.schema, wanted)
    if missing:
        detail = f"no usable column {', '.join(missing)}"
        return Rejection("", shard.path, None, Reason.UNREADABLE_SHARD, detail)
    encoding = None
    if kind is ShardKind.ENCODED:
        try:
            encoding = encoding_of(footer.schema)
        except DataError as error:
            return Rejection("", shard.path, None, Reason.UNREADABLE_SHARD, error.found)
        if encoding is None:
            detail = "latents without the metadata that say what they are"
            return Rejection("", shard.path, None, Reason.UNREADABLE_SHARD, detail)
    return _OpenShard(Shard(shard.path, shard.num_bytes, footer.rows), kind, encoding)


def _misfits(shards: Sequence[_OpenShard]) -> list[str]:
    """Returns what keeps shards from being one set."""
    problems = []
    kinds = Counter(opened.kind.value for opened in shards)
    if len(kinds) > 1:
        words = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        problems.append(f"shards of several kinds: {words}")
    encodings = Counter(opened.encoding for opened in shards if opened.encoding is not None)
    if len(encodings) > 1:
        example = [next(o.shard.path for o in shards if o.encoding == e) for e in encodings]
        problems.append(f"{len(encodings)} different encodings, as in {' and '.join(example[:2])}")
    return problems


def _index_problems(
    index: Sequence[Shard] | None, listed: Sequence[Shard], shards: Sequence[_OpenShard]
) -> list[str]:
    """Returns where the index differs from the folder; readers trust the index."""
    if index is None:
        return []
    there = {shard.path: shard.num_bytes for shard in listed}
    rows = {opened.shard.path: opened.shard.rows for opened in shards}
    named = {shard.path for shard in index}
    gone = [shard.path for shard in index if shard.path not in there]
    extra = [path for path in there if path not in named]
    changed = [
        shard.path
        for shard in index
        if shard.path in there
        and (shard.num_bytes != there[shard.path] or shard.rows != rows.get(shard.path, shard.rows))
    ]
    return [
        f"{len(paths)} shards {words}, such as {paths[0]}; --write-index makes the index anew"
        for paths, words in (
            (gone, "of the index are not there"),
            (extra, "are not in the index"),
            (changed, "are not as the index has them"),
        )
        if paths
    ]


def _tasks(
    url: str, shards: Sequence[_OpenShard], chosen: NDArray[np.int64], options: CheckOptions
) -> Iterator[GroupTask]:
    first = 0
    for opened in shards:
        first_row = 0
        for index, num_rows in enumerate(opened.shard.rows or ()):
            start, stop = np.searchsorted(chosen, (first, first + num_rows))
            has_values = opened.kind is not ShardKind.CAPTIONS
            yield GroupTask(
                url=url,
                shard=opened.shard.path,
                num_bytes=opened.shard.num_bytes,
                index=index,
                first_row=first_row,
                num_rows=num_rows,
                kind=opened.kind,
                encoding=opened.encoding,
                tried=tuple(int(n) - first for n in chosen[start:stop]) if has_values else (),
                max_caption_chars=options.max_caption_chars,
                limits=options.limits,
            )
            first, first_row = first + num_rows, first_row + num_rows


def _nothing_read(died: Died[GroupTask]) -> GroupFacts:
    task = died.item
    detail = "the process that decoded these rows ended without a word"
    rejections = (
        Rejection("", task.shard, task.first_row + row, Reason.WORKER_DIED, detail)
        for row in range(task.num_rows)
    )
    return GroupFacts(task.shard, (), (), (), (), 0, tuple(rejections))
