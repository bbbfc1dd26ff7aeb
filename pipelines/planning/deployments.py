"""Machines of a planned run: a group for each pool, or machines that are all equal.

    each pool its machines    Kubernetes: pods are cut to size, and labelled for their pool
    equal machines            Slurm, virtual machines: Ray packs the pools onto them

Text encoder, feed and validator live on the head, beside the program itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from cluster.jobs import forwarded_environment
from cluster.manifests.deployment import FILE_PATH, POOL_LABEL, Deployment, MachineGroup
from pipelines.config.model_folders import PROJECT_ROOT
from pipelines.config.recipe import DistillConfig
from pipelines.config.topology import PoolSettings, RolePoolSettings, TeacherPoolSettings
from pipelines.planning.plan import Plan
from sgmd_core.errors import ConfigError

_HEAD = "head"
_BESIDE = ("text", "feed", "validator")
_LEAST_MEMORY_GB = 64
_S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@dataclass(frozen=True, slots=True)
class DeploymentRequest:
    """A planned run that is to be deployed.

    Attributes:
        config: Its recipe.
        plan: Its plan.
        gpus_per_machine: Most GPUs of one machine.
        image: Container image.
        made_by: Command that made the manifest.
    """

    config: DistillConfig
    plan: Plan
    gpus_per_machine: int
    image: str
    made_by: str

    @property
    def memory_gb(self) -> float:
        """Main memory beside each GPU."""
        return self.plan.hardware.host_memory_gb


def deployment_of_pools(request: DeploymentRequest) -> Deployment:
    """A deployment with a group of machines for each pool, which the pool finds by its label.

    Raises:
        ConfigError: A path is of this machine alone, or a label cannot be given to a machine.
    """
    pools = request.config.topology.role_pools_of(request.config.roles)
    labels: dict[str, Any] = {
        f"topology.{_section(request.config, name)}.labels": {
            **settings.labels,
            POOL_LABEL: name.replace("_", "-"),
        }
        for name, settings in pools.items()
    }
    labels |= {
        f"topology.{name}.labels": {
            **getattr(request.config.topology, name).labels,
            POOL_LABEL: _HEAD,
        }
        for name in _BESIDE
    }
    workers = [_group_of(request, name, settings) for name, settings in pools.items()]
    gpus = request.plan.gpus_beside
    memory = max(_LEAST_MEMORY_GB, math.ceil(request.memory_gb * gpus))
    head = MachineGroup(
        _HEAD, 1, _cpus_beside(request.config), gpus, memory, labels={POOL_LABEL: _HEAD}
    )
    return _deployment(request, request.config.with_settings(labels), head, workers)


def deployment_of_equals(request: DeploymentRequest) -> Deployment:
    """A deployment on machines that are all equal, the first of them the head.

    Raises:
        ConfigError: A path is of this machine alone, or a pool wants machines of its own.
    """
    topology = request.config.topology
    role_pools = topology.role_pools_of(request.config.roles)
    pools: dict[str, PoolSettings] = dict(role_pools)
    pools |= {name: getattr(topology, name) for name in _BESIDE}
    choosy = [name for name, pool in pools.items() if pool.labels or pool.resources]
    if choosy:
        raise ConfigError(
            "planning equal machines",
            f"topology pool {choosy[0]} asks for machines with labels or resources of their own",
            "pools that any machine will do for",
            f"Set the labels and resources of {', '.join(choosy)} to {{}}, or emit kuberay, which "
            "has a group of machines for each pool",
        )
    total = request.plan.best.num_gpus + request.plan.gpus_beside
    gpus = min(total, request.gpus_per_machine)
    per_gpu = max(pool.cpus / max(pool.gpus, 1.0) for pool in role_pools.values())
    cpus = math.ceil(per_gpu * gpus) + _cpus_beside(request.config)
    memory = max(_LEAST_MEMORY_GB, math.ceil(request.memory_gb * gpus))
    head = MachineGroup(_HEAD, 1, cpus, gpus, memory)
    others = math.ceil(total / gpus) - 1
    for name, pool in role_pools.items():
        _require_room(request, name, pool, _most_ranks(request, pool))
    workers = [MachineGroup("worker", others, cpus, gpus, memory)] if others else []
    return _deployment(request, request.config, head, workers)


def _deployment(
    request: DeploymentRequest,
    config: DistillConfig,
    head: MachineGroup,
    workers: list[MachineGroup],
) -> Deployment:
    _require_reachable(config)
    # The program finds the cluster that it was started on.
    config = config.with_settings({"topology.address": "auto"})
    also = (one.source for one in config.data.also)
    addresses = (
        *(config.output, config.data.train, config.data.validation, config.model.folder),
        *also,
    )
    in_s3 = any("://" in (address or "") for address in (*addresses, config.teacher.model))
    secrets = [*(_S3_KEYS if in_s3 else ())]
    if config.tracker.wandb == "online":
        secrets.append("WANDB_API_KEY")
    return Deployment(
        name=config.name,
        program=("sgmd", "distill", FILE_PATH, "--resume", "auto"),
        file=config.to_yaml(),
        head=head,
        workers=workers,
        ray_version=version("ray"),
        image=request.image,
        environment=forwarded_environment(),
        secrets=secrets,
        stop_after_s=math.ceil(config.checkpoint.stop_after_s),
        made_by=request.made_by,
    )


def _group_of(request: DeploymentRequest, name: str, pool: RolePoolSettings) -> MachineGroup:
    """The machines of one pool: as large as allowed, and all equal."""
    copies = pool.replicas if isinstance(pool, TeacherPoolSettings) else 1
    processes = pool.ranks * copies
    most = _most_ranks(request, pool)
    if pool.strategy == "strict_spread":
        most = 1
    each = max(size for size in range(1, most + 1) if processes % size == 0)
    _require_room(request, name, pool, each)
    gpus = math.ceil(pool.gpus * each)
    memory = max(_LEAST_MEMORY_GB, math.ceil(request.memory_gb * max(1, gpus)))
    resources = {key: amount * each for key, amount in pool.resources.items()}
    return MachineGroup(
        name.replace("_", "-"),
        processes // each,
        math.ceil(pool.cpus * each),
        gpus,
        memory,
        {**_given_labels(name, pool.labels), POOL_LABEL: name.replace("_", "-")},
        resources,
    )


def _most_ranks(request: DeploymentRequest, pool: RolePoolSettings) -> int:
    """Ranks of a pool that one machine has GPUs for."""
    copies = pool.replicas if isinstance(pool, TeacherPoolSettings) else 1
    if not pool.gpus:
        return pool.ranks * copies
    return max(1, math.floor(request.gpus_per_machine / pool.gpus))


def _require_room(request: DeploymentRequest, name: str, pool: RolePoolSettings, each: int) -> None:
    """Refuses ranks that must be on one machine, where a machine has room for `each` of them."""
    if pool.strategy == "strict_pack" and each < pool.ranks:
        raise ConfigError(
            f"planning the machines of pool {name}",
            f"strict_pack of {pool.ranks} ranks, and machines of {request.gpus_per_machine} GPUs",
            "room for all of them on one machine",
            f"Set topology.{_section(request.config, name)}.strategy=pack, or --with "
            "gpus-per-machine to what a machine has",
        )


def _given_labels(name: str, wanted: Mapping[str, str]) -> dict[str, str]:
    """Labels that a pool asks for and its machines get; Ray gives its own (ray.io/) itself."""
    own = {key: value for key, value in wanted.items() if not key.startswith("ray.io/")}
    for key, value in own.items():
        if value.startswith(("!", "in(")):
            raise ConfigError(
                f"labelling the machines of pool {name}",
                f"the selector {key}: {value}",
                "a label that one kind of machine has",
                "Write the value itself; the pool gets machines of its own",
            )
    return own


def _section(config: DistillConfig, pool: str) -> str:
    return f"pools.{pool}" if config.topology.mode == "map" else pool


def _cpus_beside(config: DistillConfig) -> int:
    """CPUs for what is not a role: text, feed, validator, readers, and the program."""
    topology = config.topology
    light = topology.text.cpus + topology.feed.cpus + topology.validator.cpus
    return math.ceil(light) + config.data.read_ahead.readers + 1


def _require_reachable(config: DistillConfig) -> None:
    """Refuses paths that only this machine knows."""
    places = {
        "output": config.output,
        "data.train": config.data.train,
        "data.validation": config.data.validation,
        **{f"data.also[{at}].source": one.source for at, one in enumerate(config.data.also)},
        "model.folder": config.model.folder,
        "teacher.model": config.teacher.model or "",
    }
    shipped = ("model.folder", "teacher.model")
    wrong = {
        key: place
        for key, place in places.items()
        if place
        and "://" not in place
        and not place.startswith("/")
        and not (key in shipped and (PROJECT_ROOT / place).exists())
    }
    if wrong:
        raise ConfigError(
            "planning machines for a run",
            ", ".join(f"{key}={place}" for key, place in wrong.items())
            + ": relative paths, which other machines do not know",
            "addresses such as s3://bucket/runs, or absolute paths that every machine has",
            "Add to the command: " + " ".join(f"{key}=s3://BUCKET/PREFIX" for key in wrong),
        )
