"""Files of a run on a local disk or an object store, and checkpoints that exist or do not.

    root/step-000200/...            parts, written by whoever has them
    root/step-000200/manifest.json  written last, with the size of every part: now it exists

A crash while the parts are written leaves a folder without a manifest; it is never read, and goes
away once a later checkpoint is committed and old ones are pruned. A part that was torn or lost
afterwards no longer has the size in the manifest, and the checkpoint before it counts instead.

Paths are what fsspec takes: `/disk/run`, `s3://bucket/run`. Keys and endpoint of S3 come from the
usual AWS variables. Folders are made on local disks only. Asked to make a folder, s3fs may create
its bucket, and whether a bucket exists is not ours to decide.
"""

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import fsspec

from cluster.errors import StorageError
from cluster.files import write_whole

MANIFEST = "manifest.json"

_log = logging.getLogger(__name__)
_STEP_FOLDER = re.compile(r"step-(\d{6,})")
_REMEDY = (
    "Check the path and the rights to it; for S3 also AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,"
    " AWS_SECRET_ACCESS_KEY and that the bucket exists"
)


def read_text(url: str) -> str:
    """The text of a file.

    Raises:
        StorageError: It is not there, or the store does not let us.
    """
    with _storage_errors(f"reading {url}"):
        files, path = _resolved(url)
        return str(files.read_text(path, encoding="utf-8"))


def write_text(url: str, text: str) -> None:
    """Writes a file whole or not at all; a reader sees the old text or the new one.

    Raises:
        StorageError: The store does not let us.
    """
    with _storage_errors(f"writing {url}"):
        write_whole(url, text.encode())


def read_json(url: str) -> Any:  # noqa: ANN401 - JSON can be anything
    """The content of a JSON file.

    Raises:
        StorageError: It is not there, or no JSON.
    """
    text = read_text(url)
    try:
        return json.loads(text)
    except ValueError as error:
        raise StorageError(f"reading {url}", f"no JSON: {error}", "a JSON document") from error


def write_json(url: str, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(url, json.dumps(content, indent=2) + "\n")


class Checkpoints:
    """The committed states of a run.

    Args:
        root: Folder that holds one folder a step.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")

    def folder(self, step: int) -> str:
        """Where the parts of a step are, or go."""
        return f"{self.root}/step-{step:06d}"

    def commit(self, step: int, manifest: Mapping[str, Any]) -> None:
        """Makes a checkpoint exist, once all its parts are written.

        Args:
            step: Its number.
            manifest: What to know about it, as JSON; the sizes of the parts are added as "files".

        Raises:
            StorageError: There are no parts.
        """
        folder = self.folder(step)
        sizes = _file_sizes(folder)
        sizes.pop(MANIFEST, None)
        if not sizes:
            raise StorageError(
                f"committing checkpoint {step}", f"no files in {folder}", "its parts, written"
            )
        write_json(f"{folder}/{MANIFEST}", {**manifest, "files": sizes})

    def manifest(self, step: int) -> dict[str, Any]:
        """What `commit` wrote.

        Raises:
            StorageError: The step has not been committed.
        """
        return read_json(f"{self.folder(step)}/{MANIFEST}")

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return [step for step in self._folders() if self._is_complete(step)]

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return next((step for step in reversed(self._folders()) if self._is_complete(step)), None)

    def prune(self, keep: int, spared: Collection[int] = ()) -> None:
        """Deletes all but the newest `keep` complete checkpoints, and what crashes left before.

        Call it after `commit`: then there is no moment without a checkpoint.

        Args:
            keep: At least 1.
            spared: Steps that are kept as well.
        """
        kept = self.steps()[-keep:]
        if not kept:
            return
        for step in self._folders():
            # A newer folder without a manifest may be one that is being written.
            if step not in kept and step not in spared and step < kept[-1]:
                self._delete(step)

    def _folders(self) -> list[int]:
        """Steps of all folders, complete or not, oldest first."""
        with _storage_errors(f"listing {self.root}"):
            files, path = _resolved(self.root)
            files.invalidate_cache()
            try:
                entries = files.ls(path, detail=False)
            except FileNotFoundError:
                return []
        names = [_STEP_FOLDER.fullmatch(PurePosixPath(entry).name) for entry in entries]
        return sorted(int(name[1]) for name in names if name)

    def _is_complete(self, step: int) -> bool:
        found = _file_sizes(self.folder(step))
        if MANIFEST not in found:
            return False
        wrong = {
            name: (found.get(name), size)
            for name, size in self.manifest(step)["files"].items()
            if found.get(name) != size
        }
        if wrong:
            _log.warning("ignoring checkpoint %s: sizes (found, written) %s", step, wrong)
        return not wrong

    def _delete(self, step: int) -> None:
        folder = self.folder(step)
        with _storage_errors(f"deleting {folder}"):
            files, path = _resolved(folder)
            # Without its manifest it no longer exists, should we die half-way.
            if files.exists(f"{path}/{MANIFEST}"):
                files.rm_file(f"{path}/{MANIFEST}")
            files.rm(path, recursive=True)


def _file_sizes(folder: str) -> dict[str, int]:
    """Size in bytes of every file under a folder, by relative path."""
    with _storage_errors(f"listing {folder}"):
        files, path = _resolved(folder)
        files.invalidate_cache()
        found = dict(files.find(path, detail=True))
    return {
        str(PurePosixPath(name).relative_to(path)): entry["size"]
        for name, entry in sorted(found.items())
    }


def _resolved(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    files, path = fsspec.core.url_to_fs(url)
    return files, path.rstrip("/")


@contextmanager
def _storage_errors(attempted: str) -> Iterator[None]:
    """Turns whatever a file system raises into our error; each brings exceptions of its own."""
    try:
        yield
    except Exception as error:
        raise StorageError(
            attempted, f"{type(error).__name__}: {error}", "storage that works", _REMEDY
        ) from error
