"""A validation stands in nobody's way, and is written down when it is back."""

import time
from pathlib import Path

import pytest

from cluster.checkpoints import Checkpoints
from cluster.ray.group import RayWorkerGroup
from cluster.ray.pools import Pool
from cluster.ray.topology import reserve
from pipelines.config.recipe import load_recipe
from pipelines.distillation.monitor import RunMonitor
from pipelines.run.alarms import Alarm
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.records import ValidationRecord

WAIT_S = 120.0


class SlowValidator:
    """Answers once a file is there."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def validate(self, iteration: int, weights: dict[str, int]) -> ValidationRecord:
        end = time.monotonic() + WAIT_S
        while not (self._folder / f"go-{iteration}").exists() and time.monotonic() < end:
            time.sleep(0.05)
        figures = {"frechet": 1 / iteration, "flow_top_ratio": 0.1 * weights["motion"]}
        return ValidationRecord(iteration, figures, 1.0, "sheet.png")


class Listening(RunObserver):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def note(self, text: str) -> None:
        self.heard.append(text)

    def alarm(self, alarm: Alarm) -> None:
        self.heard.append(alarm.name)

    def warning(self, text: str) -> None:
        self.heard.append(text)


def validated(folder: RunFolder) -> list[int]:
    return [line["iteration"] for line in read_jsonl(folder.validation)]


@pytest.mark.ray
def test_a_validation_is_written_when_it_is_back_and_delays_nothing(
    tmp_path: Path, ray_cluster: None
) -> None:
    config = load_recipe("tiny", [f"output={tmp_path}", "name=run", "checkpoint.keep_best=0"])
    folder, observer = RunFolder(config.run_folder), Listening()
    folder.create(config.to_yaml())
    with (
        reserve([Pool("validator", 1, 0.1)], WAIT_S) as placement,
        RayWorkerGroup("validator", SlowValidator, (str(tmp_path),), placement) as group,
    ):
        group.wait_ready(WAIT_S)
        checkpoints = Checkpoints(str(folder.checkpoints))
        judge = RunMonitor(config, folder, checkpoints, group, observer)
        started = time.monotonic()
        for iteration in (10, 20, 30):
            judge.validate(iteration, {"motion": 9})
            judge.collect()
        assert time.monotonic() - started < 5
        assert validated(folder) == []
        assert [line for line in observer.heard if "30 left out: those at 10, 20" in line]

        (tmp_path / "go-10").touch()
        end = time.monotonic() + WAIT_S
        while not validated(folder) and time.monotonic() < end:
            judge.collect()
            time.sleep(0.05)
        assert validated(folder) == [10]

        # The last one is never left out; it is waited for.
        judge.validate(40, {"motion": 9})
        judge.validate(config.iterations, {"motion": 1}, is_last=True)
        for iteration in (20, 40, config.iterations):
            (tmp_path / f"go-{iteration}").touch()
        judge.finish()
        assert validated(folder) == [10, 20, 40, config.iterations]
        assert observer.heard[-1] == "motion_collapse"
        assert judge.problem is None

        # One that is late is told, and given up with those behind it.
        hasty = config.with_settings({"validation.timeout_s": 0.2})
        judge = RunMonitor(hasty, folder, checkpoints, group, observer)
        judge.validate(50, {"motion": 9})
        judge.validate(60, {"motion": 9})
        judge.finish()
        assert judge.problem is not None
        assert "iteration 50 was not back in time" in judge.problem
        assert observer.heard[-1] == judge.problem
        judge.validate(70, {"motion": 9})
        judge.finish()
        assert validated(folder) == [10, 20, 40, config.iterations]
        for iteration in (50, 60):
            (tmp_path / f"go-{iteration}").touch()
