"""Two processes that write to one place: the second is refused, the first is unharmed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from cluster.errors import LeaseError
from cluster.lease import LEASE_FILE, hold
from pipelines.data.making.prepare import PrepareOptions, prepare
from pipelines.distillation.run import distill
from pipelines.evaluation.plan import EvaluationOptions
from pipelines.evaluation.run import evaluate
from pipelines.pretraining.run import pretrain
from pipelines.run.observer import RunObserver
from pipelines.shapes import write_shards
from pipelines.study.run import folder_of, study
from pipelines.sweeping.run import sweep
from tests.e2e.conftest import MakeRecipe
from tests.e2e.processes import ROOT
from tests.e2e.test_equivalence import history
from tests.e2e.test_stopping import ENDLESS, start
from tests.helpers.forked_python import forked_process, kill
from tests.helpers.video_files import grey_frames, video_file
from tests.pipelines.pretraining.test_pretrain import micro_config


@pytest.mark.slow
def test_a_second_prepare_is_refused_and_the_set_is_whole(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "set"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.mp4").write_bytes(video_file(grey_frames([number])))
        (source / f"{number}.txt").write_text(f"clip {number}")
    second: list[str] = []

    def meanwhile(progress: object) -> None:
        if second:
            return
        command = [sys.executable, "-m", "pipelines.cli", "prepare", str(source), str(target)]
        done = subprocess.run(
            [*command, "--shard-clips", "2"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        second.append(done.stderr)
        assert done.returncode == 1, done.stderr

    report = prepare(str(source), str(target), PrepareOptions(num_processes=0), meanwhile)
    assert report.num_clips == 6
    assert "is being written to by" in " ".join(second[0].split())
    assert prepare(str(source), str(target), PrepareOptions(num_processes=0)).num_clips == 6


@pytest.mark.slow
def test_a_second_resume_of_a_running_run_is_refused_and_the_first_goes_on(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    config = make_recipe("name=busy", f"iterations={ENDLESS}", "checkpoint.every=2")
    process = start(config, tmp_path)
    with pytest.raises(LeaseError, match=rf"process {forked_process(process.pid)} "):
        distill(config, resume=True)
    before = len(history(config))
    deadline = time.monotonic() + 60
    while len(history(config)) < before + 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    kill(process)
    # Free at once, and whole: every iteration stands in the log once.
    done = [line["iteration"] for line in history(config)]
    assert done == list(range(len(done)))
    with hold(str(config.run_folder), "a test"):
        pass
    end = len(done) + 1
    distill(config.with_settings({"iterations": end}), resume=True)
    assert [line["iteration"] for line in history(config)] == list(range(end))


@pytest.mark.slow
def test_every_command_that_fills_a_folder_is_refused_while_another_process_does(
    make_recipe: MakeRecipe, tmp_path: Path, wan_folder: Path, world: Path
) -> None:
    config = make_recipe(
        "name=busy",
        "validation.every=1",
        "sweep.grid={objective.lambda_nr: [0.05]}",
        "study.variants={ours: {}}",
        "study.budget={unit: iterations, amount: 1}",
        "study.num_captions=8",
    )
    teacher = micro_config(tmp_path)
    clips = {"train": str(world / "train"), "held_out": str(world / "held_out")}
    teacher = teacher.model_copy(update={"world": teacher.world.model_copy(update=clips)})
    output, shards = tmp_path / "evaluation", tmp_path / "shards"
    commands: dict[Path, Callable[[], object]] = {
        config.run_folder: lambda: distill(config),
        config.run_folder.with_name("busy-sweep"): lambda: sweep(config),
        Path(folder_of(config)): lambda: study(
            config, print, lambda *_: nullcontext(RunObserver())
        ),
        Path(teacher.run_dir): lambda: pretrain(teacher),
        output / "samples": lambda: evaluate(
            wan_folder,
            teacher=wan_folder,
            captions=str(world / "held_out"),
            output=output,
            options=EvaluationOptions(num_captions=8),
        ),
        shards: lambda: write_shards(str(shards), num_clips=1, shard_size=1, seed=0),
    }
    for folder, command in commands.items():
        with hold(str(folder), "the first writer"):
            before = sorted(folder.rglob("*"))
            with pytest.raises(
                LeaseError, match=rf"process {os.getpid()} .*the first writer"
            ) as caught:
                command()
            assert str(folder) in caught.value.attempted
            assert "Wait for that process or end it" in str(caught.value)
            assert sorted(folder.rglob("*")) == before
        # A first writer that is dead leaves its file behind, which stops nobody.
        folder.mkdir(exist_ok=True)
        (folder / LEASE_FILE).write_text(json.dumps({"owner": "nobody", "pid": 1}))
        with hold(str(folder), "the next writer"):
            pass
