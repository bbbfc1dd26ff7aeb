"""Checkpoints that exist or do not, and whose every byte is checked before a run goes on from it.

    root/step-000200/...            parts, written and flushed by whoever has them
    root/step-000200/manifest.json  written last: now the checkpoint exists
        {"step": 200, ..., "files": {part: bytes}, "sha256": {part: digest}}

A crash while the parts are written leaves a folder without a manifest. It is never read, and goes
away once a later checkpoint is committed and old ones are pruned. A part that was lost, torn,
changed or exchanged afterwards no longer agrees with the manifest, and `fault` says how.
"""

import logging
import re
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from cluster.errors import StorageError
from cluster.files import sha256_of
from cluster.storage import file_sizes, is_folder, read_json, write_json
from cluster.storage_errors import storage_errors
from cluster.stores import open_store, opened_store

MANIFEST = "manifest.json"
_SET_ASIDE = "manifest.json.broken"
_STEP_FOLDER = re.compile(r"step-(\d{6,})")
_AT_ONCE = 4

_log = logging.getLogger(__name__)


class Checkpoints:
    """The committed states of a run.

    Args:
        root: Folder that holds one folder a step.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._said: set[str] = set()

    def folder(self, step: int) -> str:
        """Returns the folder that holds the parts of a step."""
        return f"{self.root}/step-{step:06d}"

    def begin(self, step: int) -> None:
        """Takes away what stands in a step's folder; call it before its parts are written."""
        folder = self.folder(step)
        if is_folder(folder):
            self._delete(step)

    def commit(
        self, step: int, manifest: Mapping[str, Any], digests: Mapping[str, str] | None = None
    ) -> None:
        """Makes a checkpoint exist, once all its parts are written.

        Args:
            step: Its number.
            manifest: What to know about it, as JSON; `step`, and the sizes and digests of the parts
                are added.
            digests: SHA-256 by part, from those who wrote them; others are computed here.

        Raises:
            StorageError: There are no parts, or one that was written is gone.
        """
        folder = self.folder(step)
        sizes = file_sizes(folder)
        sizes.pop(MANIFEST, None)
        known = digests or {}
        gone = ", ".join(sorted(known.keys() - sizes.keys()))
        if gone or not sizes:
            found = f"no {gone} in {folder}" if gone else f"no files in {folder}"
            raise StorageError(f"committing checkpoint {step}", found, "its parts, written")
        missing = [name for name in sizes if name not in known]
        content = {
            **manifest,
            "step": step,
            "files": sizes,
            "sha256": {name: known[name] for name in sizes if name in known}
            | self._digests(step, missing),
        }
        write_json(f"{folder}/{MANIFEST}", content)

    def manifest(self, step: int) -> dict[str, Any]:
        """Returns the manifest that `commit` wrote.

        Raises:
            StorageError: The step has not been committed, or its manifest is broken.
        """
        path = f"{self.folder(step)}/{MANIFEST}"
        content = read_json(path)
        if not isinstance(content, dict) or not content.get("files"):
            raise StorageError(f"reading {path}", "it names no parts", "what a run wrote")
        for name, kind in (("files", int), ("sha256", str)):
            parts = content.get(name, {})
            if not isinstance(parts, dict) or not all(isinstance(v, kind) for v in parts.values()):
                found = f"{name} does not give each part its {kind.__name__}"
                raise StorageError(f"reading {path}", found, "what a run wrote")
        return content

    def fault(self, step: int, *, contents: bool = False) -> str:
        """Says what is wrong with a checkpoint; empty where it is whole.

        Args:
            step: Its number.
            contents: Read every part and compare its digest too, not only its size.
        """
        found = file_sizes(self.folder(step))
        if MANIFEST not in found:
            return f"no {MANIFEST}: it was never finished"
        try:
            manifest = self.manifest(step)
        except StorageError as error:
            return f"{MANIFEST}: {error.found}"
        if manifest.get("step", step) != step:
            return f"{MANIFEST} is that of step {manifest['step']}"
        for name, size in manifest["files"].items():
            if found.get(name) != size:
                now = f"{found[name]} bytes" if name in found else "missing"
                return f"{name} is {now}; {size} bytes were written"
        expected = manifest.get("sha256", {}) if contents else {}
        actual = self._digests(step, [name for name in expected if name in manifest["files"]])
        for name, digest in actual.items():
            if digest != expected[name]:
                return (
                    f"{name} is not what was written (sha256 {digest[:12]}..., in the manifest "
                    f"{expected[name][:12]}...)"
                )
        return ""

    def has_digests(self, step: int) -> bool:
        """Returns True if the manifest has digests of all parts; old manifests have sizes only."""
        manifest = self.manifest(step)
        return manifest["files"].keys() <= manifest.get("sha256", {}).keys()

    def all_steps(self) -> list[int]:
        """Steps of all folders, complete or not, oldest first."""
        with opened_store(self.root, f"listing {self.root}") as (files, path):
            try:
                entries = files.ls(path, detail=False)
            except FileNotFoundError:
                return []
        names = [_STEP_FOLDER.fullmatch(PurePosixPath(entry).name) for entry in entries]
        return sorted(int(name[1]) for name in names if name)

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, by their sizes, oldest first."""
        return [step for step in self.all_steps() if self._is_complete(step)]

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, by its sizes, or None."""
        return next((step for step in reversed(self.all_steps()) if self._is_complete(step)), None)

    def set_aside(self, step: int) -> None:
        """Makes a broken checkpoint count no longer; its parts stay until it is pruned."""
        folder = self.folder(step)
        with opened_store(folder, f"setting {folder} aside") as (files, path):
            if files.exists(f"{path}/{MANIFEST}"):
                files.mv(f"{path}/{MANIFEST}", f"{path}/{_SET_ASIDE}")

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
        for step in self.all_steps():
            # A newer folder without a manifest may be one that is being written.
            if step not in kept and step not in spared and step < kept[-1]:
                self._delete(step)

    def _is_complete(self, step: int) -> bool:
        fault = self.fault(step)
        said = f"ignoring checkpoint {step}: {fault}"
        if fault and not fault.startswith(f"no {MANIFEST}") and said not in self._said:
            self._said.add(said)
            _log.warning("%s", said)
        return not fault

    def _digests(self, step: int, names: Collection[str]) -> dict[str, str]:
        """SHA-256 of some parts; several are read at once."""
        folder = self.folder(step)
        with storage_errors(f"reading {folder}"), ThreadPoolExecutor(_AT_ONCE) as pool:
            files, path = open_store(folder)
            found = pool.map(lambda name: sha256_of(f"{path}/{name}", files), names)
            return dict(zip(names, found, strict=True))

    def _delete(self, step: int) -> None:
        folder = self.folder(step)
        with opened_store(folder, f"deleting {folder}") as (files, path):
            # Without its manifest it no longer exists, should we die half-way.
            if files.exists(f"{path}/{MANIFEST}"):
                files.rm_file(f"{path}/{MANIFEST}")
            files.rm(path, recursive=True)
