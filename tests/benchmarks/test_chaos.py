"""A storm's faults: those that have not struck are told, and what must not be fails."""

import os
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.benchmarks.storm import Storm, StormyRun, chaos
from tests.pipelines.run.test_alarms import an_iteration


def storm_over(folder: Path, kind: str, process: int) -> StormyRun:
    """A run that has reached the fault of its iteration 0, in a process of its feed."""
    run = StormyRun(str(folder), "stormy", 10, {0: kind})
    feed = SimpleNamespace(name="feed", process_ids=lambda: [process])
    groups: Any = SimpleNamespace(all=[feed])
    Storm(run, [groups]).iteration(an_iteration(0))
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()
    return run


def test_a_process_that_was_there_to_be_killed_is_a_fault_that_struck(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as victim:
        run = storm_over(tmp_path, "kill feed", victim.pid)
        assert victim.wait(10) < 0
    assert chaos.missed(run, []) == []


def test_a_process_that_had_ended_before_is_a_fault_that_did_not_strike(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as victim:
        victim.wait(10)
    run = storm_over(tmp_path, "kill feed", victim.pid)
    (told,) = chaos.missed(run, [])
    assert told.startswith("kill feed: ")
    assert os.strerror(3) in told


def test_a_driver_that_ended_of_nothing_is_a_fault_that_did_not_strike(tmp_path: Path) -> None:
    (tmp_path / "storm.jsonl").write_text('{"iteration": 4, "kind": "driver, torn"}\n')
    run = StormyRun(str(tmp_path), "stormy", 10, {4: "driver, torn", 9: "server busy"})
    assert chaos.missed(run, ["driver"]) == ["server busy (iteration 9)"]
    assert chaos.missed(run, ["disk full"]) == ["server busy (iteration 9)", "driver"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"differences": ["losses"]}, ["pools: losses differs"]),
        ({"missed": ["kill feed"]}, ["pools: kill feed has not struck"]),
        ({"samples": {"lost": 2, "repeated": 0}}, ["pools: 2 samples lost"]),
        ({"samples": {"lost": 0, "repeated": 1}}, ["pools: 1 samples repeated"]),
    ],
)
def test_a_storm_fails_of_whatever_must_not_be(change: dict[str, Any], told: list[str]) -> None:
    calm = {"differences": [], "missed": [], "samples": {"lost": 0, "repeated": 0}}
    assert chaos.problems({"pools": calm | change}) == told
