"""YAML for Ray's cluster launcher (`ray up`): virtual machines of AWS or GCP, or machines at hand.

Every machine is of one kind; the first is the head. The token is that of the machine from which
`ray up` is called: the launcher copies it to all, and with it a file of keys where some are needed.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.manifests.deployment import Deployment, MachineGroup, dns_name, yaml_documents

Provider = Literal["aws", "gcp", "local"]

_TOKEN = "~/.ray/auth_token"
_KEYS = "~/.sgmd-keys"
_RECIPE = "~/recipe.yaml"
_DISK_GB = 500
_GCP_IMAGES = "deeplearning-platform-release"
_STARTS = "ulimit -n 65536; RAY_AUTH_MODE=token ray start --disable-usage-stats"

_WORDS = """\
{made_by}
Once: RAY_AUTH_MODE=token ray get-auth-token --generate   (the token, in ~/.ray/auth_token)
{keys}  ray up -y THIS
  ray exec THIS 'tail -n +1 -F ~/run.log'                  follow the run
  ray down -y THIS                                         give the machines back
Start the run, and go on with it after it ended:
  ray exec THIS {run!r}"""
_WORDS_ON_KEYS = """\
Once, with the keys in the environment, for the file that is copied to every machine:
  (umask 077; declare -p {names} > {file})
"""


@dataclass(frozen=True, slots=True)
class Machines:
    """Machines of a provider.

    Attributes:
        provider: Cloud, or machines at hand.
        instance: Type of instance; unused for machines at hand.
        region: Region of AWS, or zone of GCP.
        project: Project of GCP.
        hosts: Addresses of machines at hand, the head first.
        user: Account on them.
        profile: ARN of the instance profile of AWS by which they reach S3; empty: Ray's own for
            the head, and none for the others.
    """

    provider: Provider
    instance: str = ""
    region: str = ""
    project: str = ""
    hosts: tuple[str, ...] = ()
    user: str = "ubuntu"
    profile: str = ""


def launcher_config(deployment: Deployment, machines: Machines) -> str:
    """YAML of a cluster that `ray up` starts.

    Args:
        deployment: What runs; its head stands for every machine.
        machines: Where.
    """
    workers = sum(group.count for group in deployment.workers)
    command = " ".join(deployment.command(_RECIPE))
    keys = _keys(deployment, machines)
    # Where it is read, Ray's processes and the program have the keys in their environment.
    read = f". {_KEYS}; " if keys else ""
    run = f"{read}RAY_AUTH_MODE=token RAY_ADDRESS=auto nohup {command} >> ~/run.log 2>&1 & disown"
    config: dict[str, Any] = {
        "cluster_name": dns_name(deployment.name),
        "max_workers": workers,
        "provider": _provider(machines),
        "auth": {"ssh_user": machines.user},
        "docker": _docker(deployment),
        "file_mounts": {path: path for path in (_TOKEN, *([_KEYS] if keys else []))},
        "head_setup_commands": [_write_file(deployment.file)],
        "head_start_ray_commands": [
            "ray stop",
            read
            + _start(deployment.head, "--head --port=6379 --dashboard-host=127.0.0.1")
            + ("" if machines.provider == "local" else _AUTOSCALING),
        ],
        "worker_start_ray_commands": [
            "ray stop",
            read + _start(deployment.head, "--address=$RAY_HEAD_IP:6379"),
        ],
    }
    if machines.provider != "local":
        config["head_node_type"] = "head"
        config["available_node_types"] = _node_types(machines, deployment.head, workers)
        config["idle_timeout_minutes"] = 30
    on_keys = _WORDS_ON_KEYS.format(names=" ".join(keys), file=_KEYS) if keys else ""
    words = _WORDS.format(made_by=deployment.made_by, run=run, keys=on_keys)
    return yaml_documents(words, config)


_AUTOSCALING = " --autoscaling-config=~/ray_bootstrap_config.yaml"


def _keys(deployment: Deployment, machines: Machines) -> Sequence[str]:
    """Names of the keys that machines have to be given; a profile stands for those of AWS."""
    return [
        name for name in deployment.secrets if not (machines.profile and name.startswith("AWS_"))
    ]


def _provider(machines: Machines) -> dict[str, Any]:
    match machines.provider:
        case "aws":
            return {"type": "aws", "region": machines.region, "cache_stopped_nodes": False}
        case "gcp":
            return {
                "type": "gcp",
                "region": machines.region.rpartition("-")[0],
                "availability_zone": machines.region,
                "project_id": machines.project,
            }
        case "local":
            head, *workers = machines.hosts
            return {"type": "local", "head_ip": head, "worker_ips": workers}


def _node_types(machines: Machines, group: MachineGroup, workers: int) -> dict[str, Any]:
    resources = {"CPU": group.cpus, "GPU": group.gpus} if group.gpus else {"CPU": group.cpus}
    node_config = _node_config(machines)
    return {
        "head": {"resources": resources, "node_config": node_config},
        "worker": {
            "min_workers": workers,
            "max_workers": workers,
            "resources": resources,
            "node_config": node_config,
        },
    }


def _node_config(machines: Machines) -> dict[str, Any]:
    if machines.provider == "aws":
        disk = {"VolumeSize": _DISK_GB, "VolumeType": "gp3"}
        profile = {"IamInstanceProfile": {"Arn": machines.profile}} if machines.profile else {}
        return {
            "InstanceType": machines.instance,
            "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
            **profile,
        }
    image = f"projects/{_GCP_IMAGES}/global/images/family/common-cu129-ubuntu-2404-nvidia-580"
    return {
        "machineType": machines.instance,
        "disks": [
            {
                "boot": True,
                "autoDelete": True,
                "type": "PERSISTENT",
                "initializeParams": {"diskSizeGb": _DISK_GB, "sourceImage": image},
            }
        ],
        # Machines with GPUs cannot be moved while they run.
        "scheduling": [{"onHostMaintenance": "TERMINATE"}],
    }


def _docker(deployment: Deployment) -> dict[str, Any]:
    # The object store lives in shared memory; Ray takes 30 % of the memory for it.
    shared = max(1, round(0.35 * deployment.head.memory_gb))
    options = [f"--shm-size={shared}g", "--ulimit nofile=65536:65536"]
    options += ["--gpus all"] if deployment.head.gpus else []
    # The machine's shell reads them.
    options += [
        f"-e {shlex.quote(f'{key}={value}')}" for key, value in deployment.environment.items()
    ]
    return {
        "image": deployment.image,
        "container_name": dns_name(deployment.name),
        "pull_before_run": True,
        "run_options": options,
    }


def _start(group: MachineGroup, where: str) -> str:
    return f"{_STARTS} {where} --num-cpus={group.cpus} --num-gpus={group.gpus}"


def _write_file(text: str) -> str:
    return f"cat > {_RECIPE} <<'SGMD_RECIPE'\n{text}SGMD_RECIPE\n"
