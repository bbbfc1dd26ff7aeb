"""A machine is lost for good: its run goes on with a smaller topology, to the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.ray.pools import Pool
from cluster.ray.shortage import Machine, first_fit
from pipelines.distillation.pools import pools_of
from pipelines.distillation.replanning import smaller_topologies, topology_in_words
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from tests.e2e.conftest import MakeRecipe
from tests.e2e.processes import ROOT

SIDES = (
    "topology.mode=map",
    "topology.pools={learn: {cpus: 0.5, labels: {side: left}}, "
    "score: {cpus: 0.5, labels: {side: right}}}",
)
COMMON = (
    "iterations=7",
    "checkpoint.every=3",
    "validation.every=0",
)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["topology.mode=map", "topology.pools={learn: {ranks: 3}, score: {ranks: 2}}"],
            ["map (learn 1, score 1)", "fused (fused 3)", "fused (fused 1)"],
        ),
        (
            ["topology.mode=pools", "topology.teacher={replicas: 2}"],
            ["pools (generator 1, teacher 1, fake_score 1)", "fused (fused 1)"],
        ),
        (["topology.mode=fused", "topology.fused={ranks: 2}"], ["fused (fused 1)"]),
        (["topology.mode=fused"], []),
    ],
)
def test_smaller_topologies_are_those_with_fewer_processes_the_largest_first(
    make_recipe: MakeRecipe, settings: list[str], words: list[str]
) -> None:
    config = make_recipe("batch.size=8", *settings)
    found = smaller_topologies(config)
    assert sorted(map(topology_in_words, found)) == sorted(words)
    sizes = [len(first_fit(pools_of(each), [])) for each in found]
    assert sizes == sorted(sizes, reverse=True)
    assert all(each.objective == config.objective for each in found)


def test_a_pool_for_all_roles_asks_for_the_most_that_one_of_them_did(
    make_recipe: MakeRecipe,
) -> None:
    one = "{cpus: 2, labels: {kind: h200, side: left}}"
    other = "{cpus: 3, labels: {kind: h200, side: right}}"
    pools = f"topology.pools={{learn: {one}, score: {other}}}"
    (smaller,) = smaller_topologies(make_recipe("topology.mode=map", pools))
    fused = [pool for pool in pools_of(smaller) if pool.name == "fused"]
    assert fused == [Pool("fused", 1, 3.0, 0.0, labels={"kind": "h200"})]
    left = Machine("a", {"CPU": 4.0}, {"CPU": 4.0}, {"kind": "h200"})
    assert all(row.verdict == "fits on a" for row in first_fit(pools_of(smaller), [left]))


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_no_machine_comes_back_for_goes_on_with_a_smaller_topology(
    make_recipe: MakeRecipe, recipe_file: Path, tmp_path: Path
) -> None:
    short = ("recovery.shortage=replan", "recovery.wait_s=3", f"output={tmp_path}", "name=left")
    told = subprocess.run(
        [sys.executable, "-m", "tests.e2e.replan", str(recipe_file), *COMMON, *SIDES, *short],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    calm = make_recipe("name=calm", "topology.mode=local", *COMMON)
    distill(calm)
    left = RunFolder(tmp_path / "left")
    events = {event["kind"]: event for event in read_jsonl(left.events)}
    first, *others = events
    # Whichever is seen first.
    assert first in ("node_died", "worker_died")
    assert others[-2:] == ["replanned", "restarted"]
    assert events["replanned"]["action"] == (
        "goes on as fused (fused 1) in place of map (learn 1, score 1)"
    )
    assert events["restarted"]["iteration"] == 3
    losses = [
        [line["losses"] for line in read_jsonl(folder.metrics)]
        for folder in (left, RunFolder(calm.run_folder))
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 7
