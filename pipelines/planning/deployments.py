"""Machines of a planned run: a group for each pool, or machines that are all equal.

    each pool its machines    Kubernetes: pods are cut to size, and labelled for their pool
    each kind its machines    Kubernetes with several kinds of GPU: pods are sent to nodes by label
    equal machines            Slurm, virtual machines: Ray packs the pools onto them

Text encoder, feed and validator live on the head, beside the program itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from cluster.jobs import forwarded_environment
from cluster.manifests.deployment import (
    FILE_PATH,
    POOL_LABEL,
    Deployment,
    MachineGroup,
    dns_name,
)
from pipelines.config.model_folders import PROJECT_ROOT
from pipelines.config.recipe import DistillConfig
from pipelines.config.topology import PoolSettings, RolePoolSettings, TeacherPoolSettings
from pipelines.planning.plan import Plan
from sgmd_core.errors import ConfigError
from sgmd_core.words import count_in_words

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
        nodes: Labels of the Kubernetes nodes with each kind of GPU, where there are several kinds.
    """

    config: DistillConfig
    plan: Plan
    gpus_per_machine: int
    image: str
    made_by: str
    nodes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

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
    workers = [_group_of(request, name, settings) for name, settings in pools.items()]
    homes = {name: name.replace("_", "-") for name in pools}
    return _labelled_deployment(request, pools, homes, workers, {})


def deployment_of_kinds(request: DeploymentRequest) -> Deployment:
    """A deployment with a group of machines for each kind of GPU that the plan uses.

    Pools on one kind share its machines and ask for them by label, beside the label that Ray gives
    machines with such GPUs. What lives on the head has GPUs of the last kind that has enough.

    Raises:
        ConfigError: A path is of this machine alone, the labels of a kind's nodes are not given, a
            label cannot be given to a machine, or a pool does not fit its machines.
    """
    pools = request.config.topology.role_pools_of(request.config.roles)
    kind_of = {name: use.kind for name, use in request.plan.best.pools.items()}
    on_kinds = {
        kind.name: {name: pool for name, pool in pools.items() if kind_of[name] == kind.name}
        for kind in request.plan.kinds
    }
    on_head = _kind_of_head(request)
    used = [name for name, own in on_kinds.items() if own or name == on_head]
    missing = [name for name in used if name not in request.nodes]
    if missing:
        raise ConfigError(
            "planning machines of several kinds of GPU",
            f"no labels of the Kubernetes nodes with {', '.join(missing)}",
            "a label by which Kubernetes tells them from the others (kubectl get nodes "
            "--show-labels), such as nvidia.com/gpu.product or cloud.google.com/gke-accelerator",
            "--with nodes=" + ",".join(f"{name}:KEY=VALUE" for name in used),
        )
    workers = [_group_of_kind(request, name, own) for name, own in on_kinds.items() if own]
    homes = {name: dns_name(kind_of[name]) for name in pools}
    return _labelled_deployment(request, pools, homes, workers, request.nodes.get(on_head, {}))


def _kind_of_head(request: DeploymentRequest) -> str:
    """The kind of GPU of text encoder, feed and validator; empty where they have none."""
    wanted, found = request.plan.gpus_beside, request.plan.kind_beside
    if not wanted:
        return ""
    if found is not None:
        return found.name
    left = request.plan.left_over
    raise ConfigError(
        "planning the head of a cluster",
        f"{count_in_words(wanted, 'GPU')} for text encoder, feed and validator, and beside "
        "the roles are left " + ", ".join(f"{number} {name}" for name, number in left.items()),
        "as many of one kind, for they live on one machine",
        "Lower `gpus` of topology.text, topology.feed and topology.validator, or leave the kind "
        "with the fewest GPUs out",
    )


def _labelled_deployment(
    request: DeploymentRequest,
    pools: Mapping[str, RolePoolSettings],
    homes: Mapping[str, str],
    workers: list[MachineGroup],
    nodes_of_head: Mapping[str, str],
) -> Deployment:
    """A deployment whose pools ask for the labels of their machines, the others for the head's.

    Args:
        request: What is to be deployed.
        pools: Pools of the roles.
        homes: Label of each pool's machines.
        workers: These machines.
        nodes_of_head: Labels of the Kubernetes nodes that the head may run on.
    """
    topology = request.config.topology
    labels: dict[str, Any] = {
        f"topology.{_section(request.config, name)}.labels": {
            **settings.labels,
            POOL_LABEL: homes[name],
        }
        for name, settings in pools.items()
    }
    labels |= {
        f"topology.{name}.labels": {**getattr(topology, name).labels, POOL_LABEL: _HEAD}
        for name in _BESIDE
    }
    gpus = request.plan.gpus_beside
    memory = max(_LEAST_MEMORY_GB, math.ceil(request.memory_gb * gpus))
    head = MachineGroup(
        _HEAD,
        1,
        _cpus_beside(request.config),
        gpus,
        memory,
        labels={POOL_LABEL: _HEAD},
        nodes=nodes_of_head,
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


def _group_of_kind(
    request: DeploymentRequest, kind: str, pools: Mapping[str, RolePoolSettings]
) -> MachineGroup:
    """The machines of one kind of GPU, for all pools on it: as large as allowed, and all equal."""
    ranks = {name: pool.ranks for name, pool in pools.items()}
    total = sum(ranks.values())
    most = min(_most_ranks(request, pool) for pool in pools.values())
    if any(pool.strategy == "strict_spread" for pool in pools.values()):
        most = 1
    each = max(size for size in range(1, most + 1) if total % size == 0)
    labels = _shared_labels(kind, pools)
    resources: dict[str, float] = {}
    for name, pool in pools.items():
        _require_room(request, name, pool, each)
        for key, amount in pool.resources.items():
            resources[key] = max(resources.get(key, 0.0), amount * each)
    gpus = math.ceil(each * max(pool.gpus for pool in pools.values()))
    return MachineGroup(
        dns_name(kind),
        total // each,
        math.ceil(each * max(pool.cpus for pool in pools.values())),
        gpus,
        max(_LEAST_MEMORY_GB, math.ceil(request.memory_gb * max(1, gpus))),
        {**labels, POOL_LABEL: dns_name(kind)},
        resources,
        request.nodes[kind],
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
            f"strict_pack of {pool.ranks} ranks, and machines of "
            f"{count_in_words(request.gpus_per_machine, 'GPU')}",
            "room for all of them on one machine",
            f"Set topology.{_section(request.config, name)}.strategy=pack, or --with "
            "gpus-per-machine to what a machine has",
        )


def _given_labels(name: str, labels: Mapping[str, str]) -> dict[str, str]:
    """Labels that a pool asks for and its machines get; Ray gives its own (ray.io/) itself."""
    own = {key: value for key, value in labels.items() if not key.startswith("ray.io/")}
    for key, value in own.items():
        if value.startswith(("!", "in(")):
            raise ConfigError(
                f"labelling the machines of pool {name}",
                f"the selector {key}: {value}",
                "a label that one kind of machine has",
                "Write the value itself; the pool gets machines of its own",
            )
    return own


def _shared_labels(kind: str, pools: Mapping[str, RolePoolSettings]) -> dict[str, str]:
    """Labels that pools on one kind of GPU ask for; its machines, all alike, get all of them."""
    labels: dict[str, str] = {}
    asking: dict[str, str] = {}
    for name, pool in pools.items():
        for key, value in _given_labels(name, pool.labels).items():
            if labels.setdefault(key, value) != value:
                raise ConfigError(
                    f"labelling the machines with {kind}",
                    f"pool {asking[key]} asks for {key}: {labels[key]}, pool {name} for {value}",
                    "one value of a label for all pools on one kind of GPU, which share machines",
                    "Give both pools the same value, or each a key of its own",
                )
            asking.setdefault(key, name)
    return labels


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
