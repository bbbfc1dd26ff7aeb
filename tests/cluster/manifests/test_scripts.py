"""Slurm script, launcher YAML and Dockerfile against what reads them."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config

from cluster.manifests.deployment import dns_name
from cluster.manifests.dockerfile import dockerfile
from cluster.manifests.launcher import Machines, launcher_config
from cluster.manifests.slurm import slurm_script
from tests.cluster.manifests.deployments import FILE, deployment, equals

BIN = Path(sys.executable).parent
SCHEMA = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
AWS = Machines("aws", "p5.48xlarge", "us-west-2", profile="arn:aws:iam::1:instance-profile/a")
GCP = Machines("gcp", "a3-highgpu-8g", "us-central1-a", project="mine")


def checked(command: list[str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("nodes", [1, 3])
def test_the_slurm_script_is_shell_without_a_finding(nodes: int):
    script = slurm_script(equals(nodes), "08:00:00")
    checked(["bash", "-n"], script)
    checked([str(BIN / "shellcheck"), "-"], script)
    assert f"#SBATCH --nodes={nodes}\n" in script
    assert ("--exclude" in script) == (nodes > 1)
    # Time to save, before the limit.
    assert "#SBATCH --signal=B:USR1@420\n" in script
    assert "#SBATCH --requeue\n" in script
    # Told to the script alone; else Ray would be gone before the state is saved.
    assert "`scancel --batch --signal=TERM JOB`" in script


def test_the_file_of_a_slurm_script_comes_out_as_it_went_in(tmp_path: Path):
    script = slurm_script(equals(1), "08:00:00")
    writes = script[script.index("recipe=") : script.index("# Ray:")]
    checked(["bash"], f"TMPDIR={tmp_path} SLURM_JOB_ID=7\n{writes}")
    assert (tmp_path / "run-1-3b-7.yaml").read_text() == FILE


@pytest.mark.parametrize(
    "machines",
    [AWS, GCP, Machines("local", hosts=("10.0.0.1", "10.0.0.2", "10.0.0.3"))],
    ids=lambda one: one.provider,
)
def test_the_launchers_yaml_is_what_its_schema_says(machines: Machines):
    config = yaml.safe_load(launcher_config(equals(3), machines))
    jsonschema.validate(config, json.loads(SCHEMA.read_text()))
    prepared = prepare_config(config)
    assert prepared["max_workers"] == 2
    assert all(
        "RAY_AUTH_MODE=token" in line
        for line in (
            prepared["head_start_ray_commands"][-1],
            prepared["worker_start_ray_commands"][-1],
        )
    )
    # In a private cluster of machines at hand nobody starts further ones.
    scales = "autoscaling-config" in config["head_start_ray_commands"][-1]
    assert scales == (machines.provider != "local")


def test_a_variable_of_the_launcher_is_one_word_of_the_shell():
    value = "$(id) `id` 'a' \"b\"; c"
    text = launcher_config(deployment(environment={"ODD": value}), AWS)
    options = " ".join(yaml.safe_load(text)["docker"]["run_options"])
    words = checked(["bash", "-c", f"printf '%s\\n' {options}"], "").splitlines()
    assert words[words.index("-e") + 1] == f"ODD={value}"


@pytest.mark.parametrize("machines", [GCP, Machines("local", hosts=("10.0.0.1",))])
def test_machines_get_keys_from_a_file_that_the_header_says_how_to_make(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = launcher_config(equals(1), machines)
    (make,) = [line.removeprefix("# ") for line in text.splitlines() if "declare -p" in line]
    checked(["bash", "-c", f"export AWS_SECRET_ACCESS_KEY='a $b/c'\n{make}"], "")
    assert (tmp_path / ".sgmd-keys").stat().st_mode & 0o777 == 0o600
    config = yaml.safe_load(text)
    assert config["file_mounts"]["~/.sgmd-keys"] == "~/.sgmd-keys"
    for line in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        says = "ray() { printenv AWS_SECRET_ACCESS_KEY; }\n"
        assert checked(["bash", "-c", says + line], "") == "a $b/c\n"


def test_a_profile_stands_for_the_keys_of_aws_alone():
    assert ".sgmd-keys" not in launcher_config(equals(1), AWS)
    both = deployment(secrets=["AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY"])
    assert "declare -p WANDB_API_KEY >" in launcher_config(both, AWS)


def test_the_schema_of_the_launcher_refuses_what_it_does_not_know():
    config = yaml.safe_load(launcher_config(equals(1), AWS)) | {"max_worker": 2}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config, json.loads(SCHEMA.read_text()))


def test_the_dockerfile_has_no_finding_of_hadolint():
    text = dockerfile("sgmd:1", ["sgmd", "assets"], "3.11", "Made by: a test")
    checked([str(BIN / "hadolint"), "-"], text)
    assert "COPY . " not in text


@pytest.mark.parametrize(
    ("name", "plain"), [("Wan2.1_A", "wan2-1-a"), ("1b", "run-1b"), ("a" * 60, "a" * 40)]
)
def test_names_are_what_kubernetes_takes(name: str, plain: str):
    assert dns_name(name) == plain
