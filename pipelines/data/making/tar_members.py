"""Members of a tar, read from its headers only, and everything in it that cannot be used."""

import itertools
import tarfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

_BLOCK = tarfile.BLOCKSIZE
_SCAN_BYTES = 2**20
_HEADER_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in a tar.

    Attributes:
        name: Its path in the tar.
        offset: First byte of its content within the tar.
        num_bytes: Size of its content.
        archive: Number of its tar among those that are joined.
    """

    name: str
    offset: int
    num_bytes: int
    archive: int = 0

    @property
    def suffix(self) -> str:
        """Its last extension, in lower case."""
        return PurePosixPath(self.name).suffix.lower()

    @property
    def key(self) -> str:
        """Its path without the last extension, which the parts of one clip share."""
        return str(PurePosixPath(self.name).with_suffix(""))


@dataclass(frozen=True, slots=True)
class TarFault:
    """A member, or the rest of a tar, that cannot be used.

    Attributes:
        name: Path of the member; None where the tar itself is damaged.
        detail: What was found.
    """

    name: str | None
    detail: str


def read_members(file: BinaryIO) -> Iterator[TarMember | TarFault]:
    """Lists the files of a tar, and of further tars that are joined to its end.

    Folders and the files that macOS adds (`._name`, `__MACOSX/`) are left out.

    Args:
        file: The tar, which can be sought in.

    Yields:
        Members with content, and faults: links that lead nowhere, sparse files, devices, a tar that
        is cut short, damaged or followed by other data.
    """
    num_bytes = file.seek(0, 2)
    start = 0
    for archive in itertools.count():
        file.seek(start)
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - `file` is the caller's
        except _HEADER_ERRORS as error:
            yield TarFault(None, f"{error}, at byte {start}: nothing from there on is read")
            return
        fault = yield from _members_of_one(tar, num_bytes, archive)
        if fault is None:
            fault, start = _after(file, tar.offset, num_bytes)
        if fault is not None:
            yield TarFault(None, fault)
            return
        if start >= num_bytes:
            return


def _members_of_one(
    tar: tarfile.TarFile, num_bytes: int, archive: int
) -> Generator[TarMember | TarFault, None, str | None]:
    """Yields what one tar holds; returns what ended it before its end, if anything did."""
    known: dict[str, TarMember] = {}
    while True:
        try:
            entry = tar.next()
        except _HEADER_ERRORS as error:
            return f"{error}: what follows in this tar is not read"
        if entry is None:
            return None
        # The library keeps every header, which a tar with millions of members does not allow.
        cast("Any", tar).members = []
        if entry.size < 0 or tar.offset < entry.offset_data:
            return f"{entry.name} has an impossible size: what follows in this tar is not read"
        if entry.isreg() and entry.offset_data + entry.size > num_bytes:
            return f"cut short within {entry.name}: what follows in this tar is not read"
        found = _member(entry, known, archive)
        if isinstance(found, TarMember):
            known[str(PurePosixPath(found.name))] = found
        if found is not None:
            yield found


def _member(
    entry: tarfile.TarInfo, known: dict[str, TarMember], archive: int
) -> TarMember | TarFault | None:
    path = PurePosixPath(entry.name)
    if entry.isdir() or path.name.startswith("._") or "__MACOSX" in path.parts:
        return None
    # ./a.mp4 and a.mp4 are one path.
    if str(path) in known:
        return TarFault(entry.name, "an earlier member of this tar has the same name")
    if entry.islnk():
        target = known.get(str(PurePosixPath(entry.linkname)))
        if target is None:
            return TarFault(entry.name, f"a hard link to {entry.linkname}, which is not before it")
        return TarMember(entry.name, target.offset, target.num_bytes, archive)
    if entry.issym():
        return TarFault(entry.name, f"a symbolic link to {entry.linkname}; links are not followed")
    if entry.issparse():
        return TarFault(entry.name, "a sparse file; pack it without --sparse")
    if not entry.isreg():
        return TarFault(entry.name, "a device or a pipe, not a file")
    return TarMember(entry.name, entry.offset_data, entry.size, archive)


def _after(file: BinaryIO, offset: int, num_bytes: int) -> tuple[str | None, int]:
    """Looks at what follows the last member: a fault, or where the next tar begins."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if not block:
        return f"no end mark at byte {offset}: the tar is cut, members may be missing", num_bytes
    if block.strip(b"\0"):
        return f"a damaged header at byte {offset}: what follows in this tar is not read", num_bytes
    place = offset + len(block)
    while chunk := file.read(_SCAN_BYTES):
        rest = chunk.lstrip(b"\0")
        if rest:
            return None, (place + len(chunk) - len(rest)) // _BLOCK * _BLOCK
        place += len(chunk)
    return None, num_bytes
