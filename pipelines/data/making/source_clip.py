"""A clip of a source: its id, and where its video and its caption are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, cast

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipelines.data.shards.columns import CAPTION_NAMES, competing_columns
from pipelines.data.shards.filesystem import data_errors

PATH_NAMES = ("path", "file_name", "filename", "file_path", "video_path", "video")
"""Usual names of the paths of videos, the preferred one first."""

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
        json_fields: Names that the field which holds it may have, in a JSON file; none in a text
            file.
    """

    file: FileRange
    json_fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceClip:
    """One clip and where its parts are.

    Attributes:
        sample_id: Its lasting name.
        source: The file that names it: the video itself, a tar or a manifest.
        row: Its place in a tar or a manifest, from 0; None in a folder.
        video: The video's bytes; None where the source holds captions alone.
        caption: The caption, or where it is; several of them as the source lists them, which need
            not be text; None where there is none.
    """

    sample_id: str
    source: str
    row: int | None
    video: FileRange | None
    caption: str | CaptionFile | tuple[object, ...] | None


@dataclass(frozen=True, slots=True)
class Columns:
    """Names in manifests, and of the caption's field in JSON files.

    Attributes:
        path: Path of the video: relative to the manifest, absolute, or `s3://bucket/key`. `path`
            takes the only column of `PATH_NAMES` where there is none of this name; None takes the
            captions alone.
        caption: The caption; None takes the column that has one of `CAPTION_NAMES`.
        sample_id: The id; None takes the path for it.
        caption_setting: How the caller spells the setting of the caption's name; empty where there
            is none.
        several: Take a list as the captions of one clip, and rows of one video as one clip;
            otherwise the list is not a caption and the row a clip whose id comes again.
    """

    path: str | None = "path"
    caption: str | None = None
    sample_id: str | None = None
    caption_setting: str = "--caption-column"
    several: bool = False

    @property
    def captions(self) -> tuple[str, ...]:
        """Names that a caption may have, the preferred one first."""
        return CAPTION_NAMES if self.caption is None else (self.caption,)

    @property
    def paths(self) -> tuple[str, ...]:
        """Names that a path may have, the preferred one first."""
        if self.path is None:
            return ()
        return PATH_NAMES if self.path == PATH_NAMES[0] else (self.path,)

    def paths_in(self, names: Sequence[str]) -> list[str]:
        """Columns of which any may hold the paths."""
        usual = self.paths
        if len(usual) > 1:
            return competing_columns(names, usual)
        return [name for name in dict.fromkeys(names) if name in usual]


@contextmanager
def open_reading(filesystem: AbstractFileSystem, path: str) -> Iterator[BinaryIO]:
    """A file that is read from front to back in small steps."""
    attempted = f"reading {address_of(filesystem, path)}"
    with (
        data_errors(attempted),
        filesystem.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead") as file,
    ):
        yield cast("BinaryIO", file)


def address_of(filesystem: AbstractFileSystem, path: str) -> str:
    """Returns what `open_folder` takes for a path: as people write it, without file://."""
    return path if isinstance(filesystem, LocalFileSystem) else filesystem.unstrip_protocol(path)
