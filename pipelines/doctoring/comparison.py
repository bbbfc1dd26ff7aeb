"""Comparison of machines: versions, models, clocks, GPUs and stores, as findings. No Ray here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from packaging.version import InvalidVersion, Version

from pipelines.doctoring.findings import Finding, Status, gib

_CLOCK_LIMITED_S = 1.0
# S3 refuses requests that are signed a quarter of an hour off.
_CLOCK_MISSING_S = 300.0


@dataclass(frozen=True, slots=True)
class ClockReading:
    """One reading of another machine's clock.

    Attributes:
        offset_s: That clock over ours.
        error_s: How far off the reading may be.
    """

    offset_s: float
    error_s: float


def compare_versions(versions: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Differences between the versions of machines, one finding each.

    Args:
        versions: Version by package, by machine.
    """
    packages = list(dict.fromkeys(name for found in versions.values() for name in found))
    findings: list[Finding] = []
    for package in packages:
        machines: dict[str, list[str]] = {}
        for machine, found in versions.items():
            machines.setdefault(found.get(package, "not there"), []).append(machine)
        if len(machines) > 1:
            findings.append(_version_difference(package, machines))
    if not findings:
        count = f"{len(packages)} versions are the same on {len(versions)} machines"
        findings.append(Finding("versions", Status.GOOD, count))
    return findings


def _version_difference(package: str, machines: Mapping[str, Sequence[str]]) -> Finding:
    where = "; ".join(f"{version} on {', '.join(names)}" for version, names in machines.items())
    if len({_public(version) for version in machines}) == 1:
        remedy = "Builds of one version, as for CPU and GPU machines, work together; others may not"
        return Finding(f"version of {package}", Status.LIMITED, where, remedy)
    remedy = (
        "Copy one source tree to all, or run this as a job, which takes its sources along"
        if package == "sgmd sources"
        else "Install one set everywhere: pip install -c constraints.txt -e ., or one image"
    )
    return Finding(f"version of {package}", Status.MISSING, where, remedy)


def _public(version: str) -> str:
    try:
        return Version(version).public
    except InvalidVersion:
        return version


def compare_models(model: str, contents: Mapping[str, Mapping[str, str]]) -> Finding:
    """Compares the copies of a model on all machines.

    Args:
        model: Its folder or address.
        contents: Digest by component, by machine.
    """
    name = f"model {model}"
    different = [
        component
        for component in dict.fromkeys(part for found in contents.values() for part in found)
        if len({found.get(component) for found in contents.values()}) > 1
    ]
    if different:
        part = different[0]
        where = ", ".join(
            f"{found.get(part, 'none')} on {machine}" for machine, found in contents.items()
        )
        remedy = "Copy one folder to all machines, or name one on a shared disk or in S3"
        return Finding(name, Status.MISSING, f"{part} differs: {where}", remedy)
    parts = next(iter(contents.values()), {})
    digests = ", ".join(f"{part} {digest}" for part, digest in parts.items())
    return Finding(name, Status.GOOD, f"the same on {len(contents)} machines: {digests}")


def judge_clock(machine: str, clock: ClockReading) -> Finding:
    """Judges how far a machine's clock is from this one's."""
    found = f"{clock.offset_s:+.3f} s from here, to {clock.error_s:.3f} s"
    off_s = abs(clock.offset_s) - clock.error_s
    remedy = "Run a time service there (chrony, systemd-timesyncd)"
    if off_s > _CLOCK_MISSING_S:
        remedy += "; S3 refuses requests of a clock that is a quarter of an hour off"
        return Finding("clock", Status.MISSING, found, remedy, machine)
    if off_s > _CLOCK_LIMITED_S:
        remedy += "; times in traces, logs and leases do not compare"
        return Finding("clock", Status.LIMITED, found, remedy, machine)
    return Finding("clock", Status.GOOD, found, machine=machine)


def judge_store(machine: str, store_bytes: float, shared_bytes: int) -> Finding:
    """Judges if a machine's object store lies in shared memory."""
    found = f"{gib(store_bytes)}, /dev/shm has {gib(shared_bytes)}"
    if store_bytes > shared_bytes:
        remedy = (
            "The store lies on a disk and is slow: start Ray with a smaller --object-store-memory, "
            "or the container with a larger /dev/shm"
        )
        return Finding("object store", Status.LIMITED, found, remedy, machine)
    return Finding("object store", Status.GOOD, found, machine=machine)


def judge_gpus(machine: str, of_ray: float, of_torch: int) -> Finding:
    """Compares the GPUs that Ray hands out with those that torch sees on a machine."""
    found = f"Ray counts {of_ray:g}, torch sees {of_torch}"
    if of_ray > of_torch:
        remedy = "Install torch with CUDA and the driver there, or start Ray with --num-gpus=0"
        return Finding("GPUs of Ray", Status.MISSING, found, remedy, machine)
    if of_ray < of_torch:
        remedy = f"Nothing runs on the others: start Ray with --num-gpus={of_torch} to use them"
        return Finding("GPUs of Ray", Status.LIMITED, found, remedy, machine)
    return Finding("GPUs of Ray", Status.GOOD, found, machine=machine)


def judge_sharing(folder: str, sees: Mapping[str, bool]) -> Finding:
    """Judges if a local folder is one folder for all machines.

    Args:
        folder: The folder.
        sees: By machine: whether it sees what the first one has written.
    """
    name = f"sharing of {folder}"
    without = [machine for machine, seen in sees.items() if not seen]
    if without:
        remedy = "A run's output must be one place: mount a shared disk there, or name s3://..."
        found = f"{', '.join(without)} has another folder of that name than {next(iter(sees))}"
        return Finding(name, Status.MISSING, found, remedy)
    return Finding(name, Status.GOOD, f"one folder for {len(sees)} machines")


def judge_reduction(
    kind: str, size: int, num_bytes: int, seconds: Sequence[float], is_right: bool
) -> Finding:
    """Bandwidth of an all-reduce, as nccl-tests counts it.

    Args:
        kind: Which library.
        size: Number of ranks.
        num_bytes: Of the tensor.
        seconds: Of each rank.
        is_right: Whether every rank's sums were right.
    """
    name = f"all-reduce ({kind})"
    if not is_right:
        remedy = "The network or a GPU alters data: do not train there; check each machine alone"
        return Finding(name, Status.MISSING, f"wrong sums over {size} ranks", remedy)
    rate = num_bytes / max(seconds) / 1e9
    found = (
        f"{size} ranks, {num_bytes / 1e6:.3g} MB in {1e3 * max(seconds):.3g} ms: {rate:.3g} GB/s, "
        f"bus {rate * 2 * (size - 1) / size:.3g} GB/s"
    )
    return Finding(name, Status.GOOD, found)
