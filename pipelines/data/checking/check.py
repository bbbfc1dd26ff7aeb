"""`sgmd check`: is a folder of shards usable, and what does it hold.

    listing against the index -> footers -> row groups, in processes -> counts, statistics, verdict

A set is usable when it has rows, its shards agree with each other and with its index, and no more
than the accepted share of rows is bad.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath

import numpy as np
from fsspec import AbstractFileSystem
from numpy.typing import NDArray

from pipelines.data.checking.check_group import (
    NUM_EXAMPLES,
    CountTokens,
    GroupFacts,
    GroupTask,
    check_group,
    check_group_apart,
    choose_rows,
    nothing_read,
)
from pipelines.data.checking.check_report import CheckReport, CheckTally
from pipelines.data.checking.opened_set import OpenedSet, OpenShard, open_all_shards
from pipelines.data.clips.clip_format import ClipLimits
from pipelines.data.clips.guarded_process import Died, GuardedProcess
from pipelines.data.clips.hang_guard import MAX_HANG_S
from pipelines.data.making.caption_file import (
    caption_file_in_words,
    locate_set,
    no_shards,
    open_set,
)
from pipelines.data.making.ordered_pool import map_in_order
from pipelines.data.shards.columns import (
    ColumnNames,
)
from pipelines.data.shards.filesystem import data_errors, open_folder
from pipelines.data.shards.index import Shard, read_index, unfinished_in_words, write_index
from pipelines.data.shards.listing import other_files
from pipelines.data.shards.rejection import Reason, Rejection
from pipelines.data.shards.schema import (
    Encoding,
    ShardKind,
)
from pipelines.data.shards.stored_buckets import read_buckets
from sgmd_core.errors import DataError


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
        max_hang_s: Time that one call of the decoder may take in such a process.
        write_index: Rewrite the index, for the shards that are there.
        names: Names of the set's columns.
    """

    sample: int | None = None
    seed: int = 0
    max_caption_chars: int = 4096
    limits: ClipLimits = field(default_factory=ClipLimits)
    max_bad_fraction: float = 0.01
    count_tokens: CountTokens | None = None
    text_length: int = 512
    num_processes: int | None = None
    max_hang_s: float = MAX_HANG_S
    write_index: bool = False
    names: ColumnNames = ColumnNames()


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
        DataError: the folder cannot be opened, holds no shard, or lacks a column that is named.
    """
    folder, only = locate_set(url, names=options.names)
    columns = caption_file_in_words(url, options.names)
    place = open_set(url, names=options.names)
    filesystem, root = place.filesystem, place.root
    opened = open_all_shards(filesystem, root, only, place.names, on_progress)
    shards = opened.shards
    if not opened.listed:
        raise no_shards(f"checking {url}", filesystem, root, only)
    unwritten = _write_index(filesystem, root, only, opened) if options.write_index else []
    num_rows = opened.num_rows
    chosen = choose_rows(num_rows, options.sample, options.seed)
    options = replace(options, names=opened.names)
    tasks = list(_tasks(folder, shards, chosen, options))
    tally = _tally(tasks, options, on_progress)

    bad = tally.bad
    if opened.unreadable:
        bad[str(Reason.UNREADABLE_SHARD)] = opened.num_unread
    index = None if only else read_index(filesystem, root)
    buckets = () if only else read_buckets(filesystem, root)
    misfits = _misfits(shards, {each.folder for each in buckets})
    problems = opened.problems + unwritten + misfits + _index_problems(index, opened)
    encoding = shards[0].encoding if shards else None
    # Of a file of captions, rows and size are reported as the caller has them, not by its shards.
    is_made = folder != url and not only
    return CheckReport(
        folder=url,
        kind=shards[0].kind.value if shards else "",
        num_shards=len(opened.listed),
        num_empty=sum(each.is_empty for each in opened.listed),
        others="" if only else _others_in_words(filesystem, root),
        columns=columns or _columns_in_words(shards),
        num_rows=num_rows + opened.num_unread,
        num_bytes=_num_bytes(url, opened, is_made=is_made),
        problems=problems if num_rows else [*problems, _no_rows(opened)],
        bad=dict(bad.most_common()),
        examples=_examples(url, opened, tally, is_made=is_made),
        captions=tally.captions(),
        decoded=tally.num_tried,
        videos=tally.videos(),
        encoding=None if encoding is None else asdict(encoding),
        max_bad_fraction=options.max_bad_fraction,
        buckets={each.folder: each.num_rows for each in buckets},
        unfinished="" if only else unfinished_in_words(filesystem, root),
    )


def _tally(
    tasks: Sequence[GroupTask], options: CheckOptions, on_progress: Callable[[str, int, int], None]
) -> CheckTally:
    """Looks at row groups, in processes of their own."""
    tally = CheckTally(None if options.count_tokens is None else options.text_length)
    found = map_in_order(check_group, tasks, options.num_processes, options.max_hang_s)
    for done, facts in enumerate(found, start=1):
        if isinstance(facts, Died):
            facts = _checked_apart(facts.item, options.max_hang_s)
        tally.add(facts)
        on_progress("row groups", done, len(tasks))
    return tally


def _examples(url: str, opened: OpenedSet, tally: CheckTally, *, is_made: bool) -> list[str]:
    """The first rejections in words; those of a file of captions by their rows in it."""
    found = [*opened.unreadable, *tally.examples][:NUM_EXAMPLES]
    if is_made:
        found = [_in_file(each, url, opened.shards) for each in found]
    return [each.in_words() for each in found]


def _in_file(rejection: Rejection, url: str, shards: Sequence[OpenShard]) -> Rejection:
    """A row by its place in the file of captions that the caller has, not in a shard made of it."""
    before = itertools.takewhile(lambda each: each.shard.path != rejection.source, shards)
    first = sum(each.shard.num_rows for each in before)
    row = None if rejection.row is None else first + rejection.row
    return replace(rejection, source=PurePosixPath(url).name, row=row)


def _num_bytes(url: str, opened: OpenedSet, *, is_made: bool) -> int:
    """Size of the files that the caller has: of a file of captions its own, not its shards'."""
    if is_made:
        filesystem, path = open_folder(url, probe=False)
        with data_errors(f"reading {url}"):
            return int(filesystem.info(path)["size"])
    return sum(each.shard.num_bytes for each in opened.listed)


def _no_rows(opened: OpenedSet) -> str:
    if not opened.unreadable:
        return "no rows"
    return f"no row can be read: {len(opened.unreadable)} of {len(opened.listed)} shards are bad"


def _others_in_words(filesystem: AbstractFileSystem, root: str) -> str:
    """Files of the folder that are not read."""
    paths = other_files(filesystem, root)
    if (first := next(paths, None)) is None:
        return ""
    return (
        f"{1 + sum(1 for _ in paths)} files that are not .parquet and are not read, such as {first}"
    )


def _columns_in_words(shards: Sequence[OpenShard]) -> str:
    """Names the columns that were taken for ours; with counts, where shards differ."""
    plain = (ShardKind.CAPTIONS, ShardKind.VIDEO)
    counts = Counter(
        each.columns.in_full(each.stored) if each.kind in plain else each.columns.in_words()
        for each in shards
    )
    if len(counts) < 2:
        return "".join(counts)
    return " | ".join(
        f"{number} shards: {words or 'as sgmd names them'}" for words, number in counts.items()
    )


def _write_index(
    filesystem: AbstractFileSystem, root: str, only: str, opened: OpenedSet
) -> list[str]:
    """Writes the index for the shards that are there; says why not, where one is unusable.

    Raises:
        DataError: the set is one file, or a shard of it cannot be opened.
    """
    attempted = f"writing the index of {filesystem.unstrip_protocol(root)}"
    if only:
        raise DataError(
            attempted, f"{only}, a single file", "a folder of shards", "Leave --write-index out"
        )
    if opened.unreadable:
        count, first = len(opened.unreadable), opened.unreadable[0].source
        return [f"the index was not written: {count} shards cannot be used, such as {first}"]
    write_index(filesystem, root, [each.shard for each in opened.listed])
    return []


def _misfits(shards: Sequence[OpenShard], folders: Collection[str] = ()) -> list[str]:
    """Returns what keeps shards from being one set, or one of a size in each of some folders."""
    problems = []
    kinds = Counter(opened.kind.value for opened in shards)
    if len(kinds) > 1:
        words = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        problems.append(f"shards of several kinds: {words}")
    by_size: dict[str, dict[Encoding, str]] = {}
    for each in shards:
        if each.encoding is not None:
            folder = each.shard.path.partition("/")[0]
            found = by_size.setdefault(folder if folder in folders else "", {})
            found.setdefault(each.encoding, each.shard.path)
    worst = max(by_size.values(), key=len, default={})
    if len(worst) == 1:
        # Sizes differ in their shapes alone.
        each_once = (pair for found in by_size.values() for pair in found.items())
        worst = {replace(encoding, latent_shape=()): path for encoding, path in each_once}
    if len(worst) > 1:
        example = " and ".join([*worst.values()][:2])
        problems.append(f"{len(worst)} different encodings, as in {example}")
    return problems


def _index_problems(index: Sequence[Shard] | None, opened: OpenedSet) -> list[str]:
    """Returns where the index differs from the folder; readers trust the index."""
    if index is None:
        return []
    there = {each.shard.path: each.shard for each in opened.listed}
    named = {shard.path for shard in index}
    gone = [shard.path for shard in index if shard.path not in there]
    # A part without rows that the index leaves out is not missed.
    extra = [
        each.shard.path
        for each in opened.listed
        if each.shard.path not in named and not each.is_empty
    ]
    changed = [
        shard.path
        for shard in index
        if shard.path in there
        and (
            shard.num_bytes != there[shard.path].num_bytes
            or there[shard.path].rows not in (None, shard.rows)
        )
    ]
    return [
        f"{len(paths)} shards {words}, such as {paths[0]}; --write-index rewrites the index"
        for paths, words in (
            (gone, "of the index are not there"),
            (extra, "are not in the index"),
            (changed, "are not as the index has them"),
        )
        if paths
    ]


def _tasks(
    url: str, shards: Sequence[OpenShard], chosen: NDArray[np.int64], options: CheckOptions
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
                tried=chosen[start:stop] - first if has_values else chosen[:0],
                max_caption_chars=options.max_caption_chars,
                limits=options.limits,
                names=options.names,
                count_tokens=options.count_tokens,
            )
            first, first_row = first + num_rows, first_row + num_rows


def _checked_apart(task: GroupTask, max_hang_s: float) -> GroupFacts:
    """Checks a row group that has ended a process twice, at the cost of the rows that did it.

    All of it is lost only where it was not the decoder.
    """
    with closing(GuardedProcess(max_hang_s=0, tries=1)) as process:
        found = process.apply(check_group_apart, task, max_hang_s)
    if isinstance(found, Died):
        return nothing_read(task, found.reason, found.in_words)
    return found
