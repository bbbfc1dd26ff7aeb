"""Find a model on this machine by what a user calls it.

    /disk/folder                            the folder
    .../models--OWNER--NAME                 the snapshot of the hub's cache that refs/main names
    s3://bucket/folder                      a copy in the user's cache, made once a machine
    OWNER/NAME                              refused, with the line that downloads it

Copies are named by the names, sizes and entity tags of the objects, so that a changed model gets a
copy of its own, and become visible whole.
"""

import fcntl
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.callbacks import Callback

from cluster.files import cache_folder, whole_folder
from cluster.paths import kind_of_path
from cluster.storage_errors import storage_errors
from cluster.stores import open_store, opened_store, store_address
from sgmd_core.errors import ModelFolderError
from workers.models.configs import INDEX_FILE, REMEDY

_ON_DISK = re.compile(r"file:/+(.+)")
_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)(?:/.*)?/?"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_RELEASED = (
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "Lightricks/LTX-Video",
)
_EXPECTED = "a model folder on a disk, or an address such as s3://bucket/folder"
_MAIN = Path("refs") / "main"
# What tells one content of an object from the next, by the names that stores give it.
_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime")


def is_address(model: str | Path) -> bool:
    """Returns True for an address of an object store; `file:` is a path of a disk."""
    return bool(store_address(model))


def local_model(model: str | Path) -> Path:
    """Folder of a model on this machine; one that is not there is returned as it is.

    Raises:
        ModelFolderError: The hub's cache has no snapshot that is meant, or nothing lies at the
            address, or it is a page of the hub.
        StorageError: The object store cannot be read.
    """
    if page := _HUB_PAGE.fullmatch(str(model)):
        raise _not_downloaded(page[1], f"loading the model {model}", "a page of the hub, which")
    if address := store_address(model):
        return _copy(address)
    on_disk = _ON_DISK.fullmatch(str(model))
    path = Path(model if on_disk is None else f"/{on_disk[1]}").expanduser()
    if (path / "snapshots").is_dir() and not (path / INDEX_FILE).exists():
        return _snapshot(path)
    return path


def is_hub_id(name: str) -> bool:
    """Returns True for what may be an id of the hub: OWNER/NAME."""
    return _HUB_ID.fullmatch(name) is not None


def missing_folder(path: Path, attempted: str, remedy: str = REMEDY) -> ModelFolderError:
    """Refusal of a path that is not a folder; of a hub id, with the line that downloads it."""
    found = kind_of_path(path) or "no such folder"
    released = next((name for name in _RELEASED if name.endswith(f"/{path.name}")), None)
    if found == "no such folder" and released is not None:
        # The recipes name their folders after the models.
        folder = f"models/{path.name}" if str(path) == released else path
        remedy = f"hf download {released} --local-dir {folder}   and give {folder}"
        if str(path) == released:
            found = "no such folder; as an id of the hub it is not downloaded by itself"
    elif found == "no such folder" and is_hub_id(str(path)) and not path.parent.is_dir():
        return _not_downloaded(str(path), attempted, "no such folder; as an id of the hub it")
    return ModelFolderError(attempted, found, _EXPECTED, remedy)


def _not_downloaded(hub_id: str, attempted: str, what: str) -> ModelFolderError:
    """Refusal of a model of the hub, with the line that downloads it."""
    folder = f"models/{hub_id.rpartition('/')[2]}"
    return ModelFolderError(
        attempted,
        f"{what} is not downloaded by itself",
        _EXPECTED,
        f"hf download {hub_id} --local-dir {folder}   and give {folder}",
    )


def _snapshot(cache: Path) -> Path:
    """The snapshot of a folder of the hub's cache that its main branch names, or its only one."""
    snapshots = sorted(path for path in (cache / "snapshots").iterdir() if path.is_dir())
    main = cache / _MAIN
    if main.is_file():
        named = main.read_text(encoding="utf-8").strip()
        wanted = [path for path in snapshots if path.name == named]
    else:
        wanted = snapshots
    if len(wanted) == 1:
        return wanted[0]
    raise ModelFolderError(
        f"looking for a snapshot in {cache}",
        f"{len(snapshots)} snapshots, and {_MAIN} names none of them",
        "one snapshot that is meant",
        f"Give it: {cache / 'snapshots'}/HASH",
    )


def _copy(address: str) -> Path:
    """The copy of an address in the user's cache; made where there is none of this content."""
    objects = _objects(address)
    stamp = _stamp(objects)
    base = cache_folder("models")
    target = base / f"{PurePosixPath(address).name}-{stamp}"
    if target.is_dir():
        return target
    base.mkdir(parents=True, exist_ok=True)
    with (base / f".{stamp}.lock").open("w") as lock:
        # Processes of one machine wait for the one that copies.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            _download(address, objects, target)
    return target


def _objects(address: str) -> Mapping[str, Mapping[str, Any]]:
    """Facts of every object below an address, by its path there."""
    with opened_store(address, f"listing {address}") as (files, root):
        found = files.find(root, detail=True)
    objects = {
        str(PurePosixPath(name).relative_to(root)): facts for name, facts in sorted(found.items())
    }
    if not objects:
        raise ModelFolderError(
            f"copying the model {address}",
            "nothing there",
            "the files of a diffusers folder",
            "Check the address, and the endpoint in AWS_ENDPOINT_URL",
        )
    outside = [name for name in objects if ".." in PurePosixPath(name).parts]
    if outside:
        raise ModelFolderError(
            f"copying the model {address}", f"the name {outside[0]}", "names inside the folder"
        )
    return objects


def _stamp(objects: Mapping[str, Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, facts in objects.items():
        tag = next((str(facts[key]) for key in _TAGS if facts.get(key)), None)
        if tag is None:
            raise ModelFolderError(
                f"copying the model {name}",
                f"a store that names neither tag nor time of its objects ({', '.join(facts)})",
                "one of " + ", ".join(_TAGS),
                "Copy the folder to a disk and name that",
            )
        digest.update(f"{name} {facts['size']} {tag}\n".encode())
    return digest.hexdigest()[:16]


def _download(address: str, objects: Mapping[str, Mapping[str, Any]], target: Path) -> None:
    """Copy every object into a folder that appears whole."""
    from tqdm.auto import tqdm

    attempted = f"copying the model {address} to {target}"
    total = sum(int(facts["size"]) for facts in objects.values())
    bar = tqdm(total=total, desc=f"copying {address}", unit="B", unit_scale=True, disable=None)
    with whole_folder(target) as draft, bar, storage_errors(attempted):
        files: Any
        files, root = open_store(address)
        for name, facts in objects.items():
            local = draft / name
            local.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(f"{root}/{name}", str(local), callback=_Progress(bar))
            if local.stat().st_size != facts["size"]:
                raise _changed(attempted, name)
        if _stamp(_objects(address)) != _stamp(objects):
            raise _changed(attempted, "an object")


def _changed(attempted: str, name: str) -> ModelFolderError:
    return ModelFolderError(
        attempted,
        f"{name} changed while it was copied",
        "objects that stay as they are",
        "Start again when nobody writes there",
    )


class _Progress(Callback):
    """Adds the bytes of a file to the bar of all files."""

    def __init__(self, bar: Any) -> None:  # noqa: ANN401 - tqdm's own class depends on the screen
        super().__init__()
        self._bar = bar

    def relative_update(self, inc: int = 1) -> None:
        """Count bytes that have come."""
        self._bar.update(inc)
