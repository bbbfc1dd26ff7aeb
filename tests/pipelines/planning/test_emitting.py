"""Manifests of planned recipes: machines for the pools, recipes that find them, refusals."""

import re
import sys
from dataclasses import replace
from functools import cache, partial

import pytest
import yaml
from typer.testing import CliRunner

from cluster.ray.shortage import Machine, first_fit
from pipelines.cli import app
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.distillation.pools import pools_of
from pipelines.planning import stage_times
from pipelines.planning.emitting import emit_manifest
from pipelines.planning.hardware import Hardware, parse_kinds
from pipelines.planning.plan import Plan, make_mixed_plan, make_plan
from pipelines.planning.planned_recipe import planned_recipe
from pipelines.planning.request import Request, answer
from pipelines.planning.workload import Workload
from sgmd_core.errors import ConfigError
from tests.cluster.manifests.test_kuberay import problems

PLACES = ("output=s3://b/runs", "model.folder=s3://b/wan", "data.train=s3://b/t")


@cache
def planned(gpus: int) -> tuple[DistillConfig, Plan]:
    """The recipe and its plan on so many GPUs, one of which is the validator's."""
    config = load_recipe("wan21-1.3b", PLACES)
    work, hardware = Workload.of(config, "1.3b"), Hardware(memory_gb=80.0, host_memory_gb=200.0)
    times = stage_times.modelled(work, hardware)
    plan = make_plan(work, times, hardware, gpus - 1, config.gpus_beside)
    return planned_recipe(config, plan), plan


@cache
def planned_kinds(*kinds: str) -> tuple[DistillConfig, Plan]:
    """The recipe and its plan on several kinds of GPU; the validator has one of the last."""
    config = load_recipe("wan21-1.3b", [*PLACES, "batch.size=16"])
    found = parse_kinds(kinds, Hardware())
    work = Workload.of(config, "1.3b")
    times = stage_times.modelled(work, found[0].hardware)
    plan = make_mixed_plan(work, times, found, config.gpus_beside)
    return planned_recipe(config, plan), plan


def emitted(kind: str, gpus: int, *details: str, **settings) -> str:
    config, plan = planned(gpus)
    config = config.with_settings(settings)
    return emit_manifest(kind, config, plan, details, "sgmd plan ...")


def parts(text: str) -> tuple[DistillConfig, dict]:
    """The recipe inside a RayJob, and its machines by name."""
    config_map, job = yaml.safe_load_all(text)
    recipe = DistillConfig.model_validate(yaml.safe_load(config_map["data"]["recipe.yaml"]))
    spec = job["spec"]["rayClusterSpec"]
    groups = {each["groupName"]: each for each in spec["workerGroupSpecs"]}
    return recipe, groups | {"head": spec["headGroupSpec"]}


def gpus_of(group: dict) -> int:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return int(limits.get("nvidia.com/gpu", 0)) * group.get("replicas", 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 5, 9, 17])
def test_each_pool_has_its_gpus_on_machines_that_it_finds_by_label(number: int):
    recipe, groups = parts(emitted("kuberay", number))
    for name, pool in recipe.topology.role_pools.items():
        group = groups[name.replace("_", "-")]
        copies = getattr(pool, "replicas", 1)
        assert gpus_of(group) == pool.ranks * copies
        assert pool.labels.items() <= group["labels"].items()
    # The validator has one, beside the program.
    assert gpus_of(groups["head"]) == 1
    assert recipe.topology.validator.labels == groups["head"]["labels"]
    assert recipe.topology.address == "auto"


@pytest.mark.slow
def test_a_machine_has_no_more_gpus_than_there_are_in_one():
    _, groups = parts(emitted("kuberay", 17, "gpus-per-machine=4"))
    assert all(gpus_of(group) // group.get("replicas", 1) <= 4 for group in groups.values())


def test_machines_have_the_gpus_that_the_plan_was_told_of():
    config, plan = planned(17)
    odd = replace(plan, hardware=replace(plan.hardware, ranks_per_machine=3))
    for details, number in (([], 3), (["gpus-per-machine=5"], 5)):
        text = emit_manifest("slurm", config, odd, details, "sgmd plan ...")
        assert f"#SBATCH --gpus-per-node={number}\n" in text


def test_equal_machines_hold_all_gpus():
    text = emitted("slurm", 17, "time=04:00:00")
    assert "#SBATCH --nodes=3\n#SBATCH --ntasks-per-node=1\n" in text
    assert "#SBATCH --gpus-per-node=8\n" in text
    assert "#SBATCH --time=04:00:00\n" in text
    assert 'sgmd distill "$recipe" --resume auto &' in text


@pytest.mark.parametrize("kind", ["kuberay", "raycluster", "slurm", "launcher"])
def test_no_secret_of_this_machine_is_in_a_manifest(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted0key0of0s3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:planted0password@host")
    text = emitted(kind, 9, *(["provider=aws"] if kind == "launcher" else []))
    assert "planted" not in text
    assert "http://host" in text


@pytest.mark.parametrize(
    ("kind", "details", "words"),
    [
        ("kubernetes", [], "one of kuberay"),
        ("slurm", ["tim=1"], "Write time"),
        ("kuberay", ["volume=a"], "CLAIM:/PATH"),
        ("kuberay", ["gpus-per-machine=0"], "above 0"),
        ("slurm", ["time=1:00\ntouch here"], "a time of Slurm"),
        ("slurm", ["time=soon"], "a time of Slurm"),
        ("dockerfile", ["python=3.11\nRUN id"], "a version of Python"),
        ("dockerfile", ["image=a\nRUN id"], "the name of an image"),
        ("launcher", [], "--with provider=aws"),
        ("launcher", ["provider=gcp"], "--with project=ID"),
        ("launcher", ["provider=local", "hosts=a"], "the addresses of 2 machines of 8 GPUs"),
        ("launcher", ["provider=aws", "gpus-per-machine=3"], "--with instance=TYPE"),
    ],
)
def test_a_detail_that_is_wrong_or_missing_says_what_to_write(kind, details, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        emitted(kind, 17 if "hosts=a" not in details else 9, *details)


@pytest.mark.slow
def test_paths_of_this_machine_alone_are_refused_all_at_once():
    with pytest.raises(ConfigError, match="output=runs, data\\.train=clips"):
        emitted("slurm", 5, output="runs", **{"data.train": "clips"})


def test_pools_that_want_machines_of_their_own_are_refused_where_all_are_equal():
    with pytest.raises(ConfigError, match="or emit kuberay"):
        emitted("slurm", 5, **{"topology.text.labels": {"rack": "a"}})
    _, groups = parts(emitted("kuberay", 5, **{"topology.fused.labels": {"rack": "a"}}))
    assert groups["fused"]["labels"] == {"rack": "a", "sgmd-pool": "fused"}


@pytest.mark.parametrize("kind", ["kuberay", "slurm"])
def test_ranks_that_must_be_on_one_machine_are_refused_where_it_is_too_small(kind: str):
    pool = next(iter(planned(9)[0].topology.role_pools))
    strict = {f"topology.{pool}.strategy": "strict_pack"}
    assert emitted(kind, 9, "gpus-per-machine=8", **strict)
    with pytest.raises(ConfigError, match="room for all of them on one machine"):
        emitted(kind, 9, "gpus-per-machine=2", **strict)


@pytest.mark.parametrize("time", ["90", "90:00", "08:00:00", "1-12", "1-12:30", "1-12:30:00"])
def test_times_are_those_of_slurm(time: str):
    assert f"#SBATCH --time={time}\n" in emitted("slurm", 5, f"time={time}")


@pytest.mark.parametrize("kind", ["slurm", "dockerfile", "kuberay"])
def test_no_line_of_a_command_leaves_its_comment(kind: str):
    command = "sgmd plan tiny 'note=a\ntouch here'"
    text = emit_manifest(kind, *planned(5), [], command)
    assert "# touch here'\n" in text
    assert "\ntouch here" not in text


@pytest.mark.slow
def test_no_key_of_the_command_is_in_the_manifest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["sgmd", "plan", "tiny", "note=s3://ME:planted0key@bucket"])
    command = ["plan", "wan21-1.3b", "--model", "1.3b", *PLACES, "--gpus", "5"]
    done = CliRunner().invoke(app, [*command, "--emit", "dockerfile"])
    assert done.stdout.startswith("# Made by: sgmd plan tiny note=s3://***@bucket\n"), done.output


@pytest.mark.slow
def test_the_command_prints_the_manifest_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["sgmd", "plan", "wan21-1.3b"])
    command = ["plan", "wan21-1.3b", "--model", "1.3b", *PLACES, "--gpus", "5"]
    done = CliRunner().invoke(app, [*command, "--emit", "kuberay"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("# Made by: sgmd plan wan21-1.3b\n")
    assert parts(done.stdout)[0].output == "s3://b/runs"


MIXED = ("H100=4x80@229", "L40S=4x48@80")
NODES = "nodes=H100:nvidia.com/gpu.product=H100-80,L40S:nvidia.com/gpu.product=L40S"


def pods(spec: dict) -> list[Machine]:
    """The machines of a manifest as Ray would see them, with the label of its own.

    What Ray finds in a pod is what its node selector asks for.
    """
    kinds = {"H100-80": "H100", "L40S": "L40S"}
    found = []
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        kind = kinds[pod["nodeSelector"]["nvidia.com/gpu.product"]]
        free = {"CPU": float(group["rayStartParams"]["num-cpus"])}
        free["GPU"] = float(limits.get("nvidia.com/gpu", 0))
        free |= {name: float(amount) for name, amount in group.get("resources", {}).items()}
        labels = {**group["labels"], "ray.io/accelerator-type": kind}
        for number in range(group.get("replicas", 1)):
            found.append(Machine(f"{group.get('groupName', 'head')}-{number}", free, free, labels))
    return found


@pytest.mark.parametrize("kind", ["kuberay", "raycluster"])
@pytest.mark.parametrize("limit", [8, 2])
@pytest.mark.slow
def test_each_kind_of_gpu_is_a_group_of_machines_that_all_of_its_pools_fit(kind, limit):
    config, plan = planned_kinds(*MIXED)
    details = [NODES, f"gpus-per-machine={limit}"]
    documents = list(yaml.safe_load_all(emit_manifest(kind, config, plan, details, "sgmd plan")))
    assert [problems(each) for each in documents] == [[]] * len(documents)
    spec = documents[-1]["spec"]
    spec = spec["rayClusterSpec"] if kind == "kuberay" else spec
    used = {pool.kind: 0 for pool in plan.best.pools.values()}
    for pool in plan.best.pools.values():
        used[pool.kind] += pool.gpus
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert {name: gpus_of(group) for name, group in groups.items()} == {
        name.lower(): gpus for name, gpus in used.items()
    }
    assert set(used) == {"H100", "L40S"}
    if kind == "raycluster":
        return
    recipe, _ = parts(emit_manifest(kind, config, plan, details, "sgmd plan"))
    rows = first_fit(pools_of(recipe), pods(spec))
    on = {row.rank.partition("[")[0]: row.verdict for row in rows}
    for name, pool in plan.best.pools.items():
        assert f"fits on {pool.kind.lower()}-" in on[name]
    assert {on[name] for name in ("text", "feed", "validator")} == {"fits on head-0"}
    # Without the second kind its pools find no machine.
    fewer = [each for each in pods(spec) if not each.name.startswith("l40s")]
    assert any(
        row.verdict.startswith("no machine has") for row in first_fit(pools_of(recipe), fewer)
    )


@pytest.mark.slow
def test_machines_of_a_kind_have_the_resources_that_its_pools_ask_for():
    config, plan = planned_kinds(*MIXED)
    config = config.with_settings({"topology.pools.learn.resources": {"fast": 0.5}})
    _, groups = parts(emit_manifest("kuberay", config, plan, [NODES], "sgmd plan"))
    kind = plan.best.pools["learn"].kind.lower()
    ranks = sum(pool.gpus for pool in plan.best.pools.values() if pool.kind.lower() == kind)
    assert float(groups[kind]["resources"]["fast"]) == 0.5 * ranks


@pytest.mark.slow
def test_ranks_of_a_kind_that_must_be_apart_have_machines_of_one_gpu():
    config, plan = planned_kinds(*MIXED)
    learn = plan.best.pools["learn"]
    assert learn.gpus > 1
    apart = config.with_settings({"topology.pools.learn.strategy": "strict_spread"})
    (_, together), (recipe, groups) = (
        parts(emit_manifest("kuberay", each, plan, [NODES], "sgmd plan"))
        for each in (config, apart)
    )
    kind = learn.kind.lower()
    assert together[kind]["replicas"] < groups[kind]["replicas"] == gpus_of(groups[kind])
    spec = {"headGroupSpec": groups.pop("head"), "workerGroupSpecs": list(groups.values())}
    rows = first_fit(pools_of(recipe), pods(spec))
    assert all(row.verdict.startswith("fits on") for row in rows), rows


def test_pools_on_one_kind_that_want_two_values_of_a_label_are_refused():
    config, plan = planned_kinds(*MIXED)
    first, second = plan.best.pools
    pools = {name: replace(pool, kind="H100") for name, pool in plan.best.pools.items()}
    plan = replace(plan, layouts=(replace(plan.best, pools=pools),))
    labelled = config.with_settings(
        {
            f"topology.pools.{first}.labels": {"tier": "x"},
            f"topology.pools.{second}.labels": {"tier": "x", "zone": "y"},
        }
    )
    _, groups = parts(emit_manifest("kuberay", labelled, plan, [NODES], "sgmd plan"))
    assert {"tier": "x", "zone": "y"}.items() <= groups["h100"]["labels"].items()
    contrary = labelled.with_settings({f"topology.pools.{second}.labels": {"tier": "y"}})
    with pytest.raises(ConfigError, match=f"{first} asks for tier: x, pool {second} for y"):
        emit_manifest("kuberay", contrary, plan, [NODES], "sgmd plan")


def test_gpus_of_a_kind_that_holds_nothing_are_asked_for_by_nobody():
    config, plan = planned_kinds("H100=4x80@229", "T4=2x8@10")
    nodes = "nodes=H100:a=b,T4:a=c"
    _, groups = parts(emit_manifest("kuberay", config, plan, [nodes], "sgmd plan"))
    assert set(groups) == {"h100", "head"}
    assert groups["head"]["template"]["spec"]["nodeSelector"] == {"a": "c"}


@pytest.mark.parametrize(
    ("kind", "details", "words"),
    [
        ("kuberay", [], "no labels of the Kubernetes nodes with H100, L40S"),
        ("kuberay", ["nodes=H100:a=b"], "no labels of the Kubernetes nodes with L40S"),
        ("kuberay", ["nodes=A100:a=b"], "a kind of --kind (H100, L40S)"),
        ("kuberay", ["nodes=H100:a=b\nc"], "KIND:KEY=VALUE"),
        ("kuberay", ["nodes=H100"], "KIND:KEY=VALUE"),
        ("slurm", [], "its machines are all equal"),
        ("launcher", ["provider=aws"], "--emit kuberay or raycluster"),
    ],
)
def test_a_manifest_of_several_kinds_says_what_it_lacks(kind, details, words):
    config, plan = planned_kinds(*MIXED)
    with pytest.raises(ConfigError, match=re.escape(words)):
        emit_manifest(kind, config, plan, details, "sgmd plan")


@pytest.mark.slow
def test_what_is_beside_the_roles_must_fit_the_kind_that_the_head_takes():
    asked = partial(
        Request,
        "wan21-1.3b",
        [
            *PLACES,
            "batch.size=16",
            "topology.text.gpus=1",
            "topology.validator.gpus=1",
            # The sets are at addresses, which a plan does not look at.
            "data.stored_text=false",
        ],
        model="1.3b",
    )
    # One small GPU is too few for both, so the head takes two of the large ones.
    found = answer(asked(kinds=["H100=8x80@229", "T4=1x16@10"]))
    assert max(found.plan.memory_beside.values()) > Hardware(memory_gb=16).usable_bytes
    config = planned_recipe(found.config, found.plan)
    nodes = "nodes=H100:a=b,T4:a=c"
    _, groups = parts(emit_manifest("kuberay", config, found.plan, [nodes], "sgmd plan"))
    assert groups["head"]["template"]["spec"]["nodeSelector"] == {"a": "b"}
    assert gpus_of(groups["head"]) == 2
    with pytest.raises(ConfigError, match="planning for GPUs of 16 GB"):
        answer(asked(kinds=["H100=8x80@229", "T4=2x16@10"]))


def test_the_head_takes_gpus_of_one_kind_or_none():
    config, plan = planned_kinds(*MIXED)
    beside = {"validator": 1.0, "text": 6.0}
    with pytest.raises(ConfigError, match="as many of one kind"):
        emit_manifest("kuberay", config, replace(plan, beside=beside), [NODES], "sgmd plan")
