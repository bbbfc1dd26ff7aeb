"""Runs that go on from a state of another run, with other settings."""

import shutil
from pathlib import Path

import pytest

from pipelines.config.recipe import DistillConfig
from pipelines.distillation.branching import branch, ensure_branch, keep_state, newest_state
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.opened_copy import working_copy
from pipelines.sweeping.folder import from_kept_start
from sgmd_core.errors import CheckpointError
from tests.e2e.conftest import MakeRecipe
from tests.helpers.s3_server import S3Server, use_server

NR = "objective.lambda_nr"


def losses(run: RunFolder) -> list[dict[str, float]]:
    return [line["losses"] for line in read_jsonl(run.metrics)]


@pytest.mark.slow
def test_a_branch_goes_on_from_the_state_and_only_what_may_differ_does(
    module_recipe: MakeRecipe,
) -> None:
    source = module_recipe("name=source", "iterations=2")
    distill(source)
    start = RunFolder(source.run_folder)
    assert newest_state(start) == 2
    whole = module_recipe("name=whole", "iterations=4")
    distill(whole)

    same = module_recipe("name=same", "iterations=4")
    branch(start, same, {NR}, iteration=2)
    distill(same, resume=True)
    assert losses(RunFolder(same.run_folder)) == losses(RunFolder(whole.run_folder))

    other = module_recipe("name=other", "iterations=4", f"{NR}=0.9", "generator.optimizer.lr=1e-2")
    with pytest.raises(CheckpointError, match=r"generator\.optimizer\.lr is 0\.01"):
        branch(start, other, {NR}, iteration=2)
    assert not other.run_folder.exists()
    # A sweep keeps the state; the run goes on, and deletes it.
    sweep = start.root.parent / "a-sweep"
    keep_state(start, RunFolder(sweep / "start"), iteration=2)
    resumed = from_kept_start(other.with_settings({"sweep.start_from": str(start.root)}), sweep)
    distill(source.with_settings({"iterations": 3, "checkpoint.keep": 1}), resume=True)
    assert newest_state(start) == 3
    assert resumed.sweep.start_from is not None
    start = RunFolder(resumed.sweep.start_from)
    assert newest_state(start) == 2
    searched = {NR, "generator.optimizer.lr"}
    branch(start, other, searched, iteration=2)
    # Killed before the state was there; the run that is resumed there would begin again.
    shutil.rmtree(RunFolder(other.run_folder).checkpoints)
    ensure_branch(start, other, searched, iteration=2)
    (state,) = RunFolder(other.run_folder).checkpoints.iterdir()
    made_ns = state.stat().st_ctime_ns
    ensure_branch(start, other, searched, iteration=2)
    assert state.stat().st_ctime_ns == made_ns
    distill(other, resume=True)
    branched, calm = losses(RunFolder(other.run_folder)), losses(RunFolder(whole.run_folder))
    assert branched[:2] == calm[:2]
    # The loss before the first update of its own is that of the state; the next one is not.
    assert branched[2]["fisher"] == calm[2]["fisher"]
    assert abs(branched[3]["fisher"] / calm[3]["fisher"] - 1) > 1e-3
    # The state of the source is as it was.
    assert newest_state(start) == 2


@pytest.mark.slow
def test_a_state_goes_from_address_to_address_and_from_and_to_a_disk_with_the_same_bits(
    module_recipe: MakeRecipe, server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_server(server.environment, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def go_on(source: DistillConfig, target: DistillConfig) -> list[dict[str, float]]:
        with working_copy(source.run_folder), working_copy(target.run_folder):
            ensure_branch(RunFolder(source.run_folder), target, {NR}, iteration=1)
        distill(target, resume=True)
        with working_copy(target.run_folder):
            return losses(RunFolder(target.run_folder))

    cloud = module_recipe("name=cloud", "iterations=1", "output=s3://runs/branches")
    distill(cloud)
    whole = module_recipe("name=whole-of-two", "iterations=2")
    distill(whole)
    there = module_recipe("name=there", "iterations=2", "output=s3://runs/branches")
    folder = server.root / "runs" / "branches" / "there"
    folder.mkdir()
    (folder / "config.yaml").write_text("of a branch that was interrupted")
    here = module_recipe("name=here", "iterations=2", "checkpoint.keep=9")
    back = module_recipe("name=back", "iterations=2", "output=s3://runs/branches")
    for source, target in ((cloud, there), (cloud, here), (here, back)):
        assert go_on(source, target) == losses(RunFolder(whole.run_folder))
    steps = [path.name for path in (folder / "checkpoints").iterdir()]
    assert "step-000002" in steps


def test_a_folder_without_a_run_is_no_state_to_go_on_from(module_recipe: MakeRecipe) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.yaml"):
        newest_state(RunFolder(module_recipe("name=nothing").run_folder))
