"""`sgmd doctor`: what this machine has, what is missing, and how to get it.

Each check looks at one thing and comes back with a finding; none changes anything that stays.
"""

import os
import platform
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from packaging.requirements import Requirement

from cluster.files import open_store
from cluster.inventory import memory_bytes, take_inventory
from cluster.runtime import start_ray
from cluster.s3.settings import S3Settings
from pipelines.config.model_folders import PROJECT_ROOT
from pipelines.media.video import decode_video, encode_mp4
from sgmd_core.errors import SgmdError
from workers.models.families import family_of

_GIB = 2**30
_MIN_MEMORY_BYTES = 4 * _GIB
_MIN_SHARED_MEMORY_BYTES = 1 * _GIB
_MIN_DISK_BYTES = 5 * _GIB
# Ray's sockets lie deep under its temporary folder, and a socket's path has at most 107 bytes.
_MAX_TEMP_PATH_BYTES = 45
# A clip decoded from H.264 differs a little from what was encoded.
_MAX_CODEC_ERROR = 24
_STORAGE_S = 20.0  # a request to an S3 server


class Status(StrEnum):
    """Outcome of a check."""

    GOOD = "good"
    LIMITED = "limited"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of a check.

    Attributes:
        name: What was looked at.
        status: `LIMITED` slows down or narrows what can be done; `MISSING` makes runs fail.
        found: What is there, with figures.
        remedy: What to do about it, where something is to be done.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def examine(address: str | None = None, storage: str | None = None) -> list[Finding]:
    """Looks at everything that a run needs.

    Args:
        address: Ray cluster to reach as well, `auto` or `HOST:PORT`.
        storage: Folder or `s3://bucket/prefix` to write to and read from as well.

    Returns:
        One finding a check.
    """
    checks: list[Callable[[], Finding]] = [
        _python,
        _packages,
        _cores,
        _memory,
        _gpus,
        _shared_memory,
        _temporary_folder,
        _disk,
        _codec,
        _tiny_model,
    ]
    findings = [check() for check in checks]
    if storage is not None:
        findings.append(_storage(storage))
    if address is not None:
        findings.append(_ray_cluster(address))
    return findings


def _python() -> Finding:
    return Finding("Python", Status.GOOD, f"{platform.python_version()} on {platform.platform()}")


def _packages() -> Finding:
    """Every dependency of sgmd, against its lower bound."""
    try:
        wanted = [Requirement(text) for text in requires("sgmd") or []]
    except PackageNotFoundError:
        return Finding(
            "packages", Status.LIMITED, "sgmd itself is not installed", "pip install -e ."
        )
    wanted = [item for item in wanted if item.marker is None or item.marker.evaluate()]
    wrong: list[str] = []
    found: list[str] = []
    for item in wanted:
        try:
            installed = version(item.name)
        except PackageNotFoundError:
            wrong.append(f"{item.name} is not there")
            continue
        if not item.specifier.contains(installed, prereleases=True):
            wrong.append(f"{item.name} {installed} is not {item.specifier}")
        found.append(f"{item.name} {installed}")
    if wrong:
        remedy = "pip install -c constraints.txt -e ."
        return Finding("packages", Status.MISSING, ", ".join(wrong), remedy)
    return Finding("packages", Status.GOOD, ", ".join(found))


def _cores() -> Finding:
    # Fewer than the machine has, where a container or taskset says so.
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if usable < 2:
        return Finding("cores", Status.LIMITED, f"{usable}", "The roles share it and take turns")
    return Finding("cores", Status.GOOD, f"{usable}")


def _memory() -> Finding:
    total, free = memory_bytes()
    found = f"{_gib(free)} free of {_gib(total)}"
    if free < _MIN_MEMORY_BYTES:
        remedy = f"The tiny recipe needs about {_gib(_MIN_MEMORY_BYTES)}; end other programs"
        return Finding("memory", Status.LIMITED, found, remedy)
    return Finding("memory", Status.GOOD, found)


def _gpus() -> Finding:
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else ", and torch is built without CUDA"
        remedy = "Enough for the tiny recipe; a real model needs NVIDIA GPUs and torch with CUDA"
        return Finding("GPUs", Status.LIMITED, f"none{built}", remedy)
    names = [
        f"{device.name} {_gib(device.total_memory)}"
        for device in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    return Finding("GPUs", Status.GOOD, f"{len(names)}: {', '.join(names)}")


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding(
            "/dev/shm", Status.LIMITED, "not there", "Ray's object store will use a disk"
        )
    total = shutil.disk_usage(folder).total
    if total < _MIN_SHARED_MEMORY_BYTES:
        remedy = "Ray's object store lives there; in Docker, start with --shm-size=2g or more"
        return Finding("/dev/shm", Status.LIMITED, _gib(total), remedy)
    return Finding("/dev/shm", Status.GOOD, _gib(total))


def _temporary_folder() -> Finding:
    folder = tempfile.gettempdir()
    if len(folder.encode()) > _MAX_TEMP_PATH_BYTES:
        remedy = "Ray's sockets need a short path: set TMPDIR=/tmp"
        return Finding("temporary folder", Status.LIMITED, folder, remedy)
    return Finding("temporary folder", Status.GOOD, folder)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{_gib(free)} free in {Path.cwd()}"
    if free < _MIN_DISK_BYTES:
        remedy = "Checkpoints of large models fill a disk; set output=... to a larger one"
        return Finding("disk", Status.LIMITED, found, remedy)
    return Finding("disk", Status.GOOD, found)


def _codec() -> Finding:
    """Encodes and decodes a clip, since a build of FFmpeg may lack either half of H.264."""
    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    clip = np.broadcast_to(ramp[None, None, :, None], (5, 32, 32, 3)).copy()
    try:
        decoded = decode_video(encode_mp4(clip, fps=8))
    except (SgmdError, OSError, ValueError) as error:
        remedy = "Install PyAV from its wheel, which brings FFmpeg: pip install --force av"
        return Finding("H.264", Status.MISSING, f"{type(error).__name__}: {error}", remedy)
    worst = int(np.abs(decoded.astype(int) - clip.astype(int)).max())
    if decoded.shape != clip.shape or worst > _MAX_CODEC_ERROR:
        found = f"{clip.shape} came back as {decoded.shape}, off by {worst} of 255"
        return Finding("H.264", Status.MISSING, found, "Reinstall PyAV: pip install --force av")
    return Finding("H.264", Status.GOOD, "encodes and decodes")


def _tiny_model() -> Finding:
    folder = PROJECT_ROOT / "assets" / "tiny-wan"
    try:
        model = family_of(folder).inspect(folder)
    except SgmdError as error:
        remedy = "It comes with the source tree: clone it whole and run from there"
        return Finding("tiny model", Status.LIMITED, str(error), remedy)
    parameters = sum(model.num_parameters.values())
    return Finding("tiny model", Status.GOOD, f"{folder} ({parameters / 1e6:.1f} M parameters)")


def _storage(folder: str) -> Finding:
    """Writes, reads and deletes one small object; nothing that was not there before stays."""
    name = f"storage {folder}"
    payload = uuid.uuid4().bytes
    address = f"{folder.rstrip('/')}/sgmd-doctor-{uuid.uuid4().hex}"
    try:
        filesystem, path = open_store(address, S3Settings(read_budget_s=_STORAGE_S))
        # On an object store this might create a bucket, which is not ours to decide.
        is_local = isinstance(filesystem, LocalFileSystem)
        with _folders_for(Path(path)) if is_local else nullcontext():
            filesystem.pipe_file(path, payload)
            try:
                read = filesystem.cat_file(path)
            finally:
                filesystem.rm_file(path)
    # Whatever a storage client raises, it is what is to be reported.
    except Exception as error:
        remedy = (
            "Check AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and that the bucket "
            "exists"
            if "://" in folder
            else "Check the folder and the rights to it"
        )
        return Finding(name, Status.MISSING, f"{type(error).__name__}: {error}", remedy)
    if read != payload:
        return Finding(name, Status.MISSING, "reads back something else", "Try another folder")
    return Finding(name, Status.GOOD, "writes, reads and deletes")


@contextmanager
def _folders_for(path: Path) -> Iterator[None]:
    """Makes the folders above a path, and deletes those of them that were not there."""
    missing = [each for each in path.parents if not each.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            with suppress(OSError):  # Another process may have put something there.
                folder.rmdir()


def _ray_cluster(address: str) -> Finding:
    name = f"Ray at {address}"
    try:
        with start_ray(address):
            found = take_inventory()
    except SgmdError as error:
        return Finding(name, Status.MISSING, error.found, f"Expected {error.expected}")
    return Finding(
        name,
        Status.GOOD,
        f"{found.num_nodes} machines, {found.free_cpus:g} of {found.cpus:g} CPUs and "
        f"{found.free_gpus:g} of {found.gpus:g} GPUs free",
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"
