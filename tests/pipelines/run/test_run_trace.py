"""Times of groups on several machines, put on one clock."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.local import OWN_MACHINE, LocalWorkerGroup
from cluster.schedule.execution import IssuedCall
from cluster.schedule.schedule import Call
from cluster.spans import Clock, labelled, read_clock
from pipelines.run.trace import RunTrace

HOUR_S = 3600.0


class Clerk:
    """Works."""

    def work(self) -> None:
        """Does something."""


class PlacedGroup(LocalWorkerGroup[Clerk]):
    """A group whose process can come to be on another machine, with a clock of its own."""

    clock: Clock

    def clocks(self) -> list[Clock]:
        """The clock of the machine that it is on."""
        return [self.clock]


def test_a_group_beside_that_was_replaced_on_another_machine_has_the_clock_of_that_one(
    tmp_path: Path,
) -> None:
    role, validator = LocalWorkerGroup("role", [Clerk()]), PlacedGroup("validator", [Clerk()])
    own = read_clock(OWN_MACHINE)
    validator.clock = replace(own, machine="lost", offset_s=own.offset_s + HOUR_S)
    trace = RunTrace([role], [validator], 1, 10.0, waits=True)
    issued_s = time.monotonic()
    with labelled(0, 0):
        role.fetch(role.call(Clerk.work), 10.0, "working")
    trace.add(0, [IssuedCall(0, Call(0, 0, "role", 0, "work", None, (0, 1)), issued_s)])
    # Replaced without a word to the trace: the run goes on meanwhile.
    validator.clock = replace(own, machine="new")
    validator.fetch(validator.call(Clerk.work), 10.0, "working")
    trace.close()
    trace.write(tmp_path / "trace.json")
    written = json.loads((tmp_path / "trace.json").read_text())
    starts_s = [
        one["ts"] / 1e6
        for one in written["traceEvents"]
        if one["ph"] == "X" and one["name"] == "work"
    ]
    assert starts_s == pytest.approx([own.offset_s + issued_s] * 2, abs=HOUR_S / 2, rel=0)
