"""Checks of a whole cluster: a probe on each machine, then trials between them.

    a probe a machine -> look, clock, storage, models     each machine by itself
                      -> object transfer, all-reduce      between them

A machine that does not answer costs its own findings. Every wait has an end.
"""

from dataclasses import replace
from pathlib import Path

from cluster.ray.every_machine import OnMachines, machines_by_id
from cluster.ray.group import RayWorkerGroup
from pipelines.doctoring.between import clock_findings, reduction_findings, transfer_findings
from pipelines.doctoring.comparison import (
    compare_models,
    compare_versions,
    judge_gpus,
    judge_sharing,
    judge_store,
)
from pipelines.doctoring.findings import Finding, Status, Wanted
from pipelines.doctoring.probe import MachineFacts, MachineProbe, make_probe, versions_here
from pipelines.doctoring.probes import Probes
from workers.models.addresses import is_address

_START_S = 240.0
_LOOK_S = 240.0
_STORAGE_S = 120.0
_MODEL_S = 1800.0
_NAME = "probe"


def examine_machines(wanted: Wanted) -> list[Finding]:
    """Looks at every machine of the connected cluster and tries what goes between them.

    Args:
        wanted: Storage and models to look for on each.
    """
    machines = machines_by_id()
    placement = OnMachines(_NAME, list(machines))
    with RayWorkerGroup(_NAME, make_probe, (), placement) as group:
        probes = Probes(group, list(machines.values()))
        findings = probes.start(_START_S)
        facts, failures = probes.ask(
            lambda rank: group.call_rank(rank, MachineProbe.look), _LOOK_S, "machine", ""
        )
        findings += failures
        probes.machines = {rank: probes.machines[rank] for rank in facts}
        findings += _alone(probes, facts)
        versions = {name: one.versions for name, one in probes.by_name(facts).items()}
        findings += compare_versions({**versions, "this process": versions_here()})
        findings += clock_findings(probes)
        for folder in wanted.storage:
            findings += _storage_findings(probes, folder)
        for model in wanted.models:
            findings += _model_findings(probes, model)
        findings += transfer_findings(probes)
        # Last: a collective that hangs holds its process.
        return [*findings, *reduction_findings(probes, facts)]


def _alone(probes: Probes, facts: dict[int, MachineFacts]) -> list[Finding]:
    """Findings about each machine by itself."""
    findings: list[Finding] = []
    for rank, found in facts.items():
        machine = probes.machines[rank]
        findings += [replace(one, machine=machine.name) for one in found.findings]
        findings.append(judge_store(machine.name, machine.store_bytes, found.shared_memory_bytes))
        findings.append(judge_gpus(machine.name, machine.total.get("GPU", 0.0), found.num_gpus))
    return findings


def _storage_findings(probes: Probes, folder: str) -> list[Finding]:
    """Tries storage from each machine, and whether a local folder is the same everywhere."""
    group, ranks = probes.group, list(probes.machines)
    # A shared folder that is not there is made and deleted by each: they would meet.
    turns = [ranks] if "://" in folder else [[rank] for rank in ranks]
    answers: dict[int, Finding] = {}
    failures: list[Finding] = []
    for turn in turns:
        found_now, failed = probes.ask(
            lambda rank: group.call_rank(rank, MachineProbe.try_storage, folder),
            _STORAGE_S,
            f"storage {folder}",
            "Check that it can be reached from there",
            turn,
        )
        answers |= found_now
        failures += failed
    found = [replace(one, machine=name) for name, one in probes.by_name(answers).items()]
    all_good = not failures and all(one.status is Status.GOOD for one in found)
    if "://" in folder or len(answers) < 2 or not all_good:
        return [*found, *failures]
    return [*found, *_sharing_findings(probes, folder)]


def _sharing_findings(probes: Probes, folder: str) -> list[Finding]:
    """Leaves a file from the first machine and looks for it from the others."""
    group, first = probes.group, next(iter(probes.machines))
    name, remedy = f"sharing of {folder}", "Check the folder there"
    left, failures = probes.ask(
        lambda rank: group.call_rank(rank, MachineProbe.leave_marker, folder),
        _STORAGE_S,
        name,
        remedy,
        [first],
    )
    if failures:
        return failures
    marker = left[first]
    seen, failures = probes.ask(
        lambda rank: group.call_rank(rank, MachineProbe.sees_marker, marker),
        _STORAGE_S,
        name,
        remedy,
    )
    probes.ask(
        lambda rank: group.call_rank(rank, MachineProbe.remove_marker, marker),
        _STORAGE_S,
        name,
        remedy,
        [first],
    )
    place = str(Path(marker).parent)
    return [*failures, judge_sharing(place, probes.by_name(seen))]


def _model_findings(probes: Probes, model: str) -> list[Finding]:
    kind = "the address" if is_address(model) else "the folder"
    contents, failures = probes.ask(
        lambda rank: probes.group.call_rank(rank, MachineProbe.model_content, model),
        _MODEL_S,
        f"model {model}",
        f"Copy the model there, or name one on a shared disk or in S3 ({kind} is read there)",
    )
    return [*failures, *([compare_models(model, probes.by_name(contents))] if contents else [])]
