"""Two processes that write to one place: the second is refused, the first is unharmed."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.errors import LeaseError
from cluster.lease import hold
from pipelines.data.making.prepare import PrepareOptions, prepare
from pipelines.distillation.run import distill
from tests.e2e.conftest import MakeRecipe
from tests.e2e.processes import ROOT
from tests.e2e.test_equivalence import history
from tests.e2e.test_stopping import ENDLESS, start
from tests.helpers.video_files import grey_frames, video_file


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
    with pytest.raises(LeaseError, match=rf"process {process.pid}"):
        distill(config, resume=True)
    before = len(history(config))
    deadline = time.monotonic() + 60
    while len(history(config)) < before + 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    # Free at once, and whole: every iteration stands in the log once.
    done = [int(line["iteration"]) for line in history(config)]
    assert done == list(range(len(done)))
    with hold(str(config.run_folder), "a test"):
        pass
    end = len(done) + 1
    distill(config.with_settings({"iterations": end}), resume=True)
    assert [line["iteration"] for line in history(config)] == list(range(end))
