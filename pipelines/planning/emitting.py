"""Manifests of a planned run: `sgmd plan RECIPE --gpus N --emit KIND --with KEY=VALUE`."""

import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from cluster.manifests.dockerfile import dockerfile
from cluster.manifests.kuberay import ray_cluster, ray_job
from cluster.manifests.launcher import Machines, launcher_config
from cluster.manifests.slurm import slurm_script
from pipelines.config.overrides import nearest_key
from pipelines.config.recipe import DistillConfig
from pipelines.planning.deployments import (
    DeploymentRequest,
    deployment_of_equals,
    deployment_of_kinds,
    deployment_of_pools,
)
from pipelines.planning.plan import Plan
from sgmd_core.errors import ConfigError
from sgmd_core.words import count_in_words

_DETAILS: dict[str, tuple[str, ...]] = {
    "kuberay": ("image", "gpus-per-machine", "volume", "nodes"),
    "raycluster": ("image", "gpus-per-machine", "volume", "nodes"),
    "slurm": ("gpus-per-machine", "time"),
    "launcher": (
        *("image", "gpus-per-machine", "provider", "instance"),
        *("region", "project", "hosts", "user", "profile"),
    ),
    "dockerfile": ("image", "python"),
}
_FOLDERS = ("sgmd", "sgmd_core", "workers", "cluster", "pipelines", "assets")
_TIME = "24:00:00"
_FORMS = {
    "time": (r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", "a time of Slurm, such as 08:00:00 or 1-12"),
    "python": (r"3\.\d+(\.\d+)?", "a version of Python, such as 3.11"),
    "image": (r"[A-Za-z0-9][\w.:/@-]*", "the name of an image, such as registry/sgmd:1"),
}
"""Patterns of details that become a part of a line, with words for them."""
_LABEL_KEY = re.compile(r"([a-z0-9][a-z0-9.-]{0,252}/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", re.A)
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?", re.A)
"""Of Kubernetes' labels."""
_INSTANCES = {
    "aws": {1: "g6e.4xlarge", 4: "g6e.12xlarge", 8: "p5.48xlarge"},
    "gcp": {1: "a3-highgpu-1g", 2: "a3-highgpu-2g", 4: "a3-highgpu-4g", 8: "a3-highgpu-8g"},
}
_REGIONS = {"aws": "us-west-2", "gcp": "us-central1-a"}


def emit_manifest(
    kind: str, config: DistillConfig, plan: Plan, details: Sequence[str], command: str
) -> str:
    """The text of a manifest.

    Args:
        kind: kuberay, raycluster, slurm, launcher or dockerfile.
        config: The planned recipe.
        plan: The plan.
        details: `key=value`, such as image=IMAGE.
        command: Command that makes it, for its first line.

    Raises:
        ConfigError: No such kind or detail, a detail is missing or wrong, or the recipe cannot run
            there.
    """
    given = _details_of(kind, details)
    image = given.get("image", f"sgmd:{version('sgmd')}")
    made_by = f"Made by: {command}"
    if kind == "dockerfile":
        python = given.get("python", ".".join(platform.python_version_tuple()[:2]))
        return dockerfile(image, _FOLDERS, python, made_by)
    limit = _gpus_per_machine(given, plan.hardware.ranks_per_machine)
    request = DeploymentRequest(config, plan, limit, image, made_by, _nodes(given, plan))
    if kind in ("kuberay", "raycluster"):
        render = ray_job if kind == "kuberay" else ray_cluster
        deployment = (deployment_of_kinds if plan.kinds else deployment_of_pools)(request)
        return render(deployment, _volumes(given))
    if plan.kinds:
        raise ConfigError(
            f"emitting a manifest for {kind}",
            f"{len(plan.kinds)} kinds of GPU, and its machines are all equal",
            "one kind of GPU, or --emit kuberay or raycluster, with a group of machines for each",
            "Or take the recipe by --write: on a cluster with these machines its pools find them "
            "by label",
        )
    match kind:
        case "slurm":
            return slurm_script(deployment_of_equals(request), given.get("time", _TIME))
        case _:
            deployment = deployment_of_equals(request)
            count = 1 + sum(group.count for group in deployment.workers)
            return launcher_config(deployment, _machines(given, deployment.head.gpus, count))


def _details_of(kind: str, details: Sequence[str]) -> dict[str, str]:
    if kind not in _DETAILS:
        raise ConfigError("emitting a manifest", f"--emit {kind}", f"one of {', '.join(_DETAILS)}")
    known = _DETAILS[kind]
    given: dict[str, str] = {}
    for detail in details:
        key, separator, value = detail.partition("=")
        if not separator or not value or key not in known:
            near = nearest_key(key, known)
            raise ConfigError(
                f"emitting a manifest for {kind}",
                f"--with {detail}",
                f"KEY=VALUE with a key of {', '.join(known)}",
                f"Write {near}" if near and near != key else "Correct it",
            )
        _require_form(kind, key, value)
        given[key] = value
    return given


def _require_form(kind: str, key: str, value: str) -> None:
    pattern, words = _FORMS.get(key, ("(?s:.*)", ""))
    if not re.fullmatch(pattern, value, re.ASCII):
        raise ConfigError(
            f"emitting a manifest for {kind}", f"--with {key}={value!r}", words, "Correct it"
        )


def _gpus_per_machine(given: Mapping[str, str], default: int) -> int:
    text = given.get("gpus-per-machine", str(default))
    if not text.isdecimal() or not int(text):
        raise ConfigError(
            "emitting a manifest", f"--with gpus-per-machine={text}", "a whole number above 0"
        )
    return int(text)


def _volumes(given: Mapping[str, str]) -> dict[str, str]:
    """Claims by path, of `claim:/path`, several with commas."""
    volumes: dict[str, str] = {}
    for each in filter(None, given.get("volume", "").split(",")):
        claim, _, path = each.partition(":")
        if not claim or not path.startswith("/"):
            raise ConfigError(
                "emitting a manifest", f"--with volume={each}", "CLAIM:/PATH, several with commas"
            )
        volumes[path] = claim
    return volumes


def _nodes(given: Mapping[str, str], plan: Plan) -> dict[str, dict[str, str]]:
    """Labels of Kubernetes nodes by kind of GPU, of `kind:key=value`, several with commas."""
    kinds = [kind.name for kind in plan.kinds]
    nodes: dict[str, dict[str, str]] = {}
    for each in filter(None, given.get("nodes", "").split(",")):
        kind, _, label = each.partition(":")
        key, _, value = label.partition("=")
        if kind not in kinds or not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
            raise ConfigError(
                "emitting a manifest",
                f"--with nodes={each}",
                "KIND:KEY=VALUE, several with commas: a kind of --kind "
                f"({', '.join(kinds) or 'none is given'}), and a label of its Kubernetes nodes",
            )
        nodes.setdefault(kind, {})[key] = value
    return nodes


def _machines(given: Mapping[str, str], gpus: int, count: int) -> Machines:
    """Machines of the provider that the details name."""
    attempted = "emitting a manifest for launcher"
    match given.get("provider"):
        case "local":
            hosts = tuple(filter(None, given.get("hosts", "").split(",")))
            if len(hosts) != count:
                raise ConfigError(
                    attempted,
                    count_in_words(len(hosts), "host"),
                    f"the addresses of {count_in_words(count, 'machine')} of "
                    f"{count_in_words(gpus, 'GPU')}, the head first",
                    "--with hosts=10.0.0.1,10.0.0.2 and so on",
                )
            return Machines("local", hosts=hosts, user=given.get("user", "ubuntu"))
        case "aws" | "gcp" as provider:
            instance = given.get("instance") or _INSTANCES[provider].get(gpus, "")
            if not instance:
                raise ConfigError(
                    attempted,
                    f"no usual instance of {provider} with {count_in_words(gpus, 'GPU')}",
                    f"its type, or {', '.join(map(str, _INSTANCES[provider]))} GPUs a machine",
                    "--with instance=TYPE, or --with gpus-per-machine=N",
                )
            if provider == "gcp" and "project" not in given:
                raise ConfigError(attempted, "no project", "the project's id", "--with project=ID")
            return Machines(
                provider,
                instance,
                given.get("region", _REGIONS[provider]),
                given.get("project", ""),
                user=given.get("user", "ubuntu"),
                profile=given.get("profile", ""),
            )
        case other:
            raise ConfigError(
                attempted, f"provider {other}", "aws, gcp or local", "--with provider=aws"
            )
