"""Frozen processes of a run are found, named rightly, written down and replaced."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")

from cluster.ray.failures import open_processes
from cluster.ray.progress import read_report
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.records import IterationRecord, RunEvent
from tests.e2e.conftest import MakeRecipe

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

WATCH_S = 6.0
PATIENCE_S = 120.0
WITHIN_S = 60.0


class Freezer(RunObserver):
    """Stops the process of a group after an iteration, and notes when it is heard of.

    Args:
        victims: Group by iteration.
        idle: Groups that the next iteration may not need: it begins when they have been found.
    """

    def __init__(self, victims: dict[int, str], idle: frozenset[str]) -> None:
        self._left = dict(victims)
        self._idle = idle
        self._stopped_s = 0.0
        self._heard = threading.Event()
        self.found: list[tuple[str, float]] = []

    def iteration(self, record: IterationRecord) -> None:
        victim = self._left.pop(record.iteration, None)
        if victim is None:
            return
        (actor,) = [actor for actor, (group, _) in open_processes().items() if group == victim]
        report = read_report(actor)
        assert report is not None
        self._heard.clear()
        self._stopped_s = time.monotonic()
        os.kill(report.pid, signal.SIGSTOP)
        if victim in self._idle:
            assert self._heard.wait(PATIENCE_S), f"nothing was heard of {victim}"

    def event(self, event: RunEvent) -> None:
        if event.kind == "worker_frozen":
            self.found.append((event.role, time.monotonic() - self._stopped_s))
            self._heard.set()


def test_frozen_processes_are_named_and_replaced(make_recipe: MakeRecipe) -> None:
    config = make_recipe(
        "topology.mode=pools", f"topology.watch_s={WATCH_S}", "iterations=8", "validation.every=2"
    )
    victims = {1: "generator", 3: "feed", 5: "validator"}
    freezer = Freezer(victims, frozenset({"feed", "validator"}))
    distill(config, observer=freezer)
    assert [role for role, _ in freezer.found] == list(victims.values())
    assert max(after_s for _, after_s in freezer.found) < WITHIN_S
    folder = RunFolder(config.run_folder)
    events = read_jsonl(folder.events)
    frozen = [event for event in events if event["kind"] == "worker_frozen"]
    assert [event["role"] for event in frozen] == list(victims.values())
    assert all("frozen (stopped)" in event["cause"] for event in frozen)
    dumps = sorted(folder.stacks.iterdir())
    assert len(dumps) == len(victims)
    for event, dump in zip(frozen, dumps, strict=True):
        assert str(dump) in event["action"]
        assert Path(dump).read_text().startswith(f"{event['role']} rank 0: it was frozen")
    assert [event["kind"] for event in events].count("recovered") >= len(victims) - 1
    # The watch has said what happened; a second event of the same would be noise.
    assert "worker_died" not in {event["kind"] for event in events}
    assert len(read_jsonl(folder.metrics)) == config.iterations
