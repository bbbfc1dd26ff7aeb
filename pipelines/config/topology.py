"""Settings of pools, ranks and replicas."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cluster.schedule.program import Home, Team
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, ROLES, TEACHER
from pipelines.config.section import Section
from sgmd_core.types import GRADIENT, VALUE

FUSED = "fused"
"""Pool of mode `fused`."""


class PoolSettings(Section):
    """Resources of one process of a role."""

    cpus: float = Field(default=1.0, ge=0)
    """Logical CPUs of Ray."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs; at 0 the role computes on the CPU."""
    strategy: Literal["pack", "spread", "strict_pack", "strict_spread"] = "pack"
    """Placement of its processes on machines: on few, on many; strict: on one, each on another."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Machines that will do, by label: `{key: value}`; also `!value`, `in(a, b)`, `!in(a, b)`."""
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
    """Processes that share a network (FSDP2) and the samples of each micro-batch, each with `cpus`
    and `gpus`. Where these do not divide, some ranks have one more than others."""


class TeacherPoolSettings(RolePoolSettings):
    """Resources of the teacher; its replicas hold no state and share the samples."""

    replicas: int = Field(default=1, ge=1, le=2**16)
    """Independent copies, each of `ranks` processes."""


class NamedPoolSettings(RolePoolSettings):
    """Processes that roles are placed on; each of them has a rank of every role of the pool."""

    speed: float = Field(default=1.0, gt=0)
    """Speed of one of its GPUs over that of the other pools', where they differ: decides how many
    of the teacher's calls go to its copy there."""


PoolName = Annotated[str, Field(pattern="^[a-z][a-z0-9_-]{0,39}$")]


class RolePlaces(Section):
    """Pools of `topology.pools` that each role lives on, in mode `map`."""

    generator: PoolName = "learn"
    """Pool of the generator."""
    fake_score: PoolName = "score"
    """Pool of the fake score."""
    teacher: tuple[PoolName, ...] = ("learn", "score")
    """Pools of the teacher: each gets a frozen copy, and the calls go to the one that has time."""
    discriminator: PoolName | None = None
    """Pool of the discriminator, for methods that have one; null: that of the fake score."""

    @field_validator("teacher", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        # Lists become tuples here: behind a validator of its own JSON is no longer JSON.
        given = [value] if isinstance(value, str) else value
        return tuple(given) if isinstance(given, list) else given

    @model_validator(mode="after")
    def _names_a_pool_once(self) -> Self:
        if not self.teacher or len(set(self.teacher)) < len(self.teacher):
            raise ValueError(f"teacher names {list(self.teacher)}, not one or several pools")
        return self

    @property
    def pools(self) -> dict[str, tuple[str, ...]]:
        """Names of the pools by role."""
        return {
            GENERATOR: (self.generator,),
            TEACHER: self.teacher,
            FAKE_SCORE: (self.fake_score,),
            DISCRIMINATOR: (self.discriminator or self.fake_score,),
        }


def _two_pools() -> dict[str, NamedPoolSettings]:
    return {"learn": NamedPoolSettings(), "score": NamedPoolSettings()}


class TopologySettings(Section):
    """Pools of the roles."""

    mode: Literal["map", "pools", "fused", "local"] = "map"
    """`map`: Ray actors in the pools of `topology.pools`, each role where `topology.roles` puts it.
    Short names of three maps: `pools`, each role in a pool of its own; `fused`, all roles in
    one pool; `local`, all in one process, without Ray."""
    address: str | None = None
    """Ray cluster to join, `auto` or `HOST:PORT`; null takes RAY_ADDRESS, else starts Ray here."""
    pools: dict[PoolName, NamedPoolSettings] = Field(
        default_factory=_two_pools, min_length=1, max_length=64
    )
    """In mode `map`: pools by name, their ranks, and resources of each rank."""
    roles: RolePlaces = RolePlaces()
    """In mode `map`: the pool or pools of each role."""
    stage_seconds: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Seconds of one sample by `role.stage`, where roles share pools, to share out the teacher's
    calls: of every stage, or of none to count network passes."""
    generator: RolePoolSettings = RolePoolSettings()
    """In mode `pools`: ranks of the generator, and resources of each."""
    teacher: TeacherPoolSettings = TeacherPoolSettings()
    """In mode `pools`: replicas of the teacher and their ranks, and resources of each rank."""
    fake_score: RolePoolSettings = RolePoolSettings()
    """In mode `pools`: ranks of the fake score, and resources of each."""
    fused: RolePoolSettings = RolePoolSettings()
    """In mode `fused`: ranks of all roles, and resources of each."""
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
    """Transport of results between the roles. `nixl`: from GPU to GPU, with Ray Direct Transport,
    which is alpha; it needs mode `pools`, a GPU for every rank and NIXL on every machine."""
    wire_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which latents, predictions and text travel between Ray actors; bf16 rounds them."""
    gradient_wire_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which the signal to the generator travels."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds that Ray, the pools and the networks may take to come up."""
    call_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds that one part of an iteration may take before the run is given up."""
    watch_s: float = Field(default=20.0, ge=0)
    """Seconds without a sign of life after which a process is frozen, and the least time after
    which a call is stuck: it is ended, with its stack in `RUN/stacks/`. 0: nothing is watched."""
    discriminator: RolePoolSettings = RolePoolSettings()
    """In mode `pools`, for methods that have one: ranks of the discriminator, and resources of
    each."""

    @property
    def bf16_kinds(self) -> frozenset[str]:
        """Kinds of tensors that are rounded to bfloat16 on the way."""
        kinds = {VALUE: self.wire_dtype, GRADIENT: self.gradient_wire_dtype}
        return frozenset(kind for kind, dtype in kinds.items() if dtype == "bf16")

    @model_validator(mode="before")
    @classmethod
    def _mode_of_older_recipes(cls, values: Any) -> Any:  # noqa: ANN401 - as the file has them
        """Recipes without a mode that size the roles' own pools mean these."""
        if not isinstance(values, dict) or {"mode", "pools", "roles"} & {*values}:
            return values
        return {**values, "mode": "pools"} if {*ROLES, DISCRIMINATOR} & {*values} else values

    def role_pools_of(self, roles: Sequence[str]) -> dict[str, RolePoolSettings]:
        """Pools of some roles by name; none in mode `local`."""
        match self.mode:
            case "map":
                return dict(self.pools)
            case "fused":
                return {FUSED: self.fused}
            case "pools":
                return {role: getattr(self, role) for role in roles}
            case "local":
                return {}

    def places_of(self, roles: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Names of the pools that each of some roles lives on; none in mode `local`."""
        match self.mode:
            case "map":
                return {role: self.roles.pools[role] for role in roles}
            case "fused":
                return dict.fromkeys(roles, (FUSED,))
            case "pools":
                return {role: (role,) for role in roles}
            case "local":
                return dict.fromkeys(roles, ())

    @property
    def role_pools(self) -> dict[str, RolePoolSettings]:
        """Pools of the roles that every method has, by name; none in mode `local`."""
        return self.role_pools_of(ROLES)

    @property
    def places(self) -> dict[str, tuple[str, ...]]:
        """Names of the pools that each of these roles lives on; none in mode `local`."""
        return self.places_of(ROLES)

    @property
    def teams(self) -> dict[str, Team]:
        """The processes of each of these roles."""
        return self.teams_of(ROLES)

    @property
    def shares_pools(self) -> bool:
        """True if processes may have ranks of several roles."""
        return self.mode in ("map", "fused")

    def teams_of(self, roles: Sequence[str]) -> dict[str, Team]:
        """The processes of each of some roles."""
        if self.shares_pools:
            pools = self.role_pools_of(roles)
            return {
                role: Team.on(*(_home(name, pools[name]) for name in names))
                for role, names in self.places_of(roles).items()
            }
        own: dict[str, RolePoolSettings] = {role: getattr(self, role) for role in roles}
        return {
            role: Team(pool.replicas if isinstance(pool, TeacherPoolSettings) else 1, pool.ranks)
            for role, pool in own.items()
        }


def _home(name: str, pool: RolePoolSettings) -> Home:
    return Home(name, pool.ranks, pool.speed if isinstance(pool, NamedPoolSettings) else 1.0)
