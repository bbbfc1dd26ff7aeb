"""Captioned videos as people keep them, listed one by one without reading a video.

    a folder      clip.mp4 beside clip.txt (the caption) or clip.json (a field of it), at any depth
    a tar         key.mp4 and key.txt or key.json in any order; also tars that lie in the folder
    a manifest    CSV, TSV, JSON lines, JSON or Parquet, one clip a row: a path and a caption; or
                  captions alone
    prompts       a .txt with one caption a line

A caption belongs to the video whose name is the same up to the last dot.

The order is fixed, and so are the sample ids: the file's path within the folder, the tar's path and
the key, or the path as the manifest has it (or a column of its own). They do not depend on where
the folder lies or on what else is in it.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem

from pipelines.data.making.manifest_rows import MANIFEST_SUFFIXES, fault_of_text, printable
from pipelines.data.making.manifests import manifest_clips, prompt_clips
from pipelines.data.making.rejections import Reason, Rejection
from pipelines.data.making.source_clip import (
    CaptionFile,
    Columns,
    FileRange,
    SourceClip,
    address_of,
    open_reading,
)
from pipelines.data.making.tar_members import TarFault, read_members
from pipelines.data.shards.filesystem import S3Settings, data_errors, open_folder
from sgmd_core.errors import DataError

_KNOWN = (
    "mp4 m4v mov qt 3gp 3g2 mj2 f4v mkv mk3d webm avi divx mpg mpeg mpe m1v m2v vob ts mts m2ts"
    " m2t wmv asf flv swf ogv ogm gif apng rm rmvb mxf dv nut ivf y4m mjpeg mjpg wtv amv h264 264"
    " hevc h265 265"
)
VIDEO_SUFFIXES = frozenset(f".{name}" for name in _KNOWN.split())
PROMPTS_SUFFIX = ".txt"
_CAPTION_SUFFIXES = (".txt", ".json")
_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def list_clips(
    url: str, columns: Columns = Columns(), s3: S3Settings = S3Settings()
) -> Iterator[SourceClip | Rejection]:
    """Names every clip of a source, in a fixed order.

    Args:
        url: Folder, S3 prefix, `.tar` file, manifest (see `MANIFEST_SUFFIXES`), or a `.txt` of
            prompts.
        columns: Names in manifests and JSON files.
        s3: How to speak to the server, where there is one.

    Yields:
        Clips, and rejections of rows and tars that name none.

    Raises:
        DataError: the source cannot be opened or listed, or a manifest has no such columns.
    """
    for clip in _listed(url, columns, s3):
        fault = fault_of_text(clip.sample_id) or fault_of_text(clip.source)
        if fault is None:
            yield clip
            continue
        sample_id, source = printable(clip.sample_id), printable(clip.source)
        reason = clip.reason if isinstance(clip, Rejection) else Reason.NO_ID
        yield Rejection(sample_id, source, clip.row, reason, f"its name is {fault}")


def _listed(url: str, columns: Columns, s3: S3Settings) -> Iterator[SourceClip | Rejection]:
    filesystem, root = open_folder(url, s3)
    suffix = PurePosixPath(root).suffix.lower()
    if columns.path is None and suffix not in (PROMPTS_SUFFIX, *MANIFEST_SUFFIXES):
        raise DataError(
            f"reading the captions of {url}",
            "no file of captions",
            f"a file that ends in {', '.join((PROMPTS_SUFFIX, *MANIFEST_SUFFIXES))}",
            "Leave --captions-only out",
        )
    if suffix == PROMPTS_SUFFIX:
        yield from prompt_clips(filesystem, root)
    elif suffix in MANIFEST_SUFFIXES:
        yield from manifest_clips(filesystem, root, columns)
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
    with data_errors(f"listing {folder}"):
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
            address = address_of(filesystem, path)
            yield Rejection(name, address, None, Reason.UNREADABLE_ARCHIVE, detail)
        elif PurePosixPath(path).suffix.lower() in VIDEO_SUFFIXES:
            address = address_of(filesystem, path)
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
            field = columns.captions[0] if suffix == ".json" else None
            return CaptionFile(FileRange(address_of(filesystem, beside)), field)
    return None


def _tar_clips(
    filesystem: AbstractFileSystem, path: str, root: str, columns: Columns
) -> Iterator[SourceClip | Rejection]:
    """The clips of a tar; only its headers are read."""
    address = address_of(filesystem, path)
    name = path.removeprefix(root).lstrip("/")
    parts: dict[str, dict[str, FileRange]] = {}
    faults: list[TarFault] = []
    with open_reading(filesystem, path) as file:
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
        caption = CaptionFile(files[".json"], columns.captions[0])
    for suffix in videos[:1]:
        yield SourceClip(sample_id, address, next(count), files[suffix], caption)
    for suffix in videos[1:]:
        detail = f"a {suffix} beside the {videos[0]} of the same name, which is taken"
        yield Rejection(sample_id, address, next(count), Reason.DUPLICATE_ID, detail)


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
