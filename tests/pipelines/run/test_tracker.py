"""W&B without an account: what a run logs is in the files that `wandb sync` would send."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2

from pipelines.run.alarms import Alarm
from pipelines.run.records import RunEvent, ValidationRecord
from pipelines.run.tracker import open_tracker
from tests.helpers.records import iteration_record
from tests.helpers.runs import write_sheet

_HEADER_BYTES, _BLOCK_BYTES, _RECORD_HEADER_BYTES = 7, 2**15, 7
_FULL, _LAST = 1, 4


def records(file: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Records of a W&B file: a log of LevelDB's format, in blocks of 32 KiB."""
    data, at, parts = file.read_bytes(), _HEADER_BYTES, b""
    while at + _RECORD_HEADER_BYTES <= len(data):
        if _BLOCK_BYTES - at % _BLOCK_BYTES < _RECORD_HEADER_BYTES:
            at += _BLOCK_BYTES - at % _BLOCK_BYTES
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        at += _RECORD_HEADER_BYTES
        if at + length > len(data):
            return
        parts += data[at : at + length]
        at += length
        if kind in (_FULL, _LAST):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def wait_until_written(file: Path) -> None:
    """W&B's own process may still be writing when the run has been finished."""
    end = time.monotonic() + 60
    while not any(record.HasField("exit") for record in records(file)):
        assert time.monotonic() < end, f"{file} has no end"
        time.sleep(0.1)


def logged(file: Path) -> tuple[dict[str, object], list[str]]:
    """All that the history holds, and titles of alerts."""
    history: dict[str, object] = {}
    alerts: list[str] = []
    for record in records(file):
        for item in record.history.item:
            history[".".join([item.key, *item.nested_key]).strip(".")] = json.loads(item.value_json)
        if record.HasField("alert"):
            alerts.append(record.alert.title)
    return history, alerts


def values(file: Path, name: str) -> list[object]:
    """What the history holds under one name, in the order of logging."""
    return [
        json.loads(item.value_json)
        for record in records(file)
        for item in record.history.item
        if name in (item.key, ".".join(item.nested_key))
    ]


@pytest.mark.slow
def test_an_offline_run_holds_losses_figures_clips_alarms_and_events(tmp_path: Path) -> None:
    write_sheet(tmp_path / "samples", "validation-000001")
    iteration = iteration_record(
        losses={"fisher": 0.5},
        grad_norms={"generator": 2.0},
        seconds={"teacher.denoise": 0.1},
        seconds_total=0.4,
        samples_seen=16,
        epoch=0.1,
        exit_steps=(0,),
    )
    validation = ValidationRecord(1, {"flow_top_ratio": 0.9}, 2.0, "validation-000001.png")
    later = replace(validation, iteration=2)
    alarm = Alarm(1, "motion_collapse", "clips move less", 0.5, 0.6)
    with open_tracker("offline", "sgmd", "run", tmp_path, {"seed": 0}) as tracker:
        tracker.iteration(iteration)
        tracker.validation(validation, tmp_path / "samples")
        tracker.validation(later, tmp_path / "samples")
        tracker.iteration(replace(iteration, iteration=1, lag={"tracking_lag": 0.5}))
        tracker.alarm(alarm)
        for lost_s in (2.0, 3.0):
            tracker.event(RunEvent(kind="worker_died", cause="x", iteration=1, lost_s=lost_s))
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    wait_until_written(file)
    history, alerts = logged(file)
    # Two validations that come back together push no iteration out.
    assert values(file, "iteration") == [1, 2]
    assert values(file, "validation/iteration") == [1, 2]
    assert history["losses/fisher"] == 0.5
    assert history["grad_norms/generator"] == 2.0
    assert values(file, "lag/tracking_lag") == [0.5]
    assert history["validation/flow_top_ratio"] == 0.9
    assert alerts == ["motion_collapse", "worker_died", "worker_died"]
    assert (history["events/worker_died"], history["events/lost_s"]) == (2, 5.0)
    kinds = {path.suffix for path in (file.parent / "files" / "media").rglob("*.*")}
    assert kinds == {".png", ".gif"}


@pytest.mark.slow
def test_a_run_that_is_resumed_goes_on_as_the_same_run(tmp_path: Path) -> None:
    for _ in range(2):
        with open_tracker("offline", "sgmd", "run", tmp_path, {"seed": 0}):
            pass
        time.sleep(1.1)  # W&B names its folders by the second.
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    for file in files:
        wait_until_written(file)
    ids = {record.run.run_id for file in files for record in records(file) if record.run.run_id}
    assert ids == {(tmp_path / "wandb-id").read_text()}
