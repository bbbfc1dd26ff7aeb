"""Explains a reservation that fails: each rank's request against the machines of the cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import ray
from ray._private.state import available_resources_per_node

from cluster.errors import InsufficientResourcesError
from cluster.ray.pools import Pool
from sgmd_core.words import count_in_words


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine of a cluster.

    Attributes:
        name: Its address.
        total: Its resources.
        free: Those that nothing has reserved.
        labels: What an operator, or the cloud, has written on it.
        node: Ray's id of it.
        address: Its address; `name` may be another word for it.
    """

    name: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str]
    node: str = ""
    address: str = ""

    @property
    def store_bytes(self) -> float:
        """Size of its object store."""
        return self.total.get("object_store_memory", 0.0)

    def renamed(self, name: str) -> "Machine":
        """The same machine under another name."""
        return replace(self, name=name)


@dataclass(frozen=True, slots=True)
class Row:
    """Outcome of one rank's request.

    Attributes:
        rank: "pool[rank]".
        asked: What it asks for.
        verdict: "fits on ..." or what is missing.
    """

    rank: str
    asked: str
    verdict: str


def machines() -> list[Machine]:
    """The living machines of the cluster that this process is connected to."""
    free = available_resources_per_node()
    return [
        Machine(
            name=node["NodeManagerAddress"],
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
            labels=node.get("Labels", {}),
            node=node["NodeID"],
            address=node["NodeManagerAddress"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def shortage(pools: Sequence[Pool], timeout_s: float) -> InsufficientResourcesError:
    """Says, rank by rank, what the cluster could serve and what it lacks.

    Args:
        pools: What was asked for.
        timeout_s: How long it was waited for.
    """
    found = machines()
    rows = first_fit(pools, found)
    kinds = sorted({"CPU", "GPU"}.union(*(pool.bundle for pool in pools)))
    free = _worded({kind: sum(one.free.get(kind, 0.0) for one in found) for kind in kinds})
    total = _worded({kind: sum(one.total.get(kind, 0.0) for one in found) for kind in kinds})
    each = "; ".join(
        f"{one.name} {_worded({kind: one.total.get(kind, 0.0) for kind in kinds})}" for one in found
    )
    table = "\n".join(f"  {row.rank:<20} asks for {row.asked:<24} {row.verdict}" for row in rows)
    return InsufficientResourcesError(
        f"reserving resources for {count_in_words(len(rows), 'rank')}",
        f"after {timeout_s:g} s {free} of {total} are free on "
        f"{count_in_words(len(found), 'machine')} ({each}):\n"
        f"{table}\n",
        "all of them to be free at once, each rank on one machine",
        "Lower the ranks, or what each of them asks for, in the recipe, correct their labels, add"
        " machines, or wait for other runs to end (`ray status` shows what is in use)",
    )


def first_fit(pools: Sequence[Pool], found: Sequence[Machine]) -> list[Row]:
    """Serves the ranks in order, each from the first machine that can.

    Args:
        pools: What is asked for.
        found: Machines, with what is free on each.

    Returns:
        One row a rank.
    """
    left = [dict(one.free) for one in found]
    rows: list[Row] = []
    for pool in pools:
        # Machines that a strict strategy leaves to the pool's next rank.
        open_to = set(range(len(found)))
        for rank in range(pool.num_ranks):
            matching = [at for at in range(len(found)) if matches(pool.labels, found[at].labels)]
            allowed = [at for at in matching if at in open_to]
            fitting = [at for at in allowed if not _lacking(pool.bundle, left[at])]
            if fitting:
                at = fitting[0]
                for kind, amount in pool.bundle.items():
                    left[at][kind] -= amount
                open_to = {
                    "STRICT_PACK": {at},
                    "STRICT_SPREAD": open_to - {at},
                }.get(pool.strategy, open_to)
                verdict = f"fits on {found[at].name}"
            else:
                verdict = _missing(pool, [(found[at].name, left[at]) for at in allowed], matching)
            rows.append(Row(f"{pool.name}[{rank}]", _asked(pool), verdict))
    return rows


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Returns True if labels satisfy a selector: `a`, `!a`, `in(a, b)` or `!in(a, b)`."""
    for key, wanted in selector.items():
        negated, wanted = wanted.startswith("!"), wanted.removeprefix("!")
        listed = wanted[3:-1] if wanted.startswith("in(") and wanted.endswith(")") else wanted
        values = [value.strip() for value in listed.split(",")]
        if (labels.get(key) in values) == negated:
            return False
    return True


def _missing(
    pool: Pool, allowed: Sequence[tuple[str, Mapping[str, float]]], matching: Sequence[int]
) -> str:
    if not matching:
        return f"no machine has the labels {_labels(pool)}"
    if not allowed:
        return f"no further machine for its strategy, {pool.strategy}"
    lacks = [(name, _lacking(pool.bundle, free)) for name, free in allowed]
    name, least = min(lacks, key=lambda one: sum(one[1].values()))
    return f"lacks {_worded(least)} on {name}, which comes nearest"


def _lacking(bundle: Mapping[str, float], free: Mapping[str, float]) -> dict[str, float]:
    return {
        kind: amount - free.get(kind, 0.0)
        for kind, amount in bundle.items()
        if amount > free.get(kind, 0.0) + 1e-9
    }


def _asked(pool: Pool) -> str:
    labels = f" where {_labels(pool)}" if pool.labels else ""
    return f"{_worded(pool.bundle)}{labels}"


def _labels(pool: Pool) -> str:
    return ", ".join(f"{key}={value}" for key, value in pool.labels.items())


def _worded(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items())
