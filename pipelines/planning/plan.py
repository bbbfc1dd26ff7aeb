"""Plans the layout of a run on some GPUs and its costs, or says why it cannot be done."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipelines.config.roles import ROLES
from pipelines.config.topology import FUSED
from pipelines.planning.hardware import GB, GpuKind, Hardware
from pipelines.planning.layouts import fused_layout, map_layout, pools_layout
from pipelines.planning.mixed import mixed_layouts
from pipelines.planning.planned_layout import Layout
from pipelines.planning.pool_maps import (
    fused_maps,
)
from pipelines.planning.refusals import no_layout_fits
from pipelines.planning.search import find_best
from pipelines.planning.stage_times import StageTimes
from pipelines.planning.workload import StageName, Workload, remember
from sgmd_core.errors import ConfigError
from sgmd_core.words import count_in_words

_LEAST_GPUS = {"map": 2, "pools": len(ROLES), FUSED: 1}


@dataclass(frozen=True, slots=True)
class Plan:
    """Layouts of a run, the best first.

    Attributes:
        work: What it does.
        hardware: What it runs on.
        num_gpus: GPUs that there are for the roles.
        times: Of the stages.
        layouts: The best of each kind: those that fit, the fastest first; then the others.
        beside: GPUs of other processes, by section: text encoder, feed, validator.
        memory_settings: Settings of the recipe that were changed to make it fit.
        memory_beside: Bytes of one of the processes beside, by section, where they are known.
        kinds: Kinds of GPU, where there are several; `hardware` is that of the first one.
    """

    work: Workload
    hardware: Hardware
    num_gpus: int
    times: StageTimes
    layouts: tuple[Layout, ...]
    beside: Mapping[str, float] = field(default_factory=dict)
    memory_settings: tuple[str, ...] = ()
    kinds: tuple[GpuKind, ...] = ()
    memory_beside: Mapping[str, float] = field(default_factory=dict)

    @property
    def best(self) -> Layout:
        """The fastest layout that fits."""
        return self.layouts[0]

    @property
    def left_out(self) -> dict[str, str]:
        """Reason for each kind of layout that is not planned; none over several kinds of GPU."""
        found = {layout.name for layout in self.layouts}
        return {
            name: _reason(name, least, self.work, self.num_gpus)
            for name, least in _LEAST_GPUS.items()
            if name not in found and not self.kinds
        }

    @property
    def gpus_beside(self) -> int:
        """Whole GPUs of the processes beside the roles."""
        return math.ceil(sum(self.beside.values()))

    @property
    def left_over(self) -> dict[str, int]:
        """GPUs that the best layout leaves, by the name of their kind."""
        left = {kind.name: kind.num_gpus for kind in self.kinds}
        for use in self.best.pools.values():
            left[use.kind] -= use.gpus
        return left

    @property
    def kind_beside(self) -> GpuKind | None:
        """Kind of GPU of all processes beside the roles: the last with enough; None: none has."""
        left = self.left_over
        enough = [kind for kind in self.kinds if left[kind.name] >= self.gpus_beside]
        return enough[-1] if enough else None

    def to_json(self) -> dict[str, Any]:
        """All of it, as `sgmd plan --json` prints it."""
        best = self.best
        used = best.num_gpus + self.gpus_beside
        return {
            "gpus": self.num_gpus + self.gpus_beside,
            "gpus_used": used,
            "gpus_beside": dict(self.beside),
            "memory_beside_gb": {
                section: round(needed / GB, 2) for section, needed in self.memory_beside.items()
            },
            "layout": best.name,
            "settings": dict(best.settings),
            "memory_settings": list(self.memory_settings),
            "iteration_s": best.iteration_s,
            "samples_per_s": self.work.batch_size / best.iteration_s,
            "gpu_hours_per_1000_iterations": best.iteration_s * used / 3.6,
            "layouts": {layout.title: layout.to_json() for layout in self.layouts},
            "stage_seconds_per_sample": {
                ".".join(name): seconds for name, seconds in self.times.seconds.items()
            },
            "stage_times": self.times.source,
            "workload": {
                **{
                    name: sorted(value) if isinstance(value, frozenset) else value
                    for name, value in asdict(self.work).items()
                },
                "adapters": dict(self.work.adapters),
                "ulysses": dict(self.work.ulysses),
                "parameters": self.work.shape.num_parameters,
                "tokens": self.work.shape.num_tokens(self.work.latent_shape),
                "forward_flops": self.work.forward_flops,
            },
            "hardware": asdict(self.hardware),
            **({"kinds": [asdict(kind) for kind in self.kinds]} if self.kinds else {}),
        }


def make_plan(
    work: Workload,
    times: StageTimes,
    hardware: Hardware,
    num_gpus: int,
    beside: Mapping[str, float] | None = None,
) -> Plan:
    """The fastest layout of each kind.

    Args:
        work: The iteration.
        times: Of its stages.
        hardware: What it runs on.
        num_gpus: For generator, teacher and fake score together.
        beside: GPUs of other processes, by section; not of these.

    Raises:
        ConfigError: Nothing fits; says what is short, and which changes would do.
    """
    width = work.ranks_per_sample(*work.roles)
    if width > num_gpus:
        raise ConfigError(
            f"planning for {count_in_words(num_gpus, 'GPU')}",
            f"{width} ranks work on each sample together",
            "at least as many GPUs",
            "Lower compute.ulysses of the roles",
        )
    found = best_layouts(work, times, hardware, num_gpus)
    if not found[0].fits:
        raise no_layout_fits(work, hardware, num_gpus)
    return Plan(work, hardware, num_gpus, times, tuple(found), beside or {})


def best_layouts(
    work: Workload,
    times: StageTimes,
    hardware: Hardware,
    num_gpus: int,
    below_s: float = math.inf,
) -> list[Layout]:
    """The fastest layout of each kind, those that fit first: of pools, where some fit.

    Fused is among them where its ranks can share samples out, or where there is nothing else.

    Args:
        work: The iteration.
        times: Of its stages.
        hardware: What it runs on.
        num_gpus: For the three roles together.
        below_s: Pools whose work alone takes so long are not looked at.
    """
    seconds = tuple(times.seconds.items())
    return [*_best_layouts(work, seconds, times.ulysses, hardware, num_gpus, below_s)]


@remember
def _best_layouts(
    work: Workload,
    seconds: tuple[tuple[StageName, float], ...],
    ulysses: tuple[tuple[str, int], ...],
    hardware: Hardware,
    num_gpus: int,
    below_s: float,
) -> list[Layout]:
    """Layouts as above, from what they depend on: a question is asked more than once."""
    given = (work, StageTimes(dict(seconds), "", ulysses), hardware, num_gpus)
    found = [fused_layout(*given)] if fused_maps(work, num_gpus) else []
    if num_gpus >= _LEAST_GPUS["map"] and (mapped := map_layout(*given, below_s)):
        found.append(mapped)
    if num_gpus >= _LEAST_GPUS["pools"] and (classic := find_best(*given, below_s)):
        found.append(pools_layout(work, classic))
    found = found or [fused_layout(*given)]
    return sorted(found, key=lambda layout: (not layout.fits, layout.iteration_s))


def make_mixed_plan(
    work: Workload,
    times: StageTimes,
    kinds: Sequence[GpuKind],
    beside: Mapping[str, float] | None = None,
) -> Plan:
    """The fastest layouts over several kinds of GPU, and on each alone; see `mixed_layouts`.

    GPUs of other processes are taken off the last kind that has enough for all of them, which may
    have to be on one machine; where none has, off the last ones.

    Args:
        work: The iteration.
        times: Of its stages, on a GPU of the first kind.
        kinds: At least two.
        beside: GPUs of other processes, by section.

    Raises:
        ConfigError: Nothing fits, or nothing is left for the roles.
    """
    if work.ulysses:
        raise ConfigError(
            "planning over several kinds of GPU",
            f"ranks of {', '.join(role for role, _ in work.ulysses)} that work on samples together",
            "one kind of GPU, or compute.ulysses=1",
            "Use --gpus and --gpu-memory",
        )
    left = _without(kinds, math.ceil(sum((beside or {}).values())))
    layouts = mixed_layouts(work, times, left)
    num_gpus = sum(kind.num_gpus for kind in left)
    hardware = kinds[0].hardware
    return Plan(work, hardware, num_gpus, times, tuple(layouts), beside or {}, kinds=tuple(kinds))


def _reason(name: str, least: int, work: Workload, num_gpus: int) -> str:
    """Says why a kind of layout is not planned."""
    if name == "pools" and work.heads is not None:
        return "not planned for a method with a discriminator"
    if name == FUSED and not (work.paired and fused_maps(replace(work, paired=False), num_gpus)):
        return "leaves ranks without samples of their own, as compute.ulysses of the roles differs"
    if name == "pools" and work.ulysses:
        return "not planned with compute.ulysses"
    if num_gpus < least:
        return f"takes {least} GPUs at least"
    if work.paired:
        return "fits in no size that gives each rank of the fake score pairs of samples"
    return "fits in no size"


def _without(kinds: Sequence[GpuKind], taken: int) -> list[GpuKind]:
    together = next(
        (kind for kind in reversed(kinds) if kind.num_gpus >= taken + (kind is kinds[0])), None
    )
    left: list[GpuKind] = []
    for kind in reversed(kinds):
        own = min(taken, kind.num_gpus) if together in (kind, None) else 0
        taken -= own
        left.insert(0, replace(kind, num_gpus=kind.num_gpus - own))
    if taken or left[0].num_gpus < 1:
        raise ConfigError(
            "planning for several kinds of GPU",
            "the processes beside the roles take all of the first kind",
            "at least one for the roles",
            "Lower `gpus` of topology.text, topology.feed and topology.validator",
        )
    return [kind for kind in left if kind.num_gpus]
