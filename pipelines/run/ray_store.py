"""Files of Ray's libraries at an address: Tune's record of its trials, Ray Train's checkpoints.

Tune copies all of its files to where they are kept once a second, changed or not. A file that has
not changed is sent once.
"""

import hashlib
import io
import sys
import threading
from collections.abc import Callable
from typing import Any

from pyarrow.fs import FSSpecHandler, PyFileSystem
from pyarrow.lib import PythonFile

from cluster.files import write_whole
from cluster.storage_errors import storage_errors
from cluster.stores import open_store


def ray_store(address: str) -> tuple[PyFileSystem, str]:
    """The file system that a library of Ray keeps its files in, and the path of an address in it.

    Args:
        address: Of an object store.
    """
    files, path = open_store(address)
    return PyFileSystem(ChangedFiles(files, address)), path


class ChangedFiles(FSSpecHandler):
    """A file system of pyarrow's over one of fsspec's, in which files are objects, written whole.

    Args:
        files: The object store.
        address: Any address in it. Keys are not written down with it: a process that takes this
            over opens the store with its own.
    """

    def __init__(self, files: Any, address: str) -> None:  # noqa: ANN401
        super().__init__(files)
        self._address = address
        self._lock = threading.Lock()
        self._sent: dict[str, bytes] = {}

    def __reduce__(self) -> tuple[Callable[[str], "ChangedFiles"], tuple[str]]:
        return _opened, (self._address,)

    def create_dir(self, path: str, recursive: bool) -> None:
        """Does nothing: a store has no folders, and buckets are not ours to make."""

    def get_file_info(self, paths: list[str]) -> Any:  # noqa: ANN401 - as pyarrow has it
        """Facts of files as they are now."""
        self.fs.invalidate_cache()
        return super().get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:  # noqa: ANN401 - as pyarrow has it
        """Facts of files in a folder as they are now."""
        self.fs.invalidate_cache()
        return super().get_file_info_selector(selector)

    def delete_file(self, path: str) -> None:
        """Deletes a file; the same content may be written to it again."""
        with self._lock:
            self._sent.pop(path, None)
        super().delete_file(path)

    def delete_dir(self, path: str) -> None:
        """Deletes a folder; as `delete_file`."""
        with self._lock:
            for sent in [each for each in self._sent if each.startswith(f"{path.rstrip('/')}/")]:
                del self._sent[sent]
        super().delete_dir(path)

    def open_output_stream(self, path: str, metadata: Any) -> PythonFile:  # noqa: ANN401
        """A file that is sent when it is closed."""
        return PythonFile(_Draft(lambda content: self._send(path, content)), mode="w")

    def _send(self, path: str, content: bytes) -> None:
        digest = hashlib.sha256(content).digest()
        with self._lock:
            if self._sent.get(path) == digest:
                return
        place = self.fs.unstrip_protocol(path)
        with storage_errors(f"writing {place}"):
            write_whole(path, content, self.fs)
        with self._lock:
            self._sent[path] = digest


def _opened(address: str) -> ChangedFiles:
    return ChangedFiles(open_store(address)[0], address)


class _Draft(io.BytesIO):
    """A file in memory, sent when it is closed; what was interrupted on the way is dropped.

    Args:
        send: Takes its content.
    """

    def __init__(self, send: Callable[[bytes], None]) -> None:
        super().__init__()
        self._send = send
        # A `with` closes the file after an error inside, too; one from before is not ours.
        self._error_before = sys.exception()

    def close(self) -> None:
        """Sends the content, once."""
        if not self.closed:
            content = self.getvalue()
            super().close()
            if sys.exception() is self._error_before:
                self._send(content)

    def __del__(self) -> None:
        """Drops it: a copy that fails releases its file without closing it."""
