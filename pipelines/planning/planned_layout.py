"""A layout of a run's roles on pools, with its time and memory: what the planner finds."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from pipelines.config.topology import FUSED
from pipelines.planning.hardware import GB
from pipelines.planning.memory import RankMemory

ACCELERATOR = "ray.io/accelerator-type"
"""Label that Ray gives a machine by its GPUs."""


@dataclass(frozen=True, slots=True)
class PoolUse:
    """Use of one pool.

    Attributes:
        gpus: Its GPUs.
        roles: Roles that live on it.
        samples_per_call: Most samples of one of its ranks in a call.
        busy: Part of its time that it works.
        memory: Of one rank.
        kind: Name of its kind of GPU, where there are several.
        speed: Of one of its GPUs, over that of the first kind.
    """

    gpus: int
    roles: tuple[str, ...]
    samples_per_call: float
    busy: float
    memory: RankMemory
    kind: str = ""
    speed: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """As `sgmd plan --json` prints it."""
        return {
            "gpus": self.gpus,
            "roles": list(self.roles),
            "samples_per_call": self.samples_per_call,
            "busy": self.busy,
            "memory_gb": self.memory.to_json(),
            **({"kind": self.kind, "speed": self.speed} if self.kind else {}),
        }


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout of the three roles, and its costs.

    Attributes:
        name: `map`, `pools` or `fused`, the recipe's `topology.mode`.
        iteration_s: Seconds an iteration.
        pools: Its pools by name.
        settings: Settings of the recipe for it.
        gathered_bytes: Weights that a GPU is sent in an iteration, the most of any pool.
        fits: Whether a GPU of every pool holds its ranks.
        alone: The only kind of GPU in use, where there are several.
    """

    name: str
    iteration_s: float
    pools: Mapping[str, PoolUse]
    settings: Mapping[str, Any]
    gathered_bytes: float
    fits: bool
    alone: str = ""

    @property
    def num_gpus(self) -> int:
        """GPUs of the three roles."""
        return sum(pool.gpus for pool in self.pools.values())

    @property
    def title(self) -> str:
        """Its name, and the kind of GPU that it leaves the others for."""
        return f"{self.name} on {self.alone} alone" if self.alone else self.name

    def on(self, kind: str) -> Self:
        """The same on machines of one kind of GPU, which its pools are pinned to by label."""
        section = "topology.fused" if self.name == FUSED else "topology.pools.{}"
        labels = {f"{section.format(pool)}.labels": {ACCELERATOR: kind} for pool in self.pools}
        return replace(
            self,
            pools={name: replace(pool, kind=kind) for name, pool in self.pools.items()},
            settings={**self.settings, **labels},
            alone=kind,
        )

    def to_json(self) -> dict[str, Any]:
        """As `sgmd plan --json` prints it."""
        return {
            "iteration_s": self.iteration_s,
            "gpus": self.num_gpus,
            "fits": self.fits,
            "gathered_gb": round(self.gathered_bytes / GB, 2),
            "settings": dict(self.settings),
            "pools": {name: pool.to_json() for name, pool in self.pools.items()},
        }
