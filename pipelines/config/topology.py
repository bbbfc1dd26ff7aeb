"""Settings of pools, ranks and replicas, and what a batch allows of them."""

from collections.abc import Iterable, Mapping, Sequence
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
    stage_seconds: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
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
    company: Mapping[str, int],
) -> list[str]:
    """Returns what a topology cannot do with a batch of this size, as sentences.

    Args:
        topology: The settings.
        batch_size: Samples of one update.
        micro_batches: Parts of it.
        company: By role that the recipe's method has, ranks that work on samples together.
    """
    problems: list[str] = []
    roles = tuple(company)
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
        parties = number / _least_company(topology, section, company)
        if parties > samples:
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
    # Ranks that work on samples together are one party.
    parties = max(1, topology.teacher.ranks // company.get(TEACHER, 1))
    if replicas > batch_size // parties:
        problems.append(
            f"topology.teacher.replicas {replicas} is more than the batch has samples for "
            f"({batch_size}, {_parties_in_words(topology.teacher.ranks, parties)} in each), so "
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


def _parties_in_words(ranks: int, parties: int) -> str:
    """Those of some ranks that have samples of their own: each, or several together."""
    if parties == ranks:
        return f"{ranks} ranks"
    return f"{parties} parties of {ranks // parties} ranks that work together"


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


def _least_company(topology: TopologySettings, section: str, company: Mapping[str, int]) -> int:
    """Ranks that work on a sample together, of the role of a section where they are the fewest."""
    name = section.rpartition(".")[2]
    places = {role: (role,) for role in company}
    if topology.shares_pools:
        places = topology.places_of(tuple(company))
    return min((own for role, own in company.items() if name in places[role]), default=1)


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
