"""Checks of one machine: versions, cores, memory, GPUs, disks, codecs.

Each check looks at one thing and comes back with a finding; none changes anything that stays.
"""

import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement

from cluster.inventory import memory_bytes, num_cores
from pipelines.config.model_folders import PROJECT_ROOT
from pipelines.data.clips.clip_decoding import decode_video
from pipelines.doctoring.findings import GIB, Finding, Status, gib
from pipelines.media.video import encode_mp4
from sgmd_core.errors import SgmdError
from workers.models.families import family_of

_MIN_MEMORY_BYTES = 4 * GIB
_MIN_SHARED_MEMORY_BYTES = 1 * GIB
_MIN_DISK_BYTES = 5 * GIB
# Ray's sockets lie deep under its temporary folder, and a socket's path has at most 107 bytes.
_MAX_TEMP_PATH_BYTES = 45
# A clip decoded from H.264 differs a little from what was encoded.
_MAX_CODEC_ERROR = 24


def examine_machine() -> list[Finding]:
    """Looks at everything that a run needs of this machine; one finding a check."""
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
    return [check() for check in checks]


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
    usable = num_cores()
    if usable < 2:
        return Finding("cores", Status.LIMITED, f"{usable}", "The roles share it and take turns")
    return Finding("cores", Status.GOOD, f"{usable}")


def _memory() -> Finding:
    total, free = memory_bytes()
    found = f"{gib(free)} free of {gib(total)}"
    if free < _MIN_MEMORY_BYTES:
        remedy = f"The tiny recipe needs about {gib(_MIN_MEMORY_BYTES)}; end other programs"
        return Finding("memory", Status.LIMITED, found, remedy)
    return Finding("memory", Status.GOOD, found)


def _gpus() -> Finding:
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else ", and torch is built without CUDA"
        remedy = "Enough for the tiny recipe; a real model needs NVIDIA GPUs and torch with CUDA"
        return Finding("GPUs", Status.LIMITED, f"none{built}", remedy)
    names = [
        f"{device.name} {gib(device.total_memory)}"
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
        return Finding("/dev/shm", Status.LIMITED, gib(total), remedy)
    return Finding("/dev/shm", Status.GOOD, gib(total))


def _temporary_folder() -> Finding:
    folder = tempfile.gettempdir()
    if len(folder.encode()) > _MAX_TEMP_PATH_BYTES:
        remedy = "Ray's sockets need a short path: set TMPDIR=/tmp"
        return Finding("temporary folder", Status.LIMITED, folder, remedy)
    return Finding("temporary folder", Status.GOOD, folder)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{gib(free)} free in {Path.cwd()}"
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
