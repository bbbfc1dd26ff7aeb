"""KubeRay's manifests against its own schemas and those of Kubernetes."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from cluster.manifests.kuberay import ray_cluster, ray_job
from tests.cluster.manifests.deployments import FILE, deployment

CRDS = Path(__file__).parents[2] / "third_party" / "kuberay" / "crds-v1.7.0.json"
KUBERNETES = "1.34"


def strict(schema: Any) -> Any:
    """A schema of a CRD as `kubectl --validate=strict` reads it: unknown fields are errors."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {key: strict(value) for key, value in schema.items()}
    if "properties" in found and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


@cache
def validator(kind: str) -> Draft202012Validator:
    given = json.loads(CRDS.read_text())
    schema = strict(given["schemas"][kind])
    # The API server checks metadata; the CRD only says that it is there.
    schema["properties"]["metadata"] = {"type": "object"}
    schema["$defs"] = strict(given["$defs"])
    for template in schema["$defs"].values():
        template["properties"]["metadata"] = {"type": "object"}
    return Draft202012Validator(schema)


def problems(document: dict) -> list[str]:
    if document["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return []
    return [error.message for error in validator(document["kind"]).iter_errors(document)]


def documents(text: str) -> dict[str, dict]:
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def job() -> dict[str, dict]:
    return documents(ray_job(deployment(), {"/models": "models-claim"}))


@pytest.fixture(scope="module")
def cluster() -> dict[str, dict]:
    return documents(ray_cluster(deployment()))


def test_a_job_and_a_cluster_are_what_their_schemas_say(job, cluster):
    assert {kind: problems(one) for kind, one in job.items()} == {"ConfigMap": [], "RayJob": []}
    assert [problems(one) for one in cluster.values()] == [[], [], []]


def test_the_schema_refuses_what_it_does_not_know(job):
    wrong = copy.deepcopy(job["RayJob"])
    wrong["spec"]["shutdownAfterJob"] = True
    wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["container"] = []
    assert len(problems(wrong)) == 2


def test_the_job_gives_its_cluster_back_resumes_and_has_time_to_save(job):
    spec = job["RayJob"]["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["backoffLimit"] > 0
    assert spec["entrypoint"] == "prog run /etc/sgmd/recipe.yaml --say 'a b'"
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "360"}
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head["terminationGracePeriodSeconds"] == 360


def test_its_file_is_mounted_as_it_is(job):
    assert job["ConfigMap"]["data"] == {"recipe.yaml": FILE}
    head = job["RayJob"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {each["mountPath"]: each["name"] for each in head["containers"][0]["volumeMounts"]}
    sources = {each["name"]: each for each in head["volumes"]}
    assert sources[mounts["/etc/sgmd"]]["configMap"] == {
        "name": job["ConfigMap"]["metadata"]["name"]
    }
    assert sources[mounts["/models"]]["persistentVolumeClaim"] == {"claimName": "models-claim"}


def test_a_pool_is_a_group_of_machines_with_its_gpus_and_its_label(job):
    spec = job["RayJob"]["spec"]["rayClusterSpec"]
    learn, fake = spec["workerGroupSpecs"]
    assert (learn["groupName"], learn["replicas"]) == ("learn", 2)
    limits = learn["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "33", "memory": "1600G", "nvidia.com/gpu": "8"}
    assert learn["labels"] == {"sgmd-pool": "learn"}
    assert fake["resources"] == {"h100": "4"}
    assert spec["headGroupSpec"]["labels"] == {"sgmd-pool": "head"}


def test_keys_come_from_a_secret_and_a_token_is_asked_for(job, cluster):
    spec = job["RayJob"]["spec"]["rayClusterSpec"]
    environment = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    by_name = {each["name"]: each for each in environment}
    assert by_name["AWS_ENDPOINT_URL"]["value"] == "http://a b/'c'"
    reference = by_name["AWS_SECRET_ACCESS_KEY"]["valueFrom"]["secretKeyRef"]
    assert reference["name"] == "run-1-3b-keys"
    assert spec["authOptions"] == cluster["RayCluster"]["spec"]["authOptions"] == {"mode": "token"}


def test_a_cluster_that_stays_keeps_its_control_state_in_redis(cluster):
    options = cluster["RayCluster"]["spec"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == f"{cluster['Service']['metadata']['name']}:6379"
    container = cluster["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]
    (password,) = container["env"]
    assert password["valueFrom"] == options["redisPassword"]["valueFrom"]
