"""Logs that grow at an object store, which knows no appending: parts beside the log.

    metrics.jsonl                            the log as it was when its writer ended well
    metrics.jsonl.parts/000000-000000000000  generation 0, from byte 0 on
    metrics.jsonl.parts/000000-000000004711  what was added later
    metrics.jsonl.parts/000001-000000000000  generation 1: rewritten, the whole log

The newest generation that has its first part is the log, as far as its parts follow one another;
where there is none, the object itself is. So a crash between any two requests leaves the log as it
was before or after: a log that is rewritten (a resume drops lines) is one object, and parts that
count no longer are deleted from the first one on.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.files import write_whole

PARTS = ".parts"
_NAME = re.compile(r"(\d{6,})-(\d{12,})")
# One more begins a new generation: whoever reads the log asks for every part.
_MAX_PARTS = 100


def parts_in_order(sizes: Mapping[str, int]) -> list[str]:
    """Names of the parts that make up a log; empty where the object itself is the log.

    Args:
        sizes: Size in bytes of each part by name.
    """
    generations: dict[int, dict[int, str]] = {}
    for name in sizes:
        if found := _NAME.fullmatch(name):
            generations.setdefault(int(found[1]), {})[int(found[2])] = name
    for _, parts in sorted(generations.items(), reverse=True):
        if 0 in parts:
            chain, end = [], 0
            while end in parts:
                name = parts.pop(end)
                chain.append(name)
                end += sizes[name]
            return chain
    return []


class LogParts:
    """The writer of one log.

    Args:
        files: An fsspec file system.
        path: The log in it.
    """

    def __init__(self, files: Any, path: str) -> None:  # noqa: ANN401
        self._files = files
        self._path = path
        self.is_joined = False
        """True if this writer has made one object of the log, and has added nothing since."""
        self._sent = 0
        self._digest = b""
        self._parts: list[str] = []
        self._generation: int | None = None

    def send(self, file: Path) -> bool:
        """Sends what has been added to the local file since; returns True if that was all.

        A line without its end is left for the next time. A file that does not begin with what was
        sent is sent whole: its inode would not tell, as one that is free is used again.
        """
        found = file.read_bytes()
        seen = hashlib.sha256(found[: self._sent])
        is_new = not self._parts or len(self._parts) >= _MAX_PARTS or seen.digest() != self._digest
        start, seen = (0, hashlib.sha256()) if is_new else (self._sent, seen)
        data = found[start : found.rfind(b"\n") + 1]
        if data or is_new:
            self._put(data, start, is_new=is_new)
            seen.update(data)
            self._digest = seen.digest()
        return start + len(data) == len(found)

    def _put(self, data: bytes, start: int, *, is_new: bool) -> None:
        earlier = self._there() if self._generation is None else self._parts
        generation = self._generation or 0
        if is_new:
            used = [int(name.partition("-")[0]) for name in earlier]
            generation = max(used, default=generation - 1) + 1
        name = f"{generation:06d}-{start:012d}"
        self.is_joined = False
        # Sent again after an answer that was lost, it replaces itself.
        write_whole(f"{self._path}{PARTS}/{name}", data, self._files)
        self._generation, self._sent = generation, start + len(data)
        if not is_new:
            if name not in self._parts:
                self._parts.append(name)
            return
        self._parts = [name]
        self._delete(earlier)

    def join(self, file: Path) -> None:
        """Makes one object of the log, and deletes its parts."""
        write_whole(self._path, file.read_bytes(), self._files)
        self._delete(self._there())
        self._sent, self._parts, self.is_joined = 0, [], True

    def _there(self) -> list[str]:
        self._files.invalidate_cache()
        try:
            found = self._files.ls(f"{self._path}{PARTS}", detail=False)
        except FileNotFoundError:
            return []
        names = (str(path).rpartition("/")[2] for path in found)
        return sorted(name for name in names if _NAME.fullmatch(name))

    def _delete(self, names: list[str]) -> None:
        # In order: without its first part, a generation counts no longer.
        for name in sorted(names):
            self._files.rm_file(f"{self._path}{PARTS}/{name}")
