"""Contradictions of a topology: in itself, with the roles of a method, and with a batch."""

from collections.abc import Iterable, Mapping, Sequence

from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, ROLES, TEACHER
from pipelines.config.topology import RolePoolSettings, TopologySettings

_READ = {
    "map": {"pools", "roles"},
    "pools": {*ROLES, DISCRIMINATOR},
    "fused": {"fused"},
    "local": {*ROLES, DISCRIMINATOR},
}
"""Sections of pools that each mode reads, of those that not all of them do."""


def unread_in_mode(mode: str, keys: Iterable[str]) -> list[str]:
    """Settings of pools, among some dotted keys, that a mode does not read."""
    unread = {f"topology.{name}" for names in _READ.values() for name in names - _READ[mode]}
    return [key for key in keys if ".".join(key.split(".")[:2]) in unread]


def topology_contradictions(
    topology: TopologySettings,
    batch_size: int,
    micro_batches: int,
    ranks_per_sample: Mapping[str, int],
) -> list[str]:
    """Returns what a topology cannot do with a batch of this size, as sentences.

    Args:
        topology: The settings.
        batch_size: Samples of one update.
        micro_batches: Parts of it.
        ranks_per_sample: By role that the recipe's method has, ranks that work on samples together.
    """
    problems: list[str] = []
    roles = tuple(ranks_per_sample)
    if topology.mode == "local" and topology.address is not None:
        problems.append(
            f"topology.address {topology.address!r} names a Ray cluster, but topology.mode local "
            "uses no Ray"
        )
    if found := _map_contradictions(topology, roles):
        return [*problems, *found]
    samples = -(-batch_size // micro_batches)
    for section, number in _ranks(topology, roles).items():
        # Ranks that work on samples together have them together.
        groups = number / _least_ranks_per_sample(topology, section, ranks_per_sample)
        if groups > samples:
            problems.append(
                f"a micro-batch has {samples} samples at most (batch.size / batch.micro_batches), "
                f"and {section}.ranks is {number}: some ranks would never have one of their own"
            )
        if topology.mode == "local" and number > 1:
            problems.append(
                f"{section}.ranks is {number}, but topology.mode local is one process; "
                "set it to 1, or the mode to pools"
            )
    problems += _transport_contradictions(topology, roles)
    replicas = topology.teacher.replicas if topology.mode == "pools" else 1
    # Ranks that work on samples together are one group.
    groups = max(1, topology.teacher.ranks // ranks_per_sample.get(TEACHER, 1))
    if replicas > batch_size // groups:
        problems.append(
            f"topology.teacher.replicas {replicas} is more than the batch has samples for "
            f"({batch_size}, {_groups_in_words(topology.teacher.ranks, groups)} in each), so "
            "some would never work"
        )
    places = topology.places_of(roles)
    together = places[GENERATOR] == places[FAKE_SCORE]
    if topology.max_staleness_iterations and together:
        problems.append(
            "topology.max_staleness_iterations 1 lets roles run apart, but in topology.mode "
            f"{topology.mode} they take turns; set it to 0"
        )
    return problems


def _groups_in_words(ranks: int, groups: int) -> str:
    """Those of some ranks that have samples of their own: each, or several together."""
    if groups == ranks:
        return f"{ranks} ranks"
    return f"{groups} groups of {ranks // groups} ranks that work together"


def _ranks(topology: TopologySettings, roles: Sequence[str]) -> dict[str, int]:
    """Ranks that share a micro-batch, by section."""
    match topology.mode:
        case "map":
            return {f"topology.pools.{name}": pool.ranks for name, pool in topology.pools.items()}
        case "fused":
            return {"topology.fused": topology.fused.ranks}
        case _:
            return {
                f"topology.{role}": team.ranks for role, team in topology.teams_of(roles).items()
            }


def _least_ranks_per_sample(
    topology: TopologySettings, section: str, ranks_per_sample: Mapping[str, int]
) -> int:
    """Ranks that work on a sample together, of the role of a section where they are the fewest."""
    name = section.rpartition(".")[2]
    places = {role: (role,) for role in ranks_per_sample}
    if topology.shares_pools:
        places = topology.places_of(tuple(ranks_per_sample))
    return min((own for role, own in ranks_per_sample.items() if name in places[role]), default=1)


def _map_contradictions(topology: TopologySettings, roles: Sequence[str]) -> list[str]:
    if topology.mode != "map":
        return []
    problems: list[str] = []
    of_role = topology.places_of(roles)
    names = {name for places in of_role.values() for name in places}
    problems += [
        f"topology.roles.{role} names the pool {name!r}, and topology.pools has "
        f"{', '.join(topology.pools)}"
        for role, places in of_role.items()
        for name in places
        if name not in topology.pools
    ]
    problems += [
        f"topology.pools.{name} has processes, but topology.roles puts no role there; name it for "
        "a role, or leave it out"
        for name in topology.pools
        if name not in names
    ]
    problems += [
        f"topology.pools has a pool called {name}, which is the name of a pool beside the roles; "
        "choose another"
        for name in ("text", "feed", "validator")
        if name in topology.pools
    ]
    sized = {role: getattr(topology, role) for role in roles}
    problems += [
        f"topology.{role}.{key} is {getattr(own, key)}, which only topology.mode pools reads; set "
        "the mode to pools, or the ranks of topology.pools"
        for role, own in sized.items()
        for key in ("ranks", "replicas")
        if getattr(own, key, 1) > 1
    ]
    unknown = [key for key in topology.stage_seconds if key.split(".")[0] not in roles]
    if unknown:
        problems.append(
            f"topology.stage_seconds has {', '.join(unknown)}; its keys are like generator.rollout"
        )
    return problems


def _transport_contradictions(topology: TopologySettings, roles: Sequence[str]) -> list[str]:
    if topology.transport == "object_store":
        return []
    problems: list[str] = []
    if topology.mode != "pools":
        problems.append(
            f"topology.transport {topology.transport} is for roles in processes of their own, but "
            f"topology.mode is {topology.mode}; set it to pools, or the transport to object_store"
        )
    own: dict[str, RolePoolSettings] = {role: getattr(topology, role) for role in roles}
    gpus = {role: pool.gpus for role, pool in own.items()}
    problems += [
        f"topology.transport {topology.transport} goes from GPU to GPU, but topology.{role}.gpus "
        f"is {number:g}; give every rank a GPU, or set the transport to object_store"
        for role, number in gpus.items()
        if number < 1
    ]
    if topology.bf16_kinds:
        problems.append(
            f"topology.transport {topology.transport} sends tensors as they are; set "
            "topology.wire_dtype and topology.gradient_wire_dtype to fp32"
        )
    return problems
