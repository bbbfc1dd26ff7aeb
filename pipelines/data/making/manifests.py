"""Clips that a manifest names, and captions of a file without videos.

rows of the file -> SourceClip, or the rejection of a row that names none
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
from fsspec import AbstractFileSystem

from cluster.redaction import printable
from pipelines.data.making.manifest_rows import (
    csv_header_and_rows,
    fault_of_text,
    json_file_rows,
    json_rows,
    manifest_lines,
    parquet_rows,
)
from pipelines.data.making.several_captions import list_fault, rows_by_clip
from pipelines.data.making.skipped import SkippedFiles
from pipelines.data.making.source_clip import (
    Columns,
    FileRange,
    SourceClip,
    address_of,
    open_reading,
)
from pipelines.data.shards.column_types import fits
from pipelines.data.shards.columns import competing_captions, nearest_column
from pipelines.data.shards.rejection import Reason, Rejection
from pipelines.data.shards.schema import CAPTION, SAMPLE_ID, VIDEO
from sgmd_core.errors import DataError

_BAD_CAPTION = Reason.UNREADABLE_CAPTION
_SHOWN_CHARS = 400
_NO_IDS = (type(None), bool, float, list, dict, bytes)
_SETTLING_ROWS = 64  # of a file without a header, whose keys are its columns


def manifest_clips(
    filesystem: AbstractFileSystem, path: str, columns: Columns, skipped: SkippedFiles
) -> Iterator[SourceClip | Rejection]:
    """The clips of a manifest; see `list_clips`."""
    if columns.several and columns.path is not None:
        return rows_by_clip(lambda: _row_clips(filesystem, path, columns), skipped)
    return _row_clips(filesystem, path, columns)


def _row_clips(
    filesystem: AbstractFileSystem, path: str, columns: Columns
) -> Iterator[SourceClip | Rejection]:
    """Each row of a manifest as a clip."""
    address = address_of(filesystem, path)
    with open_reading(filesystem, path) as file:
        ids = _CaptionIds()
        found = _manifest_rows(file, address, columns)
        columns = replace(columns, path=found.path)
        for number, row in enumerate(found.rows):
            yield _manifest_clip(filesystem, address, number, row, columns, found.caption, ids)


def columns_in_words(filesystem: AbstractFileSystem, path: str, columns: Columns) -> str:
    """One line that says which columns of a file of captions hold captions and ids.

    Args:
        filesystem: Where the file is.
        path: A file that ends in one of `MANIFEST_SUFFIXES`.
        columns: As in `list_clips`.

    Raises:
        DataError: See `list_clips`.
    """
    with open_reading(filesystem, path) as file:
        found = _manifest_rows(file, address_of(filesystem, path), columns)
    name = columns.sample_id or SAMPLE_ID
    ids = f"is column {name}" if name in found.names else f"is a digest of it (no column {name})"
    others = [each for each in dict.fromkeys(found.names) if each not in (found.caption, name)]
    left = f"; not read: {', '.join(others)}"[:_SHOWN_CHARS] if others else ""
    return printable(f"{CAPTION} is column {found.caption}; {SAMPLE_ID} {ids}{left}")


class _Manifest(NamedTuple):
    """Columns of a manifest, those that have its captions and its paths, and its rows."""

    names: Sequence[str]
    caption: str
    path: str | None
    rows: Iterator[dict[str, Any] | str]


def _manifest_rows(file: BinaryIO, address: str, columns: Columns) -> _Manifest:
    suffix = PurePosixPath(address).suffix.lower()
    if suffix == ".json":
        key = columns.path or columns.sample_id or SAMPLE_ID
        rows = json_file_rows(file, address, key, columns.captions)
        return _with_named_keys(rows, address, columns)
    if suffix in (".jsonl", ".ndjson"):
        rows = json_rows(manifest_lines(file, address), columns.captions[0])
        return _with_named_keys(rows, address, columns)
    if suffix == ".parquet":
        header, rows = parquet_rows(file, lambda schema: _wanted(schema, address, columns))
    else:
        usual = "\t" if suffix == ".tsv" else ","
        lines = manifest_lines(file, address)
        header, rows = csv_header_and_rows(
            lines, address, usual, lambda names: bool(_used(names, columns))
        )
    return _Manifest(header, *_require_columns(header, address, columns), rows)


def _with_named_keys(
    rows: Iterable[dict[str, Any] | str], address: str, columns: Columns
) -> _Manifest:
    """The keys, that of the captions, and the rows; the first rows settle the key for all of them.

    Raises:
        DataError: None of the first ones has a key that the caller names, or several keys may be
            that of the captions.
    """
    waiting = iter(rows)
    first = list(itertools.islice(waiting, _SETTLING_ROWS))
    keys = [[*row] for row in first if isinstance(row, dict)]
    found = list(dict.fromkeys(itertools.chain.from_iterable(keys)))
    paths = columns.paths_in(found)
    if found:
        _require_all(found, address, columns)
        _require_one_path(paths, address)
    names = _caption_columns(found, columns)
    if len(names) > 1:
        # A row that has several of them costs only itself where the others agree.
        alone = [each for row in keys if len(each := competing_captions(row)) == 1]
        names = list(dict.fromkeys(itertools.chain.from_iterable(alone))) or names
    _require_one_caption(names, address, columns)
    path = paths[0] if paths else columns.path
    return _Manifest(found, (names or columns.captions)[0], path, itertools.chain(first, waiting))


def _used(names: Sequence[str], columns: Columns) -> list[str]:
    """The columns of a table that say something about a clip."""
    ids = columns.sample_id or SAMPLE_ID
    used = (*_caption_columns(names, columns), *columns.paths_in(names), ids)
    return [name for name in names if name in used]


def _wanted(schema: pa.Schema, address: str, columns: Columns) -> list[str]:
    """The columns to read of a table.

    Raises:
        DataError: It holds videos where paths are wanted, as a set does.
    """
    paths = columns.paths_in(schema.names)
    videos = [
        field.name
        for field in schema
        if not pa.types.is_null(field.type)
        and fits(VIDEO, field.type)
        and (not paths or field.name in paths)
        and field.name not in (*columns.captions, columns.sample_id or SAMPLE_ID)
    ]
    if columns.path is not None and videos:
        video = VIDEO if VIDEO in videos else videos[0]
        option = "" if video == VIDEO else f" --video-column {video}"
        setting = "" if video == VIDEO else f" data.columns.video={video}"
        raise DataError(
            f"reading {address}",
            printable(f"videos in the table itself, column {video}: a set of shards already"),
            "a manifest with paths of videos",
            printable(
                f"Leave `sgmd prepare` out: give the file or its folder to"
                f" `sgmd check DATA{option}` and `sgmd encode DATA DST{option}`, or to a run"
                f" as data.train=DATA{setting}"
            ),
        )
    return _used(schema.names, columns)


def _caption_columns(names: Sequence[str], columns: Columns) -> list[str]:
    """Columns of which any may hold the captions."""
    if columns.caption is not None:
        return [columns.caption] if columns.caption in names else []
    return competing_captions(names)


def prompt_clips(filesystem: AbstractFileSystem, path: str) -> Iterator[SourceClip | Rejection]:
    """The lines of a text file that are not blank, as captions."""
    address = address_of(filesystem, path)
    names = _CaptionIds()
    with open_reading(filesystem, path) as file:
        for number, line in enumerate(manifest_lines(file, address)):
            text = line.strip()
            fault = fault_of_text(text)
            if fault is not None:
                yield Rejection("", address, number, _BAD_CAPTION, fault)
            elif text:
                yield SourceClip(names.next(text), address, number, None, text)


class _CaptionIds:
    """Ids of captions without a name: a hash of the text, and its number where it comes again.

    They stay the same when other lines are added to the file.
    """

    def __init__(self) -> None:
        self._counts: Counter[bytes] = Counter()

    def next(self, caption: str) -> str:
        """The id of the next clip with this caption."""
        digest = hashlib.blake2b(caption.encode(), digest_size=12)
        self._counts[digest.digest()] += 1
        count = self._counts[digest.digest()]
        return digest.hexdigest() if count == 1 else f"{digest.hexdigest()}-{count}"


def _require_columns(
    found: Sequence[str], address: str, columns: Columns
) -> tuple[str, str | None]:
    """Names of the captions and the paths of a table that has all columns that are needed."""
    captions, paths = _caption_columns(found, columns), columns.paths_in(found)
    _refuse_twice(found, (*captions, *paths, columns.sample_id or SAMPLE_ID), address)
    _require_one_caption(captions, address, columns)
    _require_one_path(paths, address)
    _require_all(found, address, columns)
    return captions[0], paths[0] if paths else None


def _require_all(found: Sequence[str], address: str, columns: Columns) -> None:
    """Refuses columns of which a needed one is missing."""
    missing: list[tuple[str, ...]] = []
    if columns.path is not None and not columns.paths_in(found):
        missing.append(columns.paths)
    if columns.sample_id is not None and columns.sample_id not in found:
        missing.append((columns.sample_id,))
    if not _caption_columns(found, columns):
        missing.append(columns.captions)
    if missing:
        raise _missing_columns(found, missing, address, columns)


def _require_one_path(paths: Sequence[str], address: str) -> None:
    if len(paths) > 1:
        raise DataError(
            f"reading {address}",
            printable(f"the columns {' and '.join(paths)}, each of which may be the path"),
            "one column of paths",
            "Name the one to take with --path-column",
        )


def _refuse_twice(found: Sequence[str], used: Sequence[str | None], address: str) -> None:
    """Refuses columns of one name, of which all but one would be lost."""
    if twice := [name for name in dict.fromkeys(used) if name and found.count(name) > 1]:
        raise DataError(
            f"reading {address}",
            printable(f"several columns of the name {' and of the name '.join(twice)}"),
            "one of each name",
            "Rename or remove the others",
        )


def _missing_columns(
    found: Sequence[str], missing: Sequence[Sequence[str]], address: str, columns: Columns
) -> DataError:
    if columns.path is None:
        expected = f"a column {_one_of(columns.captions)}"
        named = f"Name the column with {columns.caption_setting}" if columns.caption_setting else ""
        remedy = named or "Rename the column"
    else:
        expected = "a path and a caption in each row"
        remedy = (
            "Name them with --path-column, --caption-column and --id-column; captions without"
            " videos are taken with --captions-only"
        )
    names = [name for each in missing for name in each]
    near = {one: name for name in reversed(names) if (one := nearest_column(name, found))}
    if near:
        shown = ", ".join(f"{one} for {name}" for one, name in near.items())
        remedy = f"{remedy}. Nearest: {printable(shown)}"
    if (kind := PurePosixPath(address).suffix.lower()) in (".csv", ".tsv"):
        expected += f", in a {kind} whose first line names the columns"
        if not near and not _used(found, columns):
            usual = [*columns.paths[:1], columns.captions[0]]
            line = ("\\t" if kind == ".tsv" else ",").join(usual)
            remedy = f"If its first line is a row already, put a line such as {line} before it. "
            remedy += "Otherwise name the columns: " + ("--path-column, " * bool(columns.paths))
            remedy += columns.caption_setting or "rename the column of captions to caption"
    lacking = ", and no column ".join(_one_of(each) for each in missing)
    return DataError(
        f"reading {address}",
        f"the columns {printable(', '.join(found))[:_SHOWN_CHARS]}; no column {lacking}",
        expected,
        remedy,
    )


def _one_of(names: Sequence[str]) -> str:
    """Names in words: `caption, prompt or text`."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _require_one_caption(captions: Sequence[str], address: str, columns: Columns) -> None:
    if len(captions) > 1:
        raise DataError(
            f"reading {address}",
            printable(f"the columns {' and '.join(captions)}, each of which may be the caption"),
            "one column of captions",
            f"Name the one to take with {columns.caption_setting}"
            if columns.caption_setting
            else "Rename the one to take caption, or remove the other",
        )


def _manifest_clip(
    filesystem: AbstractFileSystem,
    address: str,
    number: int,
    row: dict[str, Any] | str,
    columns: Columns,
    caption_name: str,
    ids: _CaptionIds,
) -> SourceClip | Rejection:
    if isinstance(row, str):
        return Rejection("", address, number, Reason.BAD_MANIFEST_ROW, printable(row))
    caption = row.get(caption_name)
    names = _caption_columns([*row], columns)
    if caption_name != CAPTION and names not in ([], [caption_name]):
        detail = f"{' and '.join(names)} in a file whose captions are {caption_name}"
        return Rejection("", address, number, Reason.BAD_MANIFEST_ROW, printable(detail))
    if columns.several and isinstance(caption, list):
        caption = tuple(caption)
        fault = list_fault(caption)
    else:
        fault = None if caption is None else fault_of_text(caption)
    path = None if columns.path is None else row.get(columns.path)
    if columns.path is not None and (not isinstance(path, str) or not path.strip()):
        detail = f"{columns.path} = {str(path)[:80]!r}"
        return Rejection("", address, number, Reason.BAD_MANIFEST_ROW, detail)
    if columns.sample_id is not None:
        sample_id = row.get(columns.sample_id)
    else:
        sample_id = row.get(SAMPLE_ID) if path is None else path
    if columns.sample_id is None and sample_id is None:
        if fault is not None:
            return Rejection("", address, number, _BAD_CAPTION, fault)
        # A list is hashed as a whole, so its id does not depend on which caption is taken.
        text = json.dumps(caption, default=str) if isinstance(caption, tuple) else caption
        sample_id = ids.next(text or "")
    if isinstance(sample_id, _NO_IDS) or not str(sample_id):
        detail = f"{columns.sample_id or SAMPLE_ID} = {str(sample_id)[:80]!r}, which is not an id"
        return Rejection("", address, number, Reason.BAD_MANIFEST_ROW, detail)
    if fault is not None:
        return Rejection(printable(str(sample_id)), address, number, _BAD_CAPTION, fault)
    return SourceClip(
        sample_id=str(sample_id),
        source=address,
        row=number,
        video=None if path is None else FileRange(_resolved(filesystem, address, path)),
        caption=caption,
    )


def _resolved(filesystem: AbstractFileSystem, manifest: str, path: str) -> str:
    """The address of a video that a manifest names."""
    if "://" in path:
        return path
    if path.startswith("/"):
        return address_of(filesystem, path)
    return f"{manifest.rpartition('/')[0]}/{path}"
