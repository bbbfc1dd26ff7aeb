"""Probe of one machine: the worker that `sgmd doctor --address` starts on each."""

import hashlib
import platform
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from torch import Tensor

from cluster.ray.capacity import capacity_here
from cluster.ray.rendezvous import Rendezvous, join_rendezvous, open_rendezvous
from pipelines.config.model_folders import PROJECT_ROOT, model_on_this_machine
from pipelines.doctoring.findings import Finding
from pipelines.doctoring.machine import examine_machine
from pipelines.doctoring.models import stored_sizes
from pipelines.doctoring.storage import leave_marker, remove_marker, sees_marker, try_storage
from workers.models.addresses import is_address
from workers.models.content import model_digests

_SOURCES = ("sgmd", "sgmd_core", "workers", "cluster", "pipelines")
_MAIN_PACKAGES = ("ray", "torch", "diffusers", "transformers", "numpy", "pyarrow")


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """Facts of one machine that are compared with those of others.

    Attributes:
        host: Its own name for itself.
        versions: Of Python, of our dependencies, and of our sources (a digest), by name.
        num_gpus: GPUs that torch sees.
        free_gpu_bytes: Free memory of the fullest of them.
        shared_memory_bytes: Size of /dev/shm; 0 where there is none.
        findings: Of the checks of a single machine.
    """

    host: str
    versions: dict[str, str]
    num_gpus: int = 0
    free_gpu_bytes: int = 0
    shared_memory_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Reduced:
    """Result of an all-reduce.

    Attributes:
        seconds: Of one, on average.
        is_right: Whether every rank's sum was.
    """

    seconds: float
    is_right: bool


class MachineProbe:
    """Looks at its machine and takes part in what is tried between machines."""

    def __init__(self) -> None:
        self._store: dist.TCPStore | None = None

    def look(self) -> MachineFacts:
        """Looks at everything that concerns this machine alone."""
        shared = Path("/dev/shm")
        gpus = range(len(capacity_here().gpu_bytes))
        return MachineFacts(
            socket.gethostname(),
            versions_here(),
            num_gpus=len(gpus),
            free_gpu_bytes=min((torch.cuda.mem_get_info(gpu)[0] for gpu in gpus), default=0),
            shared_memory_bytes=shutil.disk_usage(shared).total if shared.is_dir() else 0,
            findings=examine_machine(),
        )

    def time_of_day(self) -> float:
        """Seconds since 1970 on this machine's clock."""
        return time.time()

    def try_storage(self, folder: str) -> Finding:
        """Writes to and reads from storage; see `doctoring.storage`."""
        return try_storage(folder)

    def leave_marker(self, folder: str) -> str:
        """Leaves a file for the other machines to see."""
        return leave_marker(folder)

    def sees_marker(self, path: str) -> bool:
        """Returns True if the file is seen here."""
        return sees_marker(path)

    def remove_marker(self, path: str) -> None:
        """Deletes the file of the storage check."""
        remove_marker(path)

    def model_content(self, model: str) -> dict[str, str]:
        """Digest of each component of a model here; at an address, of names and sizes."""
        if is_address(model):
            lines = [f"{name} {size}" for name, size in stored_sizes(model).items()]
            digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
            return {f"{len(lines)} objects": digest}
        return model_digests(model_on_this_machine(model))

    def open_rendezvous(self, size: int, address: str, on_one_machine: bool) -> Rendezvous:
        """Opens the place where the probes meet, and keeps it."""
        self._store, rendezvous = open_rendezvous(
            size, address, on_one_machine=on_one_machine, timeout_s=60.0
        )
        return rendezvous

    def join_rendezvous(
        self, rendezvous: Rendezvous, rank: int, gpu: int, timeout_s: float
    ) -> None:
        """Joins the other probes.

        Args:
            rendezvous: Where.
            rank: Of this probe.
            gpu: Index of its GPU; below 0: it reduces in main memory.
            timeout_s: How long the others may take.
        """
        if gpu >= 0:
            torch.cuda.set_device(gpu)
        join_rendezvous(rendezvous, rank, timeout_s, self._store)

    def all_reduce(self, num_bytes: int, repeats: int, on_gpu: bool) -> Reduced:
        """Sums a tensor over all probes, several times.

        Args:
            num_bytes: Size of the tensor.
            repeats: Times that count; one comes before them.
            on_gpu: By NCCL on this probe's GPU; else by Gloo in main memory.
        """
        device = torch.device("cuda" if on_gpu else "cpu")
        values = torch.empty(num_bytes // 4, device=device)
        expected = sum(range(1, dist.get_world_size() + 1))
        is_right, started_s = True, 0.0
        for turn in range(repeats + 1):
            if turn == 1:
                started_s = time.monotonic()
            values.fill_(dist.get_rank() + 1)
            dist.all_reduce(values)
            is_right = is_right and bool((values == expected).all())
        return Reduced((time.monotonic() - started_s) / repeats, is_right)

    def make_object(self, num_bytes: int) -> Tensor:
        """Makes a value for another machine."""
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def take_object(self, value: Tensor) -> int:
        """Takes a value of another machine in."""
        return value.numel()


def make_probe() -> MachineProbe:
    """Builds the worker of a probe's process."""
    return MachineProbe()


def versions_here() -> dict[str, str]:
    """Versions of Python, of our dependencies, and a digest of our sources, on this machine."""
    found = {"Python": platform.python_version(), "sgmd sources": _sources_digest()}
    try:
        names = [Requirement(text).name for text in requires("sgmd") or [] if "extra" not in text]
    except PackageNotFoundError:
        names = list(_MAIN_PACKAGES)
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not there"
    return found


def _sources_digest(folders: Sequence[str] = _SOURCES) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((PROJECT_ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(PROJECT_ROOT)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
