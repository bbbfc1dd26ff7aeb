"""Captioned videos as people keep them, listed one by one without reading a video.

    a folder      clip.mp4 beside clip.txt or clip.caption (the caption) or clip.json (a field of
                  it), at any depth
    a tar         key.mp4 and key.txt or key.json in any order; also tars that lie in the folder
    a manifest    CSV, TSV, JSON lines, JSON or Parquet: a path and a caption in each row, or
                  captions alone
    prompts       a .txt with one caption a line

A caption belongs to the video whose name is the same up to the last dot. Suffixes count in upper
case too. Whatever else lies there is counted by kind, see `SkippedFiles`.

The order is fixed, and so are the sample ids: the file's path within the folder, the tar's path and
the key, or the path as the manifest has it (or a column of its own). They do not depend on where
the folder lies or on what else is in it.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from cluster.paths import kind_of_path
from cluster.redaction import printable
from pipelines.data.making.manifest_rows import MANIFEST_SUFFIXES, fault_of_text
from pipelines.data.making.manifests import manifest_clips, prompt_clips
from pipelines.data.making.skipped import (
    ARCHIVES,
    FOREIGN_CAPTIONS,
    HIDDEN,
    LINKED_FOLDERS,
    LONELY_CAPTIONS,
    MANIFESTS,
    SHARED_CAPTIONS,
    TAR_LINKS,
    TWO_CAPTIONS,
    SkippedFiles,
    unknown_kind,
)
from pipelines.data.making.source_clip import (
    CaptionFile,
    Columns,
    FileRange,
    SourceClip,
    address_of,
    open_reading,
)
from pipelines.data.making.tar_members import TarFault, read_members
from pipelines.data.making.unserved import unserved
from pipelines.data.shards.filesystem import S3Settings, data_errors, open_folder
from pipelines.data.shards.rejection import Reason, Rejection
from sgmd_core.errors import DataError

_KNOWN = (
    "mp4 m4v mov qt 3gp 3g2 mj2 f4v mkv mk3d webm avi divx mpg mpeg mpe m1v m2v vob ts mts m2ts"
    " m2t wmv asf flv swf ogv ogm gif apng rm rmvb mxf dv nut ivf y4m mjpeg mjpg wtv amv h264 264"
    " hevc h265 265"
)
VIDEO_SUFFIXES = frozenset(f".{name}" for name in _KNOWN.split())
PROMPTS_SUFFIX = ".txt"
_CAPTION_SUFFIXES = (".txt", ".caption", ".json")
_ARCHIVE_SUFFIXES = frozenset((".zip", ".rar", ".7z", ".gz", ".bz2", ".xz", ".zst"))
_PACKED_TAR = re.compile(
    r"\.(tar\.(gz|z|bz2?|xz|lzma|zstd?|lz4|lz)|tgz|taz|tbz2?|txz|tlz|tzst)$", re.IGNORECASE
)
_UNPACK = "decompress it (gunzip, bunzip2, unxz or unzstd) to a plain .tar and prepare that"
_SYSTEM_FILES = frozenset((".DS_Store", ".localized"))


@dataclass(frozen=True, slots=True)
class _Part:
    """A file or a member of a tar that can be a part of a clip."""

    suffix: str
    place: FileRange
    name: str
    archive: int = 0


def list_clips(
    url: str,
    columns: Columns = Columns(),
    s3: S3Settings = S3Settings(),
    skipped: SkippedFiles | None = None,
) -> Iterator[SourceClip | Rejection]:
    """Names every clip of a source, in a fixed order.

    Args:
        url: Folder, S3 prefix, `.tar` file, manifest (see `MANIFEST_SUFFIXES`), or a `.txt` of
            prompts.
        columns: Names in manifests and JSON files.
        s3: How to speak to the server, where there is one.
        skipped: Counts the files that are not part of a clip.

    Yields:
        Clips, and rejections of rows and tars that name none.

    Raises:
        DataError: the source cannot be opened or listed, or a manifest has no such columns.
    """
    for clip in _listed(url, columns, s3, SkippedFiles() if skipped is None else skipped):
        fault = fault_of_text(clip.sample_id) or fault_of_text(clip.source)
        if fault is None:
            yield clip
            continue
        sample_id, source = printable(clip.sample_id), printable(clip.source)
        reason = clip.reason if isinstance(clip, Rejection) else Reason.NO_ID
        yield Rejection(sample_id, source, clip.row, reason, f"its name is {fault}")


def _listed(
    url: str, columns: Columns, s3: S3Settings, skipped: SkippedFiles
) -> Iterator[SourceClip | Rejection]:
    filesystem, root = open_folder(url, s3)
    suffix = PurePosixPath(root).suffix.lower()
    if columns.path is None and suffix not in (PROMPTS_SUFFIX, *MANIFEST_SUFFIXES):
        raise DataError(
            f"reading the captions of {url}",
            "no file of captions",
            f"a file that ends in {', '.join((PROMPTS_SUFFIX, *MANIFEST_SUFFIXES))}",
            "Leave --captions-only out",
        )
    if suffix not in MANIFEST_SUFFIXES:
        _refuse_columns(url, columns, is_text=suffix == PROMPTS_SUFFIX)
    if suffix == PROMPTS_SUFFIX:
        yield from prompt_clips(filesystem, root)
    elif suffix in MANIFEST_SUFFIXES:
        yield from manifest_clips(filesystem, root, columns, skipped)
    elif _PACKED_TAR.search(root):
        raise DataError(
            f"reading {url}",
            "a compressed tar, which can only be read from its beginning",
            "a plain .tar",
            f"{_UNPACK.capitalize()}; videos hardly get smaller by compression",
        )
    elif suffix == ".tar":
        yield from _tar_clips(filesystem, root, root.rpartition("/")[0], columns, skipped)
    else:
        if suffix:
            _refuse_file(filesystem, root, url)
        yield from _folder_clips(filesystem, root, root, columns, skipped)


def _refuse_columns(url: str, columns: Columns, *, is_text: bool) -> None:
    """Refuses names of columns for a source that has none.

    Raises:
        DataError: Columns are named for files and tars, or for a text of prompts.
    """
    usual = Columns()
    named = {
        "--path-column": columns.path not in (None, usual.path),
        "--id-column": columns.sample_id is not None,
        "--caption-column": is_text and columns.caption is not None,
    }
    if given := [option for option, is_given in named.items() if is_given]:
        raise DataError(
            f"reading {url}",
            f"{', '.join(given)}, of a source without columns",
            f"a manifest ({', '.join(MANIFEST_SUFFIXES)}), whose columns have names",
            f"Leave {', '.join(given)} out, or name the manifest as SRC",
        )


def _refuse_file(filesystem: AbstractFileSystem, root: str, url: str) -> None:
    """Refuses a single file that is not a list of clips; a folder may have a dot in its name."""
    with data_errors(f"opening {url}"):
        if not filesystem.isfile(root):
            return
    is_video = PurePosixPath(root).suffix.lower() in VIDEO_SUFFIXES
    raise DataError(
        f"reading {url}",
        "a single video" if is_video else "a file of a kind that names no clips",
        f"a folder, a .tar, a .txt of prompts, or a manifest ({', '.join(MANIFEST_SUFFIXES)})",
        "Name its folder" if is_video else "Convert it, or name a folder of videos",
    )


def _folder_clips(
    filesystem: AbstractFileSystem,
    root: str,
    folder: str,
    columns: Columns,
    skipped: SkippedFiles,
) -> Iterator[SourceClip | Rejection]:
    """The clips and tars of a folder, then those of its sub-folders; one listing at a time."""
    with data_errors(f"listing {folder}"):
        entries = {str(entry["name"]): entry for entry in filesystem.ls(folder, detail=True)}
        # What was listed is not needed again, and a large bucket would fill the memory.
        filesystem.invalidate_cache(folder)
    files: list[str] = []
    folders: list[str] = []
    for path in sorted(entries):
        # Consoles and tools mark a folder on S3 by an empty object of its name.
        if path.endswith("/") or path == folder.rstrip("/"):
            continue
        name = _name(path)
        if name.startswith("."):
            if name not in _SYSTEM_FILES and not name.startswith("._"):
                skipped.add(HIDDEN, path)
        elif entries[path]["type"] == "directory":
            folders.append(path)
        elif isinstance(filesystem, LocalFileSystem) and Path(path).is_dir():
            skipped.add(LINKED_FOLDERS, path)
        else:
            files.append(path)
    yield from _file_clips(filesystem, root, files, columns, skipped)
    for path in folders:
        yield from _folder_clips(filesystem, root, path, columns, skipped)


def _file_clips(
    filesystem: AbstractFileSystem,
    root: str,
    files: Sequence[str],
    columns: Columns,
    skipped: SkippedFiles,
) -> Iterator[SourceClip | Rejection]:
    """The clips and tars of one folder, in the order of their names."""
    captions: dict[str, list[_Part]] = {}
    for path in files:
        if (suffix := PurePosixPath(path).suffix.lower()) in _CAPTION_SUFFIXES:
            place = FileRange(address_of(filesystem, path))
            captions.setdefault(_stem(path), []).append(_Part(suffix, place, path))
    used: Counter[str] = Counter()
    for path in files:
        suffix = PurePosixPath(path).suffix.lower()
        if suffix == ".tar":
            yield from _tar_clips(filesystem, path, root, columns, skipped)
        elif _PACKED_TAR.search(path):
            name, address = path.removeprefix(root).lstrip("/"), address_of(filesystem, path)
            detail = f"a compressed tar; {_UNPACK}"
            yield Rejection(name, address, None, Reason.UNREADABLE_ARCHIVE, detail)
        elif suffix in VIDEO_SUFFIXES:
            address = address_of(filesystem, path)
            beside = captions.get(_stem(path), [])
            used[_stem(path)] += 1
            yield SourceClip(
                sample_id=path.removeprefix(root).lstrip("/"),
                source=address,
                row=None,
                video=FileRange(address),
                caption=_chosen(beside, path, columns, skipped),
            )
        elif suffix not in _CAPTION_SUFFIXES:
            skipped.add(_kind(suffix), path)
    for stem, parts in captions.items():
        if used[stem] > 1:
            skipped.add(SHARED_CAPTIONS, parts[0].name)
        for part in parts if not used[stem] else ():
            skipped.add(LONELY_CAPTIONS, part.name)


def _chosen(
    parts: Sequence[_Part], video: str, columns: Columns, skipped: SkippedFiles
) -> CaptionFile | None:
    """The caption beside a video: a text before a JSON file."""
    if not parts:
        return None
    ordered = sorted(parts, key=lambda part: _CAPTION_SUFFIXES.index(part.suffix))
    if len(ordered) > 1:
        names = ", ".join(_name(part.name) for part in ordered)
        skipped.add(TWO_CAPTIONS, f"{video} with {names}")
    first = ordered[0]
    return CaptionFile(first.place, columns.captions if first.suffix == ".json" else ())


def _kind(suffix: str) -> str:
    if suffix in MANIFEST_SUFFIXES:
        return MANIFESTS
    return f"{suffix} {ARCHIVES}" if suffix in _ARCHIVE_SUFFIXES else unknown_kind(suffix)


def _tar_clips(
    filesystem: AbstractFileSystem,
    path: str,
    root: str,
    columns: Columns,
    skipped: SkippedFiles,
) -> Iterator[SourceClip | Rejection]:
    """The clips of a tar; only its headers are read."""
    address = address_of(filesystem, path)
    name = path.removeprefix(root).lstrip("/")
    parts: dict[str, list[_Part]] = {}
    faults: list[TarFault] = []
    kind = kind_of_path(path) if isinstance(filesystem, LocalFileSystem) else ""
    if kind not in ("", "a file"):
        # A pipe would be waited for, and a device has no end.
        yield Rejection(name, address, None, Reason.UNREADABLE_ARCHIVE, f"{kind}, not a file")
        return
    try:
        with open_reading(filesystem, path) as file:
            members = list(read_members(file))
    except DataError as error:
        reason = Reason.UNREADABLE_ARCHIVE
        yield unserved(name, address, None, FileRange(address), error, reason)
        return
    for member in members:
        if isinstance(member, TarFault):
            faults.append(member)
        elif _is_clip_part(member.suffix):
            place = FileRange(address, member.offset, member.num_bytes)
            part = _Part(member.suffix, place, f"{name}/{member.name}", member.archive)
            parts.setdefault(member.key, []).append(part)
        else:
            skipped.add(_kind(member.suffix), f"{name}/{member.name}")
    count = itertools.count()
    for key, files in parts.items():
        yield from _tar_clip(f"{name}/{key}", address, count, files, columns, skipped)
    for fault in faults:
        if fault.name is None and not parts:
            yield Rejection(name, address, None, Reason.UNREADABLE_ARCHIVE, fault.detail)
        elif fault.name is None:
            yield Rejection(name, address, next(count), Reason.DAMAGED_ARCHIVE, fault.detail)
        elif _is_clip_part(PurePosixPath(fault.name).suffix.lower()):
            member, reason = f"{name}/{fault.name}", Reason.UNREADABLE_MEMBER
            yield Rejection(member, address, next(count), reason, fault.detail)
        else:
            skipped.add(TAR_LINKS, f"{name}/{fault.name} ({fault.detail})")


def _is_clip_part(suffix: str) -> bool:
    return suffix in VIDEO_SUFFIXES or suffix in _CAPTION_SUFFIXES


def _tar_clip(
    sample_id: str,
    address: str,
    count: Iterator[int],
    parts: Sequence[_Part],
    columns: Columns,
    skipped: SkippedFiles,
) -> Iterator[SourceClip | Rejection]:
    """A clip out of the members that share a name up to its last dot.

    Of joined tars each has its own names, so a caption goes with the video of its own tar; with
    that of another one only where no other video has the name.
    """
    videos = sorted(
        (part for part in parts if part.suffix in VIDEO_SUFFIXES), key=lambda part: part.suffix
    )
    captions = [part for part in parts if part.suffix in _CAPTION_SUFFIXES]
    if not videos:
        for part in captions:
            skipped.add(LONELY_CAPTIONS, part.name)
        return
    own = [part for part in captions if part.archive == videos[0].archive]
    foreign = [part for part in captions if part.archive != videos[0].archive]
    if not own and len(videos) == 1:
        own, foreign = foreign, []
    for part in foreign:
        skipped.add(FOREIGN_CAPTIONS, part.name)
    caption = _chosen(own, videos[0].name, columns, skipped)
    yield SourceClip(sample_id, address, next(count), videos[0].place, caption)
    for part in videos[1:]:
        detail = f"{_name(part.name)} beside {_name(videos[0].name)}, which is taken"
        yield Rejection(sample_id, address, next(count), Reason.DUPLICATE_ID, detail)


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
