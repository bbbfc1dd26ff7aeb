"""Every run leaves a trace of its last iterations, and says where its time went."""

import json
from typing import Any

import pytest

from pipelines.config.recipe import DistillConfig
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder
from sgmd_core.errors import SgmdError
from tests.e2e.conftest import MakeRecipe

STAGES = ("rollout", "denoise", "signal", "track", "learn")


def read(config: DistillConfig) -> dict[str, Any]:
    return json.loads(RunFolder(config.run_folder).trace.read_text())


def slices(trace: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [one for one in trace["traceEvents"] if one["ph"] == "X" and one["name"] == name]


def require_whole_trace(
    config: DistillConfig, summary: dict[str, Any], iterations: list[int]
) -> None:
    """Each call of these iterations once, with its ids; times that fit together."""
    trace = read(config)
    assert trace["otherData"]["iterations"] == iterations
    wanted = [(number, index) for number in iterations for index in range(2)]
    for stage in STAGES:
        found = [
            (one["args"]["iteration"], one["args"]["micro_batch"]) for one in slices(trace, stage)
        ]
        assert sorted(found) == wanted, stage
    starts = {one["id"]: one["ts"] for one in trace["traceEvents"] if one["ph"] == "s"}
    ends = {one["id"]: one["ts"] for one in trace["traceEvents"] if one["ph"] == "f"}
    assert starts.keys() == ends.keys()
    # Nothing is used before it is made: the clocks agree.
    assert all(starts[arrow] <= ends[arrow] for arrow in starts)
    used = summary["utilisation"]
    assert set(used) == {"generator", "teacher", "fake_score"}
    totals = [sum(spent.values()) for spent in used.values()]
    assert totals == pytest.approx([totals[0]] * 3)
    assert all(spent["busy_s"] > 0 for spent in used.values())
    path_s = sum(summary["critical_path_s"].values())
    assert 0 < path_s <= totals[0] * 1.01


@pytest.mark.slow
def test_a_run_in_one_process_leaves_the_trace_of_its_last_iterations(make_recipe: MakeRecipe):
    config = make_recipe("name=short", "iterations=4", "trace.iterations=2")
    summary = distill(config)
    require_whole_trace(config, summary, [2, 3])
    # One process: whoever works, the others wait.
    busy_s = sum(spent["busy_s"] for spent in summary["utilisation"].values())
    assert busy_s <= sum(summary["utilisation"]["teacher"].values())


@pytest.mark.slow
def test_no_trace_is_written_where_none_is_wanted(make_recipe: MakeRecipe):
    config = make_recipe("name=none", "iterations=1", "trace.iterations=0")
    assert distill(config)["utilisation"]
    assert not RunFolder(config.run_folder).trace.exists()


@pytest.mark.slow
def test_a_run_that_fails_leaves_its_trace_too(make_recipe: MakeRecipe):
    config = make_recipe("name=failed", "iterations=40", "generator.optimizer.lr=1e30")
    with pytest.raises(SgmdError):
        distill(config)
    assert read(config)["otherData"]["iterations"]
