"""Places of folders: a path of a disk, or an address of an object store.

A run at an address is worked on in a folder of this machine's disk, its *working copy*. This module
knows the working copies that this process has open:

    s3://bucket/runs/x  <->  ~/.cache/sgmd/runs/x.HOST-7-1f/     local_of, shared_place
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from cluster.stores import store_address
from sgmd_core.errors import ConfigError

# At the head of a name, and before brackets, the sign is a shell's; inside a name it may be meant.
_SHELL = re.compile(r"(?:^|/)(\$\w+)|(\$\{[^}]*\}?|\$\([^)]*\)?)")
_INSIDE = re.compile(r"\$([A-Za-z_]\w*)")
_COPIES: dict[Path, str] = {}


def add_copy(root: Path, address: str) -> None:
    """Lets a local folder stand for an address, until `remove_copy`."""
    _COPIES[root] = address


def remove_copy(root: Path) -> None:
    """Forgets that a local folder stands for an address; does nothing if it does not."""
    _COPIES.pop(root, None)


def open_copy_of(place: str | Path) -> Path | None:
    """The local folder that stands for an address, or is a part of one that does; or None."""
    address = store_address(place)
    # The longest first: a folder of runs may be open, and one of the runs.
    for root, other in sorted(_COPIES.items(), key=lambda entry: -len(entry[1])):
        if address == other:
            return root
        if address.startswith(f"{other}/"):
            return root / address.removeprefix(f"{other}/")
    return None


def local_of(place: str | Path) -> Path:
    """The folder of this machine's disk where a place is read and written.

    Raises:
        ConfigError: The place is an address, and this process has no working copy of it.
    """
    if not store_address(place):
        return Path(place).absolute()
    root = open_copy_of(place)
    if root is None:
        raise ConfigError(
            f"reading {store_address(place)}",
            "an address of which this process has no working copy",
            "a path, or an address inside `with working_copy(address):`",
            "Open one with pipelines.run.opened_copy.working_copy",
        )
    return root


def shared_place(path: str | Path) -> str:
    """The place that a path stands for: its address in a working copy, else the path itself."""
    if address := store_address(path):
        return address
    found = Path(path).absolute()
    for root, address in _COPIES.items():
        if found == root:
            return address
        if found.is_relative_to(root):
            return f"{address}/{found.relative_to(root).as_posix()}"
    return str(path)


def require_written_out(place: str | Path, attempted: str) -> None:
    """Checks that results do not go to a place that a shell was meant to write out.

    Args:
        place: As it was given, with the home of this user in place of `~`.
        attempted: Purpose, for the error.

    Raises:
        ConfigError: It names a variable or the home of an unknown user, or begins with a blank.
    """
    given = str(place)
    if variable := next(_for_a_shell(given), ""):
        found = f"{variable}, which nothing replaces here"
    elif given.startswith("~"):
        found = f"{given.partition('/')[0]}, the home of a user that this machine does not have"
    elif not given[:1].strip():
        found = "a path that begins with a blank" if given else "an empty path"
    else:
        return
    raise ConfigError(
        attempted,
        found,
        "a path or an address that is written out",
        'Write it out; in a command a shell replaces a variable that stands in no quotes, or in "',
    )


def _for_a_shell(given: str) -> Iterator[str]:
    """Parts of a place that a shell replaces."""
    yield from (head or brackets for head, brackets in _SHELL.findall(given))
    yield from (f"${name}" for name in _INSIDE.findall(given) if name in os.environ)


def is_path_inside(name: str) -> bool:
    """Returns True if the rest of an object's key is a plain relative path: no `..`, no `//`."""
    path = PurePosixPath(name)
    is_plain = path.as_posix() == name and "\0" not in name
    return is_plain and not path.is_absolute() and not {".", ".."}.intersection(path.parts or ".")
