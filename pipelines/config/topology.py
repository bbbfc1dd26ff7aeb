"""Settings of pools, ranks and replicas, and what a batch allows of them."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cluster.schedule.program import Team
from pipelines.config.roles import FAKE_SCORE, GENERATOR, ROLES, TEACHER
from pipelines.config.section import Section
from sgmd_core.types import GRADIENT, VALUE


class PoolSettings(Section):
    """Resources of one process of a role."""

    cpus: float = Field(default=1.0, ge=0)
    """Logical CPUs of Ray."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs; at 0 the role computes on the CPU."""
    strategy: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """How its processes lie on the machines: on few, on many; strict: on one, each on another."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Which machines will do, by label: `{key: value}`; also `!value`, `in(a, b)`, `!in(a, b)`."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Custom resources of Ray that it takes, by name: they pin it to machines that offer them."""

    @model_validator(mode="after")
    def _takes_something(self) -> Self:
        if not self.cpus + self.gpus:
            raise ValueError("cpus and gpus are both 0, but a process needs some of either")
        return self


class LightPoolSettings(PoolSettings):
    """Resources of a role that computes little; a small claim keeps it schedulable anywhere."""

    cpus: float = Field(default=0.25, ge=0)
    """Logical CPUs of Ray; light roles share cores with the others."""


class RolePoolSettings(PoolSettings):
    """Resources of a role whose network can be sharded."""

    ranks: int = Field(default=1, ge=1, le=2**16)
    """Processes that share one network (FSDP2) and its samples, each with `cpus` and `gpus`."""


class TeacherPoolSettings(RolePoolSettings):
    """Resources of the teacher; its replicas hold no state and share the samples."""

    replicas: int = Field(default=1, ge=1, le=2**16)
    """Independent copies, each of `ranks` processes."""


class TopologySettings(Section):
    """Pools of the roles."""

    mode: Literal["pools", "fused", "local"] = "pools"
    """`pools`: Ray actors, each role on its own resources. `fused`: Ray actors that each have a
    rank of all three roles. `local`: one process, without Ray."""
    address: str | None = None
    """Ray cluster to join, `auto` or `HOST:PORT`; null takes RAY_ADDRESS, else starts Ray here."""
    generator: RolePoolSettings = RolePoolSettings()
    """Ranks of the generator, and resources of each."""
    teacher: TeacherPoolSettings = TeacherPoolSettings()
    """Replicas of the teacher and their ranks, and resources of each rank."""
    fake_score: RolePoolSettings = RolePoolSettings()
    """Ranks of the fake score, and resources of each."""
    fused: RolePoolSettings = RolePoolSettings()
    """In mode `fused`, in place of these three: ranks of all of them, and resources of each."""
    text: LightPoolSettings = LightPoolSettings()
    """Resources of the text encoder; a GPU is worth it where captions are not encoded already."""
    feed: LightPoolSettings = LightPoolSettings()
    """Resources of the process that hands out captions."""
    validator: LightPoolSettings = LightPoolSettings()
    """Resources of the validator; a GPU keeps validation up with the training."""
    threads_per_rank: int = Field(default=1, ge=1)
    """Torch threads of each role's process."""
    depth: int = Field(default=2, ge=1, le=2**10)
    """Micro-batches in flight; each one keeps a rollout's graph. Changes waiting, not numbers."""
    max_staleness_iterations: Literal[0, 1] = 0
    """1: an iteration may begin before the fake score's update of the one before has ended."""
    transport: Literal["object_store", "nixl"] = "object_store"
    """How results travel between the roles. `nixl`: from GPU to GPU, with Ray Direct Transport,
    which is alpha; it needs mode `pools`, a GPU for every rank and NIXL on every machine."""
    wire_dtype: Literal["fp32", "bf16"] = "fp32"
    """How latents, predictions and text travel between Ray actors; bf16 rounds them."""
    gradient_wire_dtype: Literal["fp32", "bf16"] = "fp32"
    """How the signal to the generator travels."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """How long Ray, the pools and the networks may take to come up."""
    call_timeout_s: float = Field(default=600.0, gt=0)
    """How long one phase of an iteration may take before the run is given up."""

    @property
    def narrowed(self) -> frozenset[str]:
        """Kinds of tensors that are rounded to bfloat16 on the way."""
        kinds = {VALUE: self.wire_dtype, GRADIENT: self.gradient_wire_dtype}
        return frozenset(kind for kind, dtype in kinds.items() if dtype == "bf16")

    @property
    def teams(self) -> dict[str, Team]:
        """The processes of each role."""
        if self.mode == "fused":
            return {role: Team(ranks=self.fused.ranks) for role in ROLES}
        return {
            GENERATOR: Team(ranks=self.generator.ranks),
            TEACHER: Team(self.teacher.replicas, self.teacher.ranks),
            FAKE_SCORE: Team(ranks=self.fake_score.ranks),
        }


def topology_contradictions(
    topology: TopologySettings, batch_size: int, micro_batches: int
) -> list[str]:
    """Returns what a topology cannot do with a batch of this size, as sentences."""
    problems: list[str] = []
    if topology.mode == "local" and topology.address is not None:
        problems.append(
            f"topology.address {topology.address!r} names a Ray cluster, but topology.mode local "
            "uses no Ray"
        )
    samples = batch_size // micro_batches
    sections = {role: role if topology.mode != "fused" else "fused" for role in ROLES}
    ranks = {sections[role]: team.ranks for role, team in topology.teams.items()}
    for section, number in ranks.items():
        if batch_size % micro_batches == 0 and samples % number:
            problems.append(
                f"a micro-batch has {samples} samples (batch.size / batch.micro_batches), which do "
                f"not divide among topology.{section}.ranks {number}"
            )
        if topology.mode == "local" and number > 1:
            problems.append(
                f"topology.{section}.ranks is {number}, but topology.mode local is one process; "
                "set it to 1, or the mode to pools"
            )
    problems += _transport_contradictions(topology)
    replicas = topology.teams[TEACHER].replicas
    if replicas > batch_size // topology.teacher.ranks:
        problems.append(
            f"topology.teacher.replicas {replicas} is more than the batch has samples for "
            f"({batch_size} over {topology.teacher.ranks} ranks), so some would never work"
        )
    if topology.max_staleness_iterations and topology.mode != "pools":
        problems.append(
            "topology.max_staleness_iterations 1 lets roles run apart, but in topology.mode "
            f"{topology.mode} they take turns; set it to 0"
        )
    return problems


def _transport_contradictions(topology: TopologySettings) -> list[str]:
    if topology.transport == "object_store":
        return []
    problems: list[str] = []
    if topology.mode != "pools":
        problems.append(
            f"topology.transport {topology.transport} is for roles in processes of their own, but "
            f"topology.mode is {topology.mode}; set it to pools, or the transport to object_store"
        )
    gpus = {
        GENERATOR: topology.generator.gpus,
        TEACHER: topology.teacher.gpus,
        FAKE_SCORE: topology.fake_score.gpus,
    }
    problems += [
        f"topology.transport {topology.transport} goes from GPU to GPU, but topology.{role}.gpus "
        f"is {number:g}; give every rank a GPU, or set the transport to object_store"
        for role, number in gpus.items()
        if number < 1
    ]
    if topology.narrowed:
        problems.append(
            f"topology.transport {topology.transport} sends tensors as they are; set "
            "topology.wire_dtype and topology.gradient_wire_dtype to fp32"
        )
    return problems
