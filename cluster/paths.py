"""Local paths: the kind of a file, and checks before it is read or written."""

import errno
import os
import stat
import tempfile
from collections.abc import Collection
from pathlib import Path

from cluster.errors import StorageError
from sgmd_core.errors import ConfigError

_ELSEWHERE = "Choose another path"


def kind_of_path(path: str | Path) -> str:
    """Kind of what stands at a local path, in words: "a file", "a folder", "a named pipe", ...

    Links are followed; "" where nothing is there.
    """
    if not os.path.lexists(path):
        return ""
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return "a link that leads nowhere"
        return f"a path that cannot be looked at ({error.strerror})"
    kinds = (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((words for is_it, words in kinds if is_it(mode)), "a device")


def real_path(path: str | Path) -> Path:
    """The absolute path that a path leads to by its links; a link that leads to itself stays."""
    return Path(os.path.realpath(path))


def nearest_folder(path: str | Path) -> Path:
    """A path if it is a folder, or the nearest folder above it; links are followed.

    Args:
        path: A local path, of which a part may not be there.
    """
    whole = Path(path).absolute()
    return next(each for each in (whole, *whole.parents) if kind_of_path(each) == "a folder")


def require_file(path: str | Path) -> None:
    """Checks that nothing but a file, or nothing at all, stands at a local path.

    Reading a named pipe or a device would wait without end, or find none.

    Raises:
        StorageError: Something else is there.
    """
    if (kind := kind_of_path(path)) not in ("", "a file"):
        remedy = "Move it away, or put the file from a copy in its place"
        raise StorageError(f"reading {path}", kind, "a file, or none", remedy)


def require_writable(folder: str | Path, setting: str, *, is_file: bool = False) -> None:
    """Checks before a long job that its results can be written; makes nothing.

    Args:
        folder: Local folder that is written to; it may not be there yet.
        setting: Setting or option that gave it.
        is_file: It is a file to write instead.

    Raises:
        ConfigError: A path of another kind is in the way, or nothing can be written there.
    """
    attempted = f"writing to {folder} ({setting})"
    path = Path(folder).absolute()
    if is_file and (kind := kind_of_path(path)) not in ("", "a file"):
        raise ConfigError(attempted, f"{kind} of that name", "a file, or a free name", _ELSEWHERE)
    above = (*path.parents,) if is_file else (path, *path.parents)
    in_way = next((one for one in above if kind_of_path(one) not in ("", "a folder")), None)
    if in_way is not None:
        raise ConfigError(attempted, f"{in_way} is {kind_of_path(in_way)}", "a folder", _ELSEWHERE)
    there = nearest_folder(above[0])
    try:
        # Rights alone do not tell: a disk may be read-only.
        with tempfile.TemporaryFile(dir=there):
            longest = os.pathconf(there, "PC_NAME_MAX")
    except OSError as error:
        raise ConfigError(
            attempted,
            f"nothing can be written to {there} ({error.strerror or error})",
            "a folder that this user may write to",
            f"{_ELSEWHERE}, or correct its rights",
        ) from error
    if any(len(os.fsencode(name)) > longest for name in path.parts):
        found = f"a name of more than {longest} bytes"
        raise ConfigError(attempted, found, "shorter names", _ELSEWHERE)


def require_own_files(folder: str | Path, spared: Collection[str] = ()) -> None:
    """Checks that writing below a local folder changes nothing outside of it.

    A folder may come from elsewhere, and writers follow its links.

    Args:
        folder: The folder; one that is not there has no links.
        spared: Names of sub-folders that are only ever replaced whole; they are not looked into.

    Raises:
        ConfigError: A symbolic link leads out of it.
    """
    inside = Path(os.path.realpath(folder))
    for root, folders, names in os.walk(inside):
        for name in (*folders, *names):
            path = Path(root, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise ConfigError(
                    f"writing to {folder}",
                    f"{path} is a link to {path.readlink()}",
                    "files of its own: what a link leads to would be overwritten",
                    "Remove the link, or put the file or folder itself in its place. Where it leads"
                    f" to a larger disk, move the whole of {folder} there and go on with it at its "
                    f"new place (of a run: mv {folder} DISK/ and output=DISK), or mount the disk at"
                    f" {path}",
                )
        folders[:] = [name for name in folders if name not in spared]
