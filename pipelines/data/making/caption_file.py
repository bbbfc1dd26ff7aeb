"""A file of captions used as a data set: `data.train=prompts.txt`.

    prompts.txt -> digest -> ~/.cache/sgmd/captions/DIGEST/captions-DIGEST-00000.parquet

The file becomes shards once on each machine; whoever reads the set opens these shards, so a file
has the same order, checks and quarantine as a folder. A row that is not a caption stays in
its place as a row without one, and its fault stands in the shard's metadata. The names of the
shards hold the digest: a run that goes on after its file has changed finds none of its shards, and
says so.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, cast

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from cluster.files import cache_folder
from pipelines.data.making.manifest_rows import MANIFEST_SUFFIXES
from pipelines.data.making.manifests import columns_in_words
from pipelines.data.making.source_clip import Columns, SourceClip
from pipelines.data.making.sources import PROMPTS_SUFFIX, list_clips
from pipelines.data.shards.caption_rule import is_blank
from pipelines.data.shards.columns import ColumnNames, kind_of, require_named
from pipelines.data.shards.filesystem import S3Settings, data_errors, open_folder
from pipelines.data.shards.index import INDEX_NAME, write_index
from pipelines.data.shards.listing import list_files
from pipelines.data.shards.parquet import Footer, read_footers
from pipelines.data.shards.rejection import Reason, Rejection, join_reason
from pipelines.data.shards.scan import ShardSet
from pipelines.data.shards.schema import (
    CAPTION,
    FAULTS_KEY,
    FPS,
    SAMPLE_ID,
    VIDEO,
    ShardKind,
    caption_schema,
)
from pipelines.data.shards.shard_writing import ROW_GROUP_CLIPS, ShardBuilder, write_shard
from sgmd_core.errors import DataError

CAPTION_FILE_SUFFIXES = (PROMPTS_SUFFIX, *MANIFEST_SUFFIXES)
_SUFFIXES = ", ".join(CAPTION_FILE_SUFFIXES)
_OTHER_FILE = "a file that is neither a Parquet shard nor a list of captions"
_PREPARE = (
    "Make shards of videos and their captions (a folder of them, a tar, a manifest) with"
    " `sgmd prepare SRC DST`, and give DST"
)
_LOOKED_AT = 1000  # files that are counted of a folder without shards
# Part of the digest: what is made of the same bytes changes with it.
_VERSION = b"1"
JOB_FOLDER = "submitted"
"""Folder of a job's package with the recipe and the files of captions that go along."""

_SHARD_ROWS = 4096
_PREFIX = "captions-"
_READ_BYTES = 2**20


def open_set(
    url: str,
    s3: S3Settings = S3Settings(),
    names: ColumnNames = ColumnNames(),
    *,
    probe: bool = True,
) -> ShardSet:
    """Opens a folder of shards, one shard, or a file of captions as a folder of shards.

    Args:
        url: Local path or `s3://bucket/prefix`; a file ends in one of `CAPTION_FILE_SUFFIXES`.
        s3: How to speak to the server, where there is one.
        names: Names of the set's columns.
        probe: Ask the server for one key; see `open_folder`.

    Raises:
        DataError: the folder or file cannot be opened, or the file holds no captions.
    """
    folder, only = locate_set(url, s3, names)
    is_made = folder != url and not only
    filesystem, root = open_folder(folder, s3, probe=probe and folder == url)
    return ShardSet(filesystem, root, only, type(names)() if is_made else names)


def locate_set(
    url: str, s3: S3Settings = S3Settings(), names: ColumnNames = ColumnNames()
) -> tuple[str, str]:
    """The folder of a set's shards, and the name of the only one where the set is a file.

    A Parquet file with videos or latents is a shard in its own folder. Any other file of captions
    becomes a folder of shards in the cache.

    Raises:
        DataError: the file cannot be read, or holds no captions.
    """
    if PurePosixPath(url).suffix.lower() not in CAPTION_FILE_SUFFIXES:
        _require_folder(url)
        return url, ""
    filesystem, root = open_folder(url, s3)
    with data_errors(f"opening {url}"):
        if filesystem.isdir(root):
            return url, ""
        if url.startswith(f"{JOB_FOLDER}/") and not filesystem.exists(root):
            raise DataError(
                f"reading {url}",
                "no such file: it went along with a submitted job, whose package is deleted",
                "the same file, where it lies now",
                "Name it: --captions of `sgmd evaluate`, --data of `sgmd ledger`, data.train=..."
                " and data.validation=... of a resume or a new run",
            )
    return _located(url, s3, names, _stamp(filesystem, root))


def caption_file_in_words(url: str, names: ColumnNames = ColumnNames()) -> str:
    """One line that says what is read of a file of captions; empty where a set is not such a file.

    Args:
        url: As in `open_set`, which has accepted it.
        names: Names of the set's columns.

    Raises:
        DataError: The file cannot be read.
    """
    suffix = PurePosixPath(url).suffix.lower()
    folder, only = locate_set(url, names=names)
    if folder == url or only:
        return ""
    if suffix == PROMPTS_SUFFIX:
        return f"{CAPTION} is each line; {SAMPLE_ID} is a digest of it"
    filesystem, root = open_folder(url, probe=False)
    return columns_in_words(filesystem, root, _columns_of(names))


def read_prompts(url: str, s3: S3Settings = S3Settings()) -> list[str]:
    """All captions of a file, in its order, without blanks around them.

    Raises:
        DataError: the file cannot be read, holds no caption, or a row of it is not a caption.
    """
    prompts: list[str] = []
    bad: list[str] = []
    for clip in list_clips(url, Columns(path=None, caption=None), s3):
        caption = clip.caption if isinstance(clip, SourceClip) else None
        if isinstance(caption, str) and not is_blank(caption):
            prompts.append(caption.strip())
        elif isinstance(clip, Rejection):
            bad.append(clip.in_words())
        else:
            bad.append(f"{clip.source}, row {clip.row}: {Reason.EMPTY_CAPTION}")
    if bad or not prompts:
        found = f"{len(bad)} rows that are not captions, first {bad[0]}" if bad else "no caption"
        raise DataError(f"reading the prompts in {url}", found, "a caption in each row")
    return prompts


def require_unchanged(url: str, folder: str, recorded: Iterable[Mapping[str, Any]]) -> None:
    """Checks that a file of captions is the one that a run has read before.

    Args:
        url: Address of the set.
        folder: Path of the opened folder; see `open_set`.
        recorded: What the run knows of its shards; see `Catalogue`.

    Raises:
        DataError: its bytes are others.
    """
    known = next((path for line in recorded for path, *_ in line.get("shards", ())), None)
    if known is None or folder == url or PurePosixPath(folder).name in known:
        return
    if PurePosixPath(url).suffix.lower() in CAPTION_FILE_SUFFIXES and known.startswith(_PREFIX):
        raise DataError(
            f"continuing a run on {url}",
            "a file that has changed since the run began",
            "the same captions",
            "Restore the file, or start a new run",
        )


def no_shards(
    attempted: str, filesystem: AbstractFileSystem, root: str, only: str = ""
) -> DataError:
    """The error of a set without a shard: says what lies at its address instead.

    Args:
        attempted: What the caller was doing.
        filesystem: Where the set should be.
        root: Its path there.
        only: The file of it that was asked for; empty: all.
    """
    expected = f"a folder of shards, or a file that ends in {_SUFFIXES}"
    try:
        if filesystem.isfile(root):
            return DataError(attempted, _OTHER_FILE, expected, _PREPARE)
        there = [path for path, _ in itertools.islice(list_files(filesystem, root), _LOOKED_AT)]
    except (OSError, DataError):  # It is listed for the sake of words alone.
        there = []
    if only.startswith(("_", ".")):
        return DataError(
            attempted,
            f"{only}, which is not a shard: names that begin with _ or . are left out",
            expected,
            "Give the folder that it lies in",
        )
    if there:
        count = f"{len(there)} or more" if len(there) == _LOOKED_AT else str(len(there))
        found = f"no .parquet file among the {count} there, such as {there[0]}"
        return DataError(attempted, found, expected, _PREPARE)
    return DataError(
        attempted,
        "no such folder, or no file in it",
        expected,
        "Check the address; `sgmd prepare` makes shards, and `sgmd shapes DST` a data set to try",
    )


def _require_folder(url: str) -> None:
    """Refuses a local file of another kind, which would be taken for a folder and searched."""
    with data_errors(f"opening the data set {url}"):
        is_file = Path(url.removeprefix("file://")).is_file()
    if is_file:
        expected = f"a folder of shards, or a file that ends in {_SUFFIXES}"
        raise DataError(f"opening the data set {url}", _OTHER_FILE, expected, _PREPARE)


def _stamp(filesystem: AbstractFileSystem, root: str) -> str:
    """Differs where a file has changed since this process last read it."""
    with data_errors(f"reading {root}"):
        filesystem.invalidate_cache(filesystem._parent(root))
        facts = filesystem.info(root)
    return repr([facts.get(name) for name in ("size", "mtime", "ino", "ETag", "LastModified")])


@lru_cache(maxsize=64)
def _located(url: str, s3: S3Settings, names: ColumnNames, stamp: str) -> tuple[str, str]:
    """Folder and name of a file that is a shard; folder of the shards made of another file."""
    filesystem, root = open_folder(url, s3, probe=False)
    if PurePosixPath(root).suffix.lower() == ".parquet":
        with data_errors(f"opening {url}"):
            size = int(filesystem.info(root)["size"])
        (footer,) = read_footers(filesystem, [(root, size)], s3)
        if isinstance(footer, Footer):
            require_named(url, [footer.schema], names)
        if isinstance(footer, Footer) and kind_of(footer.schema, names) is not ShardKind.CAPTIONS:
            parent, slash, name = url.rpartition("/")
            return parent or slash or ".", name
    return _converted(url, s3, names, filesystem, root), ""


def _converted(
    url: str, s3: S3Settings, names: ColumnNames, filesystem: AbstractFileSystem, root: str
) -> str:
    """Path of the folder of shards that a file of captions is.

    Raises:
        DataError: It cannot be read, or a column is named that such a file has not.
    """
    suffix = PurePosixPath(root).suffix.lower()
    is_table = suffix not in (PROMPTS_SUFFIX, ".parquet")
    for column in (VIDEO, FPS) if is_table else (CAPTION, SAMPLE_ID, VIDEO, FPS):
        if suffix != ".parquet" and getattr(names, column) is not None:
            raise DataError(
                f"reading {url}",
                f"{names.setting_of(column)} {getattr(names, column)}, of a file of captions",
                "no name for a column that is not there",
                f"Leave {names.setting_of(column)} out",
            )
    columns = _columns_of(names)
    digest = hashlib.sha256(_VERSION + PurePosixPath(root).suffix.lower().encode())
    if names.caption is not None or names.sample_id is not None:
        digest.update(repr((names.caption, names.sample_id)).encode())
    with data_errors(f"reading {url}"), filesystem.open(root, "rb") as file:
        ends: set[bytes] = set()
        while part := cast("bytes", file.read(_READ_BYTES)):
            digest.update(part)
            ends |= {end for end in (b"\r", b"\n") if end in part}
    if ends == {b"\r"} and suffix in (PROMPTS_SUFFIX, ".csv", ".tsv", ".jsonl", ".ndjson"):
        digest.update(b"lines end with it")  # earlier versions made one row of such a file
    name = digest.hexdigest()[:32]
    folder = _cache() / name
    if not (folder / INDEX_NAME).exists():
        _convert(url, s3, columns, name, folder)
    return str(folder)


def _columns_of(names: ColumnNames) -> Columns:
    return Columns(None, names.caption, names.sample_id, names.setting_of(CAPTION))


def _convert(url: str, s3: S3Settings, columns: Columns, name: str, folder: Path) -> None:
    """Writes shards and then their index; processes that do so at once write the same bytes."""
    shards = []
    clips = list_clips(url, columns, s3)
    while part := tuple(itertools.islice(clips, _SHARD_ROWS)):
        builder = ShardBuilder(_with_faults(part))
        for clip in part:
            caption = clip.caption if isinstance(clip, SourceClip) else None
            builder.add({SAMPLE_ID: clip.sample_id or f"row {clip.row}", CAPTION: caption})
        shard = f"{_PREFIX}{name}-{len(shards):05d}.parquet"
        shards.append(write_shard(LocalFileSystem(), str(folder), shard, builder))
    if not shards:
        raise DataError(f"reading {url}", "no row", "captions", "Check the content of the file")
    write_index(LocalFileSystem(), str(folder), shards)


def _with_faults(part: tuple[SourceClip | Rejection, ...]) -> pa.Schema:
    """The schema of a shard, with the faults of its rows by row group and row."""
    faults = {
        f"{row // ROW_GROUP_CLIPS}/{row % ROW_GROUP_CLIPS}": (
            join_reason(clip.reason, f"row {clip.row} of the file: {clip.detail}")
        )
        for row, clip in enumerate(part)
        if isinstance(clip, Rejection)
    }
    return caption_schema().with_metadata({FAULTS_KEY: json.dumps(faults).encode()})


def _cache() -> Path:
    folder = cache_folder("captions")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"making {folder}, where files of captions become shards",
            f"{type(error).__name__}: {error}",
            "a folder that can be written",
            "Set XDG_CACHE_HOME to one",
        ) from error
    return folder
