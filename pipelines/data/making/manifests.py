"""Clips that a manifest names, and captions of a file without videos.

rows of the file -> SourceClip, or the rejection of a row that names none
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

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
from pipelines.data.shards.columns import competing_captions, nearest_column
from pipelines.data.shards.rejection import Reason, Rejection
from pipelines.data.shards.schema import CAPTION, SAMPLE_ID
from sgmd_core.errors import DataError

_BAD_CAPTION = Reason.UNREADABLE_CAPTION
_SHOWN_CHARS = 400
_OTHERS = ";|\t,"  # what stands between the fields of other programs' tables
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
    """Columns of a manifest, the one that has its captions, and its rows."""

    names: Sequence[str]
    caption: str
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
        header, rows = parquet_rows(file, lambda names: _wanted(names, columns))
    else:
        lines = manifest_lines(file, address)
        header, rows = csv_header_and_rows(lines, address, "\t" if suffix == ".tsv" else ",")
    return _Manifest(header, _require_columns(header, address, columns), rows)


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
    named = (columns.path, columns.sample_id, columns.caption)
    missing = [name for name in named if name is not None and name not in found]
    if columns.caption is None and not competing_captions(found):
        missing.append(" or ".join(columns.captions))
    if found and missing:
        raise _missing_columns(found, missing, address, columns)
    names = _caption_columns(found, columns)
    if len(names) > 1:
        # A row that has several of them costs only itself where the others agree.
        alone = [each for row in keys if len(each := competing_captions(row)) == 1]
        names = list(dict.fromkeys(itertools.chain.from_iterable(alone))) or names
    _require_one_caption(names, address, columns)
    return _Manifest(found, (names or columns.captions)[0], itertools.chain(first, waiting))


def _wanted(names: Sequence[str], columns: Columns) -> list[str]:
    """The columns of a table that say something about a clip."""
    others = (columns.path, columns.sample_id or SAMPLE_ID)
    return [name for name in names if name in (*_caption_columns(names, columns), *others)]


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


def _require_columns(found: Sequence[str], address: str, columns: Columns) -> str:
    """Name of the captions' column of a table that has all columns that are needed."""
    captions = _caption_columns(found, columns)
    _refuse_twice(found, (*captions, columns.path, columns.sample_id or SAMPLE_ID), address)
    _require_one_caption(captions, address, columns)
    wanted = (columns.path, columns.sample_id)
    missing = [name for name in wanted if name is not None and name not in found]
    if not captions:
        missing.append(" or ".join(columns.captions))
    if missing:
        raise _missing_columns(found, missing, address, columns)
    return captions[0]


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
    found: Sequence[str], missing: Sequence[str], address: str, columns: Columns
) -> DataError:
    if columns.path is None:
        expected = f"a column {' or '.join(columns.captions)}"
        named = f"Name the column with {columns.caption_setting}" if columns.caption_setting else ""
        remedy = named or "Rename the column"
    else:
        expected = "a path and a caption in each row"
        remedy = (
            "Name them with --path-column, --caption-column and --id-column; captions without"
            " videos are taken with --captions-only"
        )
    near = [f"{one} for {name}" for name in missing if (one := nearest_column(name, found))]
    remedy = f"{remedy}. Nearest: {printable(', '.join(near))}" if near else remedy
    if (kind := PurePosixPath(address).suffix.lower()) in (".csv", ".tsv"):
        expected += f", in a {kind} whose first line names the columns"
        used = "," if kind == ".csv" else "a tab"
        if len(found) == 1 and (other := next((each for each in _OTHERS if each in found[0]), "")):
            shown = "tabs" if other == "\t" else repr(other)
            remedy = f"Save it with {used} between the fields: these are separated by {shown}"
    return DataError(
        f"reading {address}",
        f"the columns {printable(', '.join(found))[:_SHOWN_CHARS]}; no {', '.join(missing)}",
        expected,
        remedy,
    )


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
