"""What a monitor keeps when the run goes back, and what it does without when something is lost."""

from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoints import Checkpoints
from cluster.errors import (
    ClusterError,
    NodeLostError,
    ResultLostError,
    WorkerDiedError,
)
from cluster.local import LocalWorkerGroup
from cluster.worker_group import Future
from pipelines.config.recipe import load_recipe
from pipelines.distillation.monitor import RunMonitor
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.records import ValidationRecord

STILL = 0.1
"""Motion at which an alarm sounds."""


class Judge:
    """Validates, except for the iterations that it fails at."""

    def __init__(self) -> None:
        self.fails: dict[int, Exception] = {}
        self.asked: list[int] = []

    def validate(self, iteration: int, weights: dict[str, float]) -> ValidationRecord:
        self.asked.append(iteration)
        if iteration in self.fails:
            raise self.fails.pop(iteration)
        figures = {"frechet": 1.0, "flow_top_ratio": weights["motion"]}
        return ValidationRecord(iteration, figures, 1.0, "sheet.png")


class JudgeGroup(LocalWorkerGroup[Judge]):
    """Counts the calls as not yet done once so many of them have been fetched."""

    num_done = 1_000
    num_fetched = 0

    def is_done(self, future: Future[Any]) -> bool:
        return self.num_fetched < self.num_done

    def fetch(self, futures: Any, timeout_s: float, attempted: str) -> list[Any]:
        self.num_fetched += 1
        return super().fetch(futures, timeout_s, attempted)


class Learner:
    """Has weights, or has died."""

    def __init__(self, error: Exception | None, motion: float) -> None:
        self._error = error
        self._motion = motion

    def final_weights(self) -> dict[str, float]:
        if self._error:
            raise self._error
        return {"motion": self._motion}


class Listening(RunObserver):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def warning(self, text: str) -> None:
        self.heard.append(text)


class Run:
    """A run without roles: its folder, its validator, and what was replaced."""

    def __init__(self, root: Path, *settings: str) -> None:
        self.config = load_recipe("tiny", [f"output={root}", "name=run", *settings])
        self.folder = RunFolder(self.config.run_folder)
        self.folder.create(self.config.to_yaml())
        self.judge, self.observer = Judge(), Listening()
        self.group = JudgeGroup("validator", [self.judge])
        self.replaced: list[WorkerDiedError] = []

    def monitor(self) -> RunMonitor:
        checkpoints = Checkpoints(str(self.folder.checkpoints))
        return RunMonitor(
            self.config,
            self.folder,
            checkpoints,
            self.group,  # pyright: ignore[reportArgumentType] - a validator without networks
            self.observer,
            self.replaced.append,
        )

    def gone_back(self, former: RunMonitor, iteration: int, *, again: bool = False) -> RunMonitor:
        self.folder.rewind(iteration)
        monitor = self.monitor()
        monitor.take_over(former, iteration, again=again)
        return monitor

    @property
    def validated(self) -> list[int]:
        return [line["iteration"] for line in read_jsonl(self.folder.validation)]

    @property
    def alarms(self) -> list[int]:
        return [line["iteration"] for line in read_jsonl(self.folder.alarms)]


def weights(error: Exception | None = None, motion: float = 1.0) -> Future[Any]:
    """Averaged weights on their way; they never arrive where there is an error."""
    group = LocalWorkerGroup("generator", [Learner(error, motion)])
    return group.call_rank(0, Learner.final_weights)


def died(group: str) -> WorkerDiedError:
    return WorkerDiedError(group, 0, "painting", "it ended without a word")


def machine_lost(*groups: str) -> NodeLostError:
    return NodeLostError(
        groups[0], 0, "painting", "its raylet has ended", lost=tuple((each, 0) for each in groups)
    )


def test_a_fatal_alarm_outlives_a_repair_and_is_written_down_once(tmp_path: Path) -> None:
    run = Run(tmp_path, "alarms.stop=[motion_collapse]")
    monitor = run.monitor()
    monitor.validate(20, weights(motion=STILL))
    monitor.collect()
    assert monitor.fatal is not None
    assert run.alarms == [20]
    later = run.gone_back(monitor, 25)
    # What was replayed does not sound again, so it must have been kept.
    assert later.fatal == monitor.fatal
    later.validate(30, weights(motion=STILL))
    later.collect()
    assert run.alarms == [20]
    # Where it is made again, it sounds again.
    before = run.gone_back(later, 10)
    assert before.fatal is None
    assert run.alarms == []
    before.validate(20, weights(motion=STILL))
    before.collect()
    assert before.fatal == monitor.fatal
    assert run.alarms == [20]


def test_a_lost_validator_is_asked_again_and_nobody_waits_for_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    monitor = run.monitor()
    run.group.num_done = 0
    run.judge.fails[10] = died("validator")
    for iteration in (10, 20):
        monitor.validate(iteration, weights())
    run.group.num_done = 1
    monitor.collect()
    assert (len(run.replaced), run.group.num_fetched, run.validated) == (1, 1, [])
    assert run.judge.asked == [10, 20, 10, 20]
    monitor.finish()
    assert run.validated == [10, 20]


@pytest.mark.parametrize(
    "error",
    [died("generator"), machine_lost("generator", "teacher"), ResultLostError("a", "b", "c")],
)
def test_a_validation_whose_weights_are_lost_is_left_out_alone(
    tmp_path: Path, error: ClusterError
) -> None:
    run = Run(tmp_path)
    monitor = run.monitor()
    monitor.validate(10, weights(error))
    run.group.num_done = 0
    monitor.validate(20, weights())
    run.group.num_done = 1_000
    monitor.collect()
    assert (run.validated, run.replaced, monitor.problem) == ([20], [], None)
    assert [line for line in run.observer.heard if "iteration 10 is left out" in line]
    # Its checkpoint may be the best one, as long as nobody has judged it.
    run.config = run.config.with_settings({"checkpoint.keep_best": 1})
    later = run.monitor()
    later.take_over(monitor, 25, again=False)
    assert later.spared == {10}
    later.validate(10, weights())
    later.collect()
    assert later.spared == set()


def test_a_machine_with_validator_and_roles_is_left_to_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    monitor = run.monitor()
    run.judge.fails[10] = machine_lost("generator", "validator")
    monitor.validate(10, weights())
    with pytest.raises(NodeLostError):
        monitor.collect()
    assert run.replaced == []
    later = run.gone_back(monitor, 15, again=True)
    later.collect()
    assert run.validated == [10]


def test_a_machine_of_the_validator_alone_is_a_lost_validator(tmp_path: Path) -> None:
    run = Run(tmp_path)
    monitor = run.monitor()
    run.judge.fails[10] = machine_lost("validator")
    monitor.validate(10, weights())
    monitor.collect()
    assert (len(run.replaced), run.validated, monitor.problem) == (1, [10], None)
