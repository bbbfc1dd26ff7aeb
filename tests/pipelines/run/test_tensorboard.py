"""TensorBoard's files, read back as TensorBoard reads them."""

import logging
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.run.alarms import Alarm
from pipelines.run.records import RunEvent, ValidationRecord
from pipelines.run.tensorboard import open_tensorboard
from tests.helpers.records import iteration_record

ITERATION = iteration_record(
    losses={"fisher": 0.5},
    grad_norms={"generator": 2.0},
    seconds={"teacher.denoise": 0.1},
    seconds_total=0.4,
    data_wait_s=0.25,
    samples_seen=16,
    epoch=0.1,
    exit_steps=(0,),
)


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    found.Reload()
    return found


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(one.step, round(one.value, 6)) for one in read(folder).Scalars(tag)]


def texts(folder: Path, tag: str) -> list[tuple[int, str]]:
    found = read(folder).Tensors(f"{tag}/text_summary")
    return [(one.step, one.tensor_proto.string_val[0].decode()) for one in found]


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    folder = tmp_path / "samples"
    folder.mkdir()
    Image.new("RGB", (30, 20), (200, 10, 10)).save(folder / "sheet.png")
    return folder


def test_a_run_is_read_back_with_figures_sheet_alarms_and_events(tmp_path: Path, samples: Path):
    validation = ValidationRecord(1, {"frechet": 0.75}, 2.0, "sheet.png")
    event = RunEvent(kind="worker_died", cause="it was killed", iteration=1, lost_s=2.0)
    with open_tensorboard(True, tmp_path) as board:
        board.iteration(ITERATION)
        second = replace(ITERATION, iteration=1, losses={"fisher": 0.25})
        board.iteration(replace(second, lag={"tracking_lag": 0.5}))
        # It comes back late, and another's sheet is lost.
        board.validation(validation, samples)
        board.validation(replace(validation, iteration=2, sheet="lost.png"), samples)
        board.alarm(Alarm(1, "motion_collapse", "clips move less", 0.5, 0.6))
        board.event(event)
    root = tmp_path / "tensorboard"
    assert scalars(root, "losses/fisher") == [(1, 0.5), (2, 0.25)]
    assert scalars(root, "grad_norms/generator") == [(1, 2.0), (2, 2.0)]
    assert scalars(root, "seconds/teacher.denoise")[0] == (1, 0.1)
    assert scalars(root, "seconds/data_wait")[0] == (1, 0.25)
    assert scalars(root, "lag/tracking_lag") == [(2, 0.5)]
    assert scalars(root, "validation/frechet") == [(1, 0.75), (2, 0.75)]
    (sheet,) = read(root).Images("validation/sheet")
    assert (sheet.step, sheet.width, sheet.height) == (1, 30, 20)
    ((step, alarm),) = texts(root / "events", "alarms")
    assert (step, "clips move less" in alarm) == (1, True)
    ((step, words),) = texts(root / "events", "events/worker_died")
    assert (step, "it was killed" in words) == (1, True)


def test_iterations_that_are_made_again_are_there_once_and_events_stay(
    tmp_path: Path, samples: Path
):
    root = tmp_path / "tensorboard"
    with open_tensorboard(True, tmp_path) as board:
        for number in range(6):
            board.iteration(replace(ITERATION, iteration=number, losses={"fisher": 1.0}))
        board.validation(ValidationRecord(4, {"frechet": 9.0}, 2.0, "sheet.png"), samples)
        board.event(RunEvent(kind="worker_died", cause="x", iteration=5))
        # A repair goes back to iteration 4, in this process; then the process is killed.
        for number in range(4, 6):
            board.iteration(replace(ITERATION, iteration=number, losses={"fisher": 2.0}))
    # The resumed run goes on from a checkpoint of three iterations.
    with open_tensorboard(True, tmp_path) as board:
        for number in range(3, 5):
            board.iteration(replace(ITERATION, iteration=number, losses={"fisher": 3.0}))
        board.validation(ValidationRecord(4, {"frechet": 8.0}, 2.0, "sheet.png"), samples)
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 3.0), (5, 3.0)]
    assert scalars(root, "losses/fisher") == expected
    assert scalars(root, "validation/frechet") == [(4, 8.0)]
    assert len(texts(root / "events", "events/worker_died")) == 1


def test_a_run_without_it_has_no_files(tmp_path: Path):
    with open_tensorboard(False, tmp_path) as board:
        board.iteration(ITERATION)
    assert list(tmp_path.iterdir()) == []


def test_files_that_take_no_more_do_not_hide_the_error_of_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def broken_run() -> None:
        with open_tensorboard(True, tmp_path) as board:
            # The system refuses to make any file of this process longer, as a full disk does.
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
            board.iteration(ITERATION)
            raise ValueError("the run's own")

    try:
        with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="the run's own"):
            broken_run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "tensorboard was not written: [Errno 27]" in caplog.text
