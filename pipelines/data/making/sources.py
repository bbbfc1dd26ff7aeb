"""Captioned videos as people keep them, listed one by one without reading a video.

    a folder      clip.mp4 beside clip.txt (the caption) or clip.json (a field of it), at any depth
    a tar         key.mp4 and key.txt or key.json in any order; also tars that lie in the folder
    a manifest    CSV or JSON lines, one clip a row: a path and a caption; or captions alone
    prompts       a .txt with one caption a line

A caption belongs to the video whose name is the same up to the last dot.

The order is fixed, and so are the sample ids: the file's path within the folder, the tar's path and
the key, or the path as the manifest has it (or a column of its own). They do not depend on where
the folder lies or on what else is in it.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipelines.data.making.manifest_rows import (
    csv_header_and_rows,
    fault_of_text,
    json_rows,
    manifest_lines,
    printable,
)
from pipelines.data.making.rejections import Reason, Rejection
from pipelines.data.making.tar_members import TarFault, read_members
from pipelines.data.shards.filesystem import open_folder, storage_errors
from sgmd_core.errors import DataError

VIDEO_SUFFIXES = frozenset(
    f".{name}"
    for name in ("mp4", "m4v", "mov", "3gp", "mkv", "webm", "avi", "mpg", "mpeg", "wmv", "flv")
)
PROMPTS_SUFFIX = ".txt"
_CAPTION_SUFFIXES = (".txt", ".json")
_MANIFEST_SUFFIXES = (".csv", ".jsonl", ".ndjson")
_BAD_CAPTION = Reason.UNREADABLE_CAPTION
_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# One request brings a tar's header and the short members that follow a video.
_BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes to be read: a whole file, or a part of it.

    Attributes:
        url: Address of the file.
        offset: First byte.
        num_bytes: How many; None is the whole file.
    """

    url: str
    offset: int = 0
    num_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class CaptionFile:
    """A caption in a file of its own.

    Attributes:
        file: Where it is.
        json_field: The field that holds it, in a JSON file; None in a text file.
    """

    file: FileRange
    json_field: str | None = None


@dataclass(frozen=True, slots=True)
class SourceClip:
    """One clip and where its parts are.

    Attributes:
        sample_id: Its lasting name.
        source: The file that names it: the video itself, a tar or a manifest.
        row: Its place in a tar or a manifest, from 0; None in a folder.
        video: The video's bytes; None where the source holds captions alone.
        caption: The caption, or where it is; None where there is none.
    """

    sample_id: str
    source: str
    row: int | None
    video: FileRange | None
    caption: str | CaptionFile | None


@dataclass(frozen=True, slots=True)
class Columns:
    """Names in manifests, and of the caption's field in JSON files.

    Attributes:
        path: Path of the video: relative to the manifest, absolute, or `s3://bucket/key`. None
            takes the captions alone.
        caption: The caption.
        sample_id: The id; None takes the path for it.
    """

    path: str | None = "path"
    caption: str = "caption"
    sample_id: str | None = None


def list_clips(url: str, columns: Columns = Columns()) -> Iterator[SourceClip | Rejection]:
    """Names every clip of a source, in a fixed order.

    Args:
        url: Folder, S3 prefix, `.tar` file, or manifest (`.csv`, `.jsonl`, `.ndjson`).
        columns: Names in manifests and JSON files.

    Yields:
        Clips, and rejections of rows and tars that name none.

    Raises:
        DataError: the source cannot be opened or listed, or a manifest has no such columns.
    """
    for clip in _listed(url, columns):
        fault = fault_of_text(clip.sample_id) or fault_of_text(clip.source)
        if fault is None:
            yield clip
            continue
        sample_id, source = printable(clip.sample_id), printable(clip.source)
        reason = clip.reason if isinstance(clip, Rejection) else Reason.NO_ID
        yield Rejection(sample_id, source, clip.row, reason, f"its name is {fault}")


def _listed(url: str, columns: Columns) -> Iterator[SourceClip | Rejection]:
    filesystem, root = open_folder(url)
    suffix = PurePosixPath(root).suffix
    if columns.path is None and suffix not in _MANIFEST_SUFFIXES:
        raise DataError(
            f"reading the captions of {url}",
            "no manifest",
            f"a file that ends in {', '.join(_MANIFEST_SUFFIXES)}",
            "Leave --captions-only out; a .txt of prompts does not need it",
        )
    if suffix == PROMPTS_SUFFIX:
        yield from _prompts(filesystem, root)
    elif suffix in _MANIFEST_SUFFIXES:
        yield from _manifest_clips(filesystem, root, columns)
    elif root.endswith(_PACKED_TARS):
        raise DataError(
            f"reading {url}",
            "a compressed tar, which can only be read from its beginning",
            "a plain .tar",
            "Decompress it; videos hardly get smaller anyway",
        )
    elif suffix == ".tar":
        yield from _tar_clips(filesystem, root, root.rpartition("/")[0], columns)
    else:
        yield from _folder_clips(filesystem, root, root, columns)


def _folder_clips(
    filesystem: AbstractFileSystem, root: str, folder: str, columns: Columns
) -> Iterator[SourceClip | Rejection]:
    """The clips and tars of a folder, then those of its sub-folders; one listing at a time."""
    with storage_errors(f"listing {folder}"):
        entries = {str(entry["name"]): entry for entry in filesystem.ls(folder, detail=True)}
        # What was listed is not needed again, and a large bucket would fill the memory.
        filesystem.invalidate_cache(folder)
    shown = {name: entry for name, entry in entries.items() if _name(name)[:1] not in ("", ".")}
    for path in sorted(shown):
        if shown[path]["type"] == "directory":
            continue
        if PurePosixPath(path).suffix == ".tar":
            yield from _tar_clips(filesystem, path, root, columns)
        elif path.endswith(_PACKED_TARS):
            name, detail = path.removeprefix(root).lstrip("/"), "a compressed tar: decompress it"
            address = _address(filesystem, path)
            yield Rejection(name, address, None, Reason.UNREADABLE_ARCHIVE, detail)
        elif PurePosixPath(path).suffix.lower() in VIDEO_SUFFIXES:
            address = _address(filesystem, path)
            yield SourceClip(
                sample_id=path.removeprefix(root).lstrip("/"),
                source=address,
                row=None,
                video=FileRange(address),
                caption=_sidecar(filesystem, path, shown, columns),
            )
    for path in sorted(shown):
        if shown[path]["type"] == "directory" and path.rstrip("/") != folder.rstrip("/"):
            yield from _folder_clips(filesystem, root, path, columns)


def _sidecar(
    filesystem: AbstractFileSystem, path: str, present: Mapping[str, Any], columns: Columns
) -> CaptionFile | None:
    for suffix in _CAPTION_SUFFIXES:
        beside = str(PurePosixPath(path).with_suffix(suffix))
        if beside in present:
            field = columns.caption if suffix == ".json" else None
            return CaptionFile(FileRange(_address(filesystem, beside)), field)
    return None


def _tar_clips(
    filesystem: AbstractFileSystem, path: str, root: str, columns: Columns
) -> Iterator[SourceClip | Rejection]:
    """The clips of a tar; only its headers are read."""
    address = _address(filesystem, path)
    name = path.removeprefix(root).lstrip("/")
    parts: dict[str, dict[str, FileRange]] = {}
    faults: list[TarFault] = []
    with _reading(filesystem, path) as file:
        for member in read_members(file):
            if isinstance(member, TarFault):
                faults.append(member)
            elif member.suffix in VIDEO_SUFFIXES or member.suffix in _CAPTION_SUFFIXES:
                files = parts.setdefault(member.key, {})
                files[member.suffix] = FileRange(address, member.offset, member.num_bytes)
    count = itertools.count()
    for key, files in parts.items():
        yield from _tar_clip(f"{name}/{key}", address, count, files, columns)
    for fault in faults:
        # A member that could be no part of a clip is nobody's loss.
        suffix = PurePosixPath(fault.name or "").suffix.lower()
        if fault.name is None or suffix in VIDEO_SUFFIXES or suffix in _CAPTION_SUFFIXES:
            sample_id = name if fault.name is None else f"{name}/{fault.name}"
            reason = Reason.UNREADABLE_ARCHIVE
            yield Rejection(sample_id, address, next(count), reason, fault.detail)


def _tar_clip(
    sample_id: str,
    address: str,
    count: Iterator[int],
    files: Mapping[str, FileRange],
    columns: Columns,
) -> Iterator[SourceClip | Rejection]:
    """A clip out of the members that share a name up to its last dot."""
    videos = [suffix for suffix in sorted(files) if suffix in VIDEO_SUFFIXES]
    caption = None
    if ".txt" in files:
        caption = CaptionFile(files[".txt"])
    elif ".json" in files:
        caption = CaptionFile(files[".json"], columns.caption)
    for suffix in videos[:1]:
        yield SourceClip(sample_id, address, next(count), files[suffix], caption)
    for suffix in videos[1:]:
        detail = f"a {suffix} beside the {videos[0]} of the same name, which is taken"
        yield Rejection(sample_id, address, next(count), Reason.DUPLICATE_ID, detail)


def _manifest_clips(
    filesystem: AbstractFileSystem, path: str, columns: Columns
) -> Iterator[SourceClip | Rejection]:
    address = _address(filesystem, path)
    with _reading(filesystem, path) as file:
        lines = manifest_lines(file, address)
        if path.endswith(".csv"):
            header, rows = csv_header_and_rows(lines, address)
            _require_columns(header, address, columns)
        else:
            rows = json_rows(lines)
        names = _CaptionIds()
        for number, row in enumerate(rows):
            yield _manifest_clip(filesystem, address, number, row, columns, names)


def _prompts(filesystem: AbstractFileSystem, path: str) -> Iterator[SourceClip | Rejection]:
    """The lines of a text file that are not blank, as captions."""
    address = _address(filesystem, path)
    names = _CaptionIds()
    with _reading(filesystem, path) as file:
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


def _require_columns(found: Sequence[str], address: str, columns: Columns) -> None:
    wanted = (columns.path, columns.caption, columns.sample_id)
    missing = [name for name in wanted if name is not None and name not in found]
    if missing:
        raise DataError(
            f"reading {address}",
            f"the columns {printable(', '.join(found))}; no {', '.join(missing)}",
            "a path and a caption in each row",
            "Name them with --path-column, --caption-column and --id-column; captions without"
            " videos are taken with --captions-only",
        )


def _manifest_clip(
    filesystem: AbstractFileSystem,
    address: str,
    number: int,
    row: dict[str, Any] | str,
    columns: Columns,
    names: "_CaptionIds",
) -> SourceClip | Rejection:
    if isinstance(row, str):
        return Rejection("", address, number, Reason.BAD_MANIFEST_ROW, printable(row))
    caption = row.get(columns.caption)
    fault = None if caption is None else fault_of_text(caption)
    path = None if columns.path is None else row.get(columns.path)
    if columns.path is not None and (not isinstance(path, str) or not path.strip()):
        detail = f"{columns.path} = {str(path)[:80]!r}"
        return Rejection("", address, number, Reason.BAD_MANIFEST_ROW, detail)
    sample_id = path if columns.sample_id is None else row.get(columns.sample_id)
    if columns.sample_id is None and path is None:
        if fault is not None:
            return Rejection("", address, number, _BAD_CAPTION, fault)
        sample_id = names.next(caption or "")
    if sample_id is None or not str(sample_id):
        detail = f"{columns.sample_id} = {sample_id!r}"
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
        return _address(filesystem, path)
    return f"{manifest.rpartition('/')[0]}/{path}"


@contextmanager
def _reading(filesystem: AbstractFileSystem, path: str) -> Iterator[BinaryIO]:
    """A file that is read from front to back in small steps."""
    attempted = f"reading {_address(filesystem, path)}"
    with (
        storage_errors(attempted),
        filesystem.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead") as file,
    ):
        yield cast("BinaryIO", file)


def _address(filesystem: AbstractFileSystem, path: str) -> str:
    """What `open_folder` takes for a path: as people write it, without file:// on this machine."""
    return path if isinstance(filesystem, LocalFileSystem) else filesystem.unstrip_protocol(path)


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
