"""Assumed speeds of GPUs and connections; a measured value can replace each one.

A plan for one kind of GPU has one `Hardware`. For several kinds, each is a `GpuKind`; speeds are
taken over that of the first one.

Defaults are those of an H100 with 80 GB. The rate of computation is a published one of the same
model family with the same kind of sharding: Wan 2.1 14B, 37,440 tokens a sample, FSDP2, 64 H100,
228.9 TFLOP/s a GPU (NVIDIA NeMo DFM, docs/performance-summary.md); with 8 H100 the same page gives
175.9, with Megatron on 128 H100 325.8.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

from cluster.schedule.schedule import Call
from cluster.schedule.simulate import Costs
from sgmd_core.errors import ConfigError

GB = 1e9
_KIND = re.compile(
    r"(?P<name>[A-Za-z][\w.-]*)=(?P<gpus>\d{1,6})x(?P<gb>\d{1,6}(?:\.\d{1,6})?)@(?P<tflops>\d{1,9}(?:\.\d{1,6})?)"
)


@dataclass(frozen=True, slots=True)
class Hardware:
    """One kind of GPU, and what lies between two of them.

    Attributes:
        memory_gb: Memory of a GPU.
        flops: Operations a second that the networks really reach.
        memory_bandwidth: Bytes a second between a GPU and its memory: updates are bound by it.
        gather_bandwidth: Bytes a second at which a rank is sent sharded weights, on one machine.
        gather_bandwidth_between: The same between machines.
        ranks_per_machine: Up to how many ranks lie on one machine.
        wire_bandwidth: Bytes a second from GPU to GPU through the object store.
        wire_latency_s: Of one hop, whatever its size.
        call_s: Controller's time to make one call.
        answer_s: From the end of a call until the controller knows.
        host_bandwidth: Bytes a second between a GPU and pinned main memory, one way.
        host_memory_gb: Main memory of a machine for each of its GPUs.
        reserve_gb: CUDA's and NCCL's own memory on each GPU.
        spare_share: Part of a GPU's memory that is left free: what an allocator cannot use.
    """

    memory_gb: float = 80.0
    flops: float = 228.9e12
    memory_bandwidth: float = 2.5e12
    gather_bandwidth: float = 200e9
    gather_bandwidth_between: float = 40e9
    ranks_per_machine: int = 8
    wire_bandwidth: float = 1e9
    wire_latency_s: float = 0.002
    call_s: float = 0.0005
    answer_s: float = 0.002
    host_bandwidth: float = 25e9
    host_memory_gb: float = 200.0
    reserve_gb: float = 3.0
    spare_share: float = 0.05

    @property
    def usable_bytes(self) -> float:
        """Bytes that a rank may fill."""
        return GB * (self.memory_gb * (1 - self.spare_share) - self.reserve_gb)

    @property
    def unbound(self) -> Self:
        """GPUs and machines as fast as these that hold anything."""
        return replace(self, memory_gb=math.inf, host_memory_gb=math.inf, spare_share=0.0)

    def gather_s(self, num_bytes: float, ranks: int) -> float:
        """Seconds until each of several ranks has been sent the parts that it lacks."""
        if ranks == 1:
            return 0.0
        near = ranks <= self.ranks_per_machine
        bandwidth = self.gather_bandwidth if near else self.gather_bandwidth_between
        return num_bytes * (ranks - 1) / ranks / bandwidth

    def costs(
        self, seconds: Callable[[Call], float], result_bytes: Callable[[Call], float]
    ) -> Costs:
        """Costs of an iteration's calls: their seconds, and what lies between two GPUs.

        Args:
            seconds: Returns the seconds of a call; may depend on nothing but its role, its rank,
                its stage and its number of samples.
            result_bytes: Returns the bytes of a call's result; depends on no more than `seconds`.
        """
        return Costs(
            _found_once(seconds),
            _found_once(result_bytes),
            bandwidth=self.wire_bandwidth,
            latency_s=self.wire_latency_s,
            call_s=self.call_s,
            answer_s=self.answer_s,
        )


def _found_once(figure: Callable[[Call], float]) -> Callable[[Call], float]:
    """The same figure, found once for calls that differ in micro-batch and iteration alone."""
    known: dict[tuple[str, int, str, bool, int], float] = {}

    def found(call: Call) -> float:
        in_update = call.micro_batch is None
        key = (call.role, call.rank, call.stage, in_update, call.num_samples)
        if key not in known:
            known[key] = figure(call)
        return known[key]

    return found


@dataclass(frozen=True, slots=True)
class GpuKind:
    """The GPUs of one kind in a cluster of several.

    Attributes:
        name: As Ray labels their machines: the value of `ray.io/accelerator-type`, such as `H100`.
        num_gpus: How many there are.
        hardware: What one of them can do.
    """

    name: str
    num_gpus: int
    hardware: Hardware

    @classmethod
    def parse(cls, text: str, hardware: Hardware) -> Self:
        """Returns the kind that `NAME=GPUSxGB@TFLOPS` describes, such as `H100=8x80@229`.

        Args:
            text: The description.
            hardware: What it does not say.

        Raises:
            ConfigError: The text has another form, or a number in it is 0.
        """
        found = _KIND.fullmatch(text.strip())
        numbers = [] if found is None else [float(found[one]) for one in ("gpus", "gb", "tflops")]
        if found is None or not all(numbers):
            raise ConfigError(
                "reading --kind",
                repr(text),
                "NAME=GPUSxGB@TFLOPS with numbers above 0, such as H100=8x80@229",
            )
        num_gpus, memory_gb, tflops = numbers
        sized = replace(hardware, memory_gb=memory_gb, flops=1e12 * tflops)
        return cls(found["name"], int(num_gpus), sized)


def parse_kinds(texts: Sequence[str], hardware: Hardware) -> tuple[GpuKind, ...]:
    """The kinds that several texts describe; see `GpuKind.parse`.

    Raises:
        ConfigError: One cannot be read, two have the same name, or a slower one comes first.
    """
    kinds = tuple(GpuKind.parse(text, hardware) for text in texts)
    names = [kind.name for kind in kinds]
    if len(set(names)) < len(names):
        raise ConfigError("reading --kind", ", ".join(names), "each name once")
    for faster, slower in pairwise(kinds):
        if slower.hardware.flops > faster.hardware.flops:
            found = f"{slower.name}, which is faster, after {faster.name}"
            raise ConfigError("reading --kind", found, "the fastest kind first")
    return kinds
