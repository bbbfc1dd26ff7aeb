"""Manifests for KubeRay: a RayJob for one run, or a RayCluster that stays.

    ConfigMap     the program's file
    RayJob        starts a cluster, runs the program, gives the cluster back
    RayCluster    waits for jobs; Redis keeps its control state over a restart of the head

The operator makes the token: it is in the secret that is named like the cluster, and in the
environment of every container. Fields are those of KubeRay 1.7.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.manifests.deployment import Deployment, MachineGroup, dns_name, yaml_documents

_MOUNT = "/etc/sgmd"
_FILE = "recipe.yaml"
_API = "ray.io/v1"
_TTL_S = 600
_RETRIES = 3
_REDIS_IMAGE = "redis:8.2"
# Beside what Ray hands out: its own processes.
_CPUS_OF_RAY = 1
_GRACE_S = 60

_JOB_WORDS = """\
{made_by}
KubeRay 1.6 or newer; for GPUs NVIDIA's device plugin. Before it:
{keys}Then: kubectl apply -f THIS; kubectl logs -f job/{name}
The cluster ends with the run. A run that fails starts again, {retries} times, and resumes."""

_CLUSTER_WORDS = """\
{made_by}
KubeRay 1.6 or newer; for GPUs NVIDIA's device plugin. Before it:
{keys}  kubectl create secret generic {name}-redis --from-literal=password=$(openssl rand -hex 32)
Then, beside `kubectl port-forward svc/{name}-head-svc 8265`:
  export RAY_AUTH_MODE=token
  export RAY_AUTH_TOKEN=$(kubectl get secret {name} -o jsonpath={{.data.auth_token}} | base64 -d)
  sgmd submit RECIPE --address http://127.0.0.1:8265
A restart of the head ends the runs and keeps the machines: submit a run again, to resume."""


def ray_job(deployment: Deployment, volumes: Mapping[str, str] | None = None) -> str:
    """YAML of a RayJob, and of the ConfigMap with its file.

    Args:
        deployment: What runs, and on which machines.
        volumes: Persistent volume claims by the path where every machine mounts them.
    """
    name = dns_name(deployment.name)
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-recipe"},
        "data": {_FILE: deployment.file},
    }
    stop_s = deployment.stop_after_s + _GRACE_S
    job = {
        "apiVersion": _API,
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": shlex.join(deployment.command(f"{_MOUNT}/{_FILE}")),
            # Ray kills a job that is stopped after 3 s, unless its environment says otherwise.
            "runtimeEnvYAML": f'env_vars:\n  RAY_JOB_STOP_WAIT_TIME_S: "{stop_s}"\n',
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _TTL_S,
            "backoffLimit": _RETRIES,
            "rayClusterSpec": _cluster_spec(deployment, volumes or {}, f"{name}-recipe"),
        },
    }
    words = _JOB_WORDS.format(**_words_of(deployment), retries=_RETRIES)
    return yaml_documents(words, config_map, job)


def ray_cluster(deployment: Deployment, volumes: Mapping[str, str] | None = None) -> str:
    """YAML of a RayCluster, and of the Redis that its control service keeps its state in.

    Args:
        deployment: The machines; its program is left out.
        volumes: Persistent volume claims by the path where every machine mounts them.
    """
    name = dns_name(deployment.name)
    redis = f"{name}-redis"
    password = {"valueFrom": {"secretKeyRef": {"name": redis, "key": "password"}}}
    spec = _cluster_spec(deployment, volumes or {}, None)
    spec["gcsFaultToleranceOptions"] = {"redisAddress": f"{redis}:6379", "redisPassword": password}
    cluster = {
        "apiVersion": _API,
        "kind": "RayCluster",
        "metadata": {"name": name},
        "spec": spec,
    }
    words = _CLUSTER_WORDS.format(**_words_of(deployment))
    return yaml_documents(words, *_redis(redis, password), cluster)


def _words_of(deployment: Deployment) -> dict[str, str]:
    literals = " ".join(f'--from-literal={key}="${key}"' for key in deployment.secrets)
    keys = f"  kubectl create secret generic {_secret_name(deployment)} {literals}\n"
    return {
        "made_by": deployment.made_by,
        "name": dns_name(deployment.name),
        "keys": keys if deployment.secrets else "",
    }


def _secret_name(deployment: Deployment) -> str:
    return f"{dns_name(deployment.name)}-keys"


def _cluster_spec(
    deployment: Deployment, volumes: Mapping[str, str], config_map: str | None
) -> dict[str, Any]:
    head = _group(deployment, deployment.head, volumes, config_map)
    head["rayStartParams"]["dashboard-host"] = "0.0.0.0"
    container = head["template"]["spec"]["containers"][0]
    container["name"] = "ray-head"
    container["ports"] = [
        {"name": port_name, "containerPort": port}
        for port_name, port in (("gcs-server", 6379), ("dashboard", 8265), ("metrics", 8080))
    ]
    return {
        "rayVersion": deployment.ray_version,
        "authOptions": {"mode": "token"},
        "headGroupSpec": head,
        "workerGroupSpecs": [
            _workers(deployment, group, volumes, config_map) for group in deployment.workers
        ],
    }


def _workers(
    deployment: Deployment,
    group: MachineGroup,
    volumes: Mapping[str, str],
    config_map: str | None,
) -> dict[str, Any]:
    spec = _group(deployment, group, volumes, config_map)
    # A machine that is taken away leaves Ray in order, and is not waited for.
    leave = {"preStop": {"exec": {"command": ["/bin/sh", "-c", "ray stop"]}}}
    spec["template"]["spec"]["containers"][0]["lifecycle"] = leave
    counts = dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), group.count)
    return {"groupName": dns_name(group.name), **counts, **spec}


def _group(
    deployment: Deployment,
    group: MachineGroup,
    volumes: Mapping[str, str],
    config_map: str | None,
) -> dict[str, Any]:
    """The part that head and workers have in common."""
    amounts = {"cpu": str(group.cpus + _CPUS_OF_RAY), "memory": f"{group.memory_gb}G"}
    if group.gpus:
        amounts["nvidia.com/gpu"] = str(group.gpus)
    mounts, sources = _volumes(volumes, config_map)
    container: dict[str, Any] = {
        "name": "ray-worker",
        "image": deployment.image,
        "resources": {"limits": amounts, "requests": dict(amounts)},
        "env": _environment(deployment),
    }
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": deployment.stop_after_s + _GRACE_S,
        "containers": [container],
    }
    if group.nodes:
        pod["nodeSelector"] = dict(group.nodes)
    if mounts:
        container["volumeMounts"], pod["volumes"] = mounts, sources
    spec: dict[str, Any] = {
        "rayStartParams": {"num-cpus": str(group.cpus), "metrics-export-port": "8080"}
    }
    if group.labels:
        spec["labels"] = dict(group.labels)
    if group.resources:
        spec["resources"] = {key: f"{amount:g}" for key, amount in group.resources.items()}
    spec["template"] = {"spec": pod}
    return spec


def _environment(deployment: Deployment) -> list[dict[str, Any]]:
    """Variables of a container: plain ones, and keys out of the secret, where it has them."""
    secret = _secret_name(deployment)
    plain = [{"name": key, "value": value} for key, value in deployment.environment.items()]
    keys = [
        {
            "name": key,
            "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}},
        }
        for key in deployment.secrets
    ]
    return [*plain, *keys]


def _volumes(
    volumes: Mapping[str, str], config_map: str | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    mounts: list[dict[str, Any]] = []
    sources: list[dict[str, Any]] = []
    if config_map is not None:
        mounts.append({"name": "recipe", "mountPath": _MOUNT, "readOnly": True})
        sources.append({"name": "recipe", "configMap": {"name": config_map}})
    for number, (path, claim) in enumerate(volumes.items()):
        mounts.append({"name": f"volume-{number}", "mountPath": path})
        source = {"persistentVolumeClaim": {"claimName": claim}}
        sources.append({"name": f"volume-{number}", **source})
    return mounts, sources


def _redis(name: str, password: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    """A Redis with a disk, and the address at which the head finds it."""
    labels = {"app": name}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": labels, "ports": [{"name": "redis", "port": 6379}]},
    }
    container = {
        "name": "redis",
        "image": _REDIS_IMAGE,
        "command": ["redis-server"],
        # Kubernetes puts the value in; it is in no manifest.
        "args": ["--requirepass", "$(REDIS_PASSWORD)", "--appendonly", "yes", "--dir", "/data"],
        "env": [{"name": "REDIS_PASSWORD", **password}],
        "ports": [{"name": "redis", "containerPort": 6379}],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    claim = {
        "metadata": {"name": "data"},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "2Gi"}},
        },
    }
    stateful_set = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name},
        "spec": {
            "serviceName": name,
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [container]}},
            "volumeClaimTemplates": [claim],
        },
    }
    return [service, stateful_set]
