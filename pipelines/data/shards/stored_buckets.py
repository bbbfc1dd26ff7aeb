"""Sizes of an encoded set: a folder for each, named in one file.

    DST/_buckets.json   {"version": 1, "buckets": [{"folder": "480x832x81", "num_frames": 81,
                         "height": 480, "width": 832, "num_rows": 120}, ...]}
    DST/480x832x81/     a set of its own, with latents of one shape

The file is written when all folders are whole.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from fsspec import AbstractFileSystem

from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.shards.reading import fetch_file
from pipelines.data.shards.shard_writing import write_file
from sgmd_core.errors import DataError

BUCKETS_NAME = "_buckets.json"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class StoredBucket:
    """Clips of one size of a set.

    Attributes:
        folder: Within the set's folder: height x width x frames.
        num_frames: Video frames a clip.
        height: Pixels.
        width: Pixels.
        num_rows: Clips.
    """

    folder: str
    num_frames: int
    height: int
    width: int
    num_rows: int


def write_buckets(
    filesystem: AbstractFileSystem, root: str, buckets: Sequence[StoredBucket]
) -> None:
    """Writes which sizes a set has; an older file is replaced as a whole."""
    content = {"version": _VERSION, "buckets": [asdict(bucket) for bucket in buckets]}
    write_file(filesystem, f"{root}/{BUCKETS_NAME}", json.dumps(content, indent=2).encode())


def read_buckets(
    filesystem: AbstractFileSystem, root: str, s3: S3Settings = S3Settings()
) -> tuple[StoredBucket, ...]:
    """Sizes of a set; none where its folder names none.

    Raises:
        DataError: The file is there and cannot be read or makes no sense.
    """
    text = fetch_file(filesystem, f"{root}/{BUCKETS_NAME}", s3)
    if text is None:
        return ()
    try:
        content = json.loads(text)
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']}")
        return tuple(
            StoredBucket(
                str(one["folder"]),
                *(int(one[name]) for name in ("num_frames", "height", "width", "num_rows")),
            )
            for one in content["buckets"]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"reading {root}/{BUCKETS_NAME}",
            f"{type(error).__name__}: {error}",
            f"sizes of an encoded set, version {_VERSION}",
            "Encode the set again with `sgmd encode`",
        ) from error
