"""Trials between machines: clocks, objects that travel, sums over all of them."""

import time
from collections.abc import Sequence

from cluster.ray.every_machine import OnMachines
from cluster.ray.group import RayWorkerGroup
from cluster.ray.shortage import Machine
from pipelines.doctoring.comparison import ClockReading, judge_clock, judge_reduction
from pipelines.doctoring.findings import GIB, Finding, Status, gib
from pipelines.doctoring.probe import MachineFacts, MachineProbe, make_probe
from pipelines.doctoring.probes import Probes

_CLOCK_TRIES = 5
_TRY_S = 60.0
_START_S = 240.0
_OBJECT_BYTES = 64 * 2**20
_SHARE_OF_STORE = 8
_CPU_BYTES, _CPU_TIMES = 16 * 2**20, 4
_GPU_BYTES, _GPU_TIMES = 256 * 2**20, 10
# NCCL's buffers, and CUDA's context.
_MIN_FREE_GPU_BYTES = 3 * GIB
_NETWORK = (
    "All ports between the machines must be open. Where they have several networks, name the "
    "interface on each: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
)


def clock_findings(probes: Probes) -> list[Finding]:
    """Reads each machine's clock over ours, by the quickest of some answers."""
    findings: list[Finding] = []
    for rank, machine in list(probes.machines.items())[1:]:
        readings: list[ClockReading] = []
        for _ in range(_CLOCK_TRIES):
            asked_s = time.time()
            answers, failures = probes.ask(
                lambda one: probes.group.call_rank(one, MachineProbe.time_of_day),
                _TRY_S,
                "clock",
                "",
                [rank],
            )
            answered_s = time.time()
            if failures:
                return [*findings, *failures]
            half_s = (answered_s - asked_s) / 2
            readings.append(ClockReading(answers[rank] - asked_s - half_s, half_s))
        findings.append(judge_clock(machine.name, min(readings, key=lambda one: one.error_s)))
    return findings


def transfer_findings(probes: Probes) -> list[Finding]:
    """Hands a value from each machine to the next through Ray's object stores."""
    ranks = list(probes.machines)
    if len(ranks) < 2:
        return []
    smallest = min(machine.store_bytes for machine in probes.machines.values())
    num_bytes = int(min(_OBJECT_BYTES, smallest // _SHARE_OF_STORE))
    rates: dict[str, float] = {}
    for giver, taker in zip(ranks, [*ranks[1:], ranks[0]], strict=True):
        pair = f"{probes.machines[giver].name} to {probes.machines[taker].name}"
        made = probes.group.call_rank(giver, MachineProbe.make_object, num_bytes)
        # Calls of a rank are in order: the value is there when this one answers.
        _, failures = probes.ask(
            lambda rank: probes.group.call_rank(rank, MachineProbe.time_of_day),
            _TRY_S,
            "object transfer",
            _NETWORK,
            [giver, taker],
        )
        started_s = time.monotonic()
        if not failures:
            _, failures = probes.ask(
                lambda rank, made=made: probes.group.call_rank(
                    rank, MachineProbe.take_object, made
                ),
                _TRY_S,
                "object transfer",
                f"{pair} failed. {_NETWORK}",
                [taker],
            )
        if failures:
            return failures
        rates[pair] = num_bytes / (time.monotonic() - started_s) / 1e6
    slowest = min(rates, key=lambda pair: rates[pair])
    found = (
        f"{num_bytes / 1e6:.3g} MB between neighbours, packed and unpacked: "
        f"{max(rates.values()):.3g} MB/s at most, {rates[slowest]:.3g} at least ({slowest})"
    )
    return [Finding("object transfer", Status.GOOD, found)]


def reduction_findings(probes: Probes, facts: dict[int, MachineFacts]) -> list[Finding]:
    """Sums over all machines by Gloo and, where there are GPUs, over all GPUs by NCCL."""
    ranks = list(probes.machines)
    findings = _reduce(probes, ranks, [-1] * len(ranks)) if len(ranks) > 1 else []
    gpus = [(rank, gpu) for rank in ranks for gpu in range(facts[rank].num_gpus)]
    if len(gpus) < 2:
        return findings
    busy = [rank for rank, _ in gpus if facts[rank].free_gpu_bytes < _MIN_FREE_GPU_BYTES]
    if busy:
        machine = probes.machines[busy[0]]
        found = f"not tried: a GPU of {machine.name} has {gib(facts[busy[0]].free_gpu_bytes)} free"
        remedy = "Run it again when nothing else uses the GPUs"
        return [*findings, Finding("all-reduce (NCCL)", Status.LIMITED, found, remedy)]
    return [*findings, *_reduce_on_gpus(probes, gpus)]


def _reduce_on_gpus(probes: Probes, gpus: Sequence[tuple[int, int]]) -> list[Finding]:
    """Starts a probe for each GPU and sums over them."""
    machines = [probes.machines[rank] for rank, _ in gpus]
    name = "gpu probe"
    placement = OnMachines(name, [machine.node for machine in machines])
    with RayWorkerGroup(name, make_probe, (), placement) as group:
        ours = Probes(group, machines)
        failures = ours.start(_START_S)
        return failures or _reduce(ours, list(ours.machines), [gpu for _, gpu in gpus])


def _reduce(probes: Probes, ranks: Sequence[int], gpus: Sequence[int]) -> list[Finding]:
    """Joins the probes and sums; `gpus` has the GPU of each, or -1."""
    on_gpu = gpus[0] >= 0
    kind = "NCCL" if on_gpu else "Gloo"
    num_bytes, repeats = (_GPU_BYTES, _GPU_TIMES) if on_gpu else (_CPU_BYTES, _CPU_TIMES)
    group, name = probes.group, f"all-reduce ({kind})"
    first: Machine = probes.machines[ranks[0]]
    alone = len({machine.address for machine in probes.machines.values()}) == 1
    opened, failures = probes.ask(
        lambda rank: group.call_rank(
            rank, MachineProbe.open_rendezvous, len(ranks), first.address, alone
        ),
        _TRY_S,
        name,
        _NETWORK,
        ranks[:1],
    )
    if failures:
        return failures
    rendezvous = opened[ranks[0]]
    place = {rank: index for index, rank in enumerate(ranks)}
    _, failures = probes.ask(
        lambda rank: group.call_rank(
            rank, MachineProbe.join_rendezvous, rendezvous, place[rank], gpus[place[rank]], _TRY_S
        ),
        2 * _TRY_S,
        name,
        _NETWORK,
        ranks,
    )
    if failures:
        return failures
    done, failures = probes.ask(
        lambda rank: group.call_rank(rank, MachineProbe.all_reduce, num_bytes, repeats, on_gpu),
        2 * _TRY_S,
        name,
        _NETWORK,
        ranks,
    )
    if failures:
        return failures
    seconds = [one.seconds for one in done.values()]
    right = all(one.is_right for one in done.values())
    return [judge_reduction(kind, len(ranks), num_bytes, seconds, right)]
