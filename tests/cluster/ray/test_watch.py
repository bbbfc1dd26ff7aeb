"""The watch finds frozen and stuck processes, names the right one, and ends it; deaths in words."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from cluster.errors import WorkerDiedError, WorkerFrozenError
from cluster.procfs import process_state
from cluster.ray import watch
from cluster.ray.deaths import FrozenProcess
from cluster.ray.group import RayWorkerGroup
from cluster.ray.pools import Pool
from cluster.ray.processes import ProcessLook, look_at
from cluster.ray.progress import ProgressReport, read_report
from cluster.ray.topology import Placement, reserve
from cluster.ray.watch import watch_processes
from cluster.ray.watch_rules import WatchLimits
from cluster.said import Said
from cluster.spans import labelled
from tests.cluster.toys import WAIT_S, Singer, Toy, make_singer, make_toy

pytestmark = pytest.mark.ray

SILENCE_S = 5.0
LIMITS = WatchLimits(SILENCE_S, first_call_s=WAIT_S, start_s=WAIT_S)
LONG_S = 3 * SILENCE_S


@pytest.fixture(scope="module")
def placement(ray_cluster: None) -> Iterator[Placement]:
    names = ("painter", "judge", "woken", "heard", "dead", "crashed", "left", "replaced")
    pools = [Pool(name, cpus_per_rank=0.1) for name in names]
    with reserve([*pools, Pool("choir", 2, cpus_per_rank=0.1)], WAIT_S) as placement:
        yield placement


@contextmanager
def watched(
    folder: Path,
    *groups: RayWorkerGroup[Any],
    limits: WatchLimits = LIMITS,
    heard: Callable[[Said], None] = lambda said: None,
) -> Iterator[list[FrozenProcess]]:
    found: list[FrozenProcess] = []
    with watch_processes(lambda: groups, limits, folder, found.append, lambda *_: None, heard):
        yield found


@pytest.mark.slow
def test_a_stopped_process_is_named_and_not_the_one_that_waits_for_it(
    placement: Placement, tmp_path: Path
) -> None:
    lines: list[Said] = []
    with (
        RayWorkerGroup("painter", make_toy, (1,), placement) as painter,
        RayWorkerGroup("judge", make_toy, (1,), placement) as judge,
        watched(tmp_path, painter, judge, heard=lines.append) as found,
    ):
        with labelled(6, 0, 1):
            painter.fetch([painter.call_rank(0, Toy.warn, "the brush is dry")], WAIT_S, "a")
        # Long, but alive: two limits of silence pass, and nobody is accused.
        busy = judge.call_rank(0, Toy.sleep, 2 * SILENCE_S)
        pid = painter.fetch([painter.call_rank(0, Toy.say, "brush in hand")], WAIT_S, "a")[0]
        assert judge.fetch([busy], WAIT_S, "sleeping") == [2 * SILENCE_S]
        assert found == []
        with labelled(7, 0, 1):
            drawn = painter.call_rank(0, Toy.wait_for, str(tmp_path / "never"))
            waiting = judge.call_rank(0, Toy.note, drawn)
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(WorkerFrozenError) as caught:
                judge.fetch([waiting], WAIT_S, "learning in iteration 7")
    error = caught.value
    assert (error.group, error.rank, error.pid) == ("painter", 0, pid)
    assert "frozen (stopped): no sign of life for" in error.cause
    assert "brush in hand" in error.last_lines
    assert [line.line for line in lines] == ["[painter 0 @6] the brush is dry"]
    (one,) = found
    assert (one.group, one.cause, one.dump) == ("painter", error.cause, error.dump)
    dump = Path(error.dump).read_text()
    assert "T (stopped)" in dump
    assert "painter rank 0" in dump
    end_s = time.monotonic() + WAIT_S
    while process_state(pid) not in ("", "Z"):
        assert time.monotonic() < end_s, "it was not ended"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_process_that_wakes_up_while_it_is_looked_at_goes_on(
    placement: Placement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    def look(pid: int, since: int, log: str, *, is_busy: bool = False) -> ProcessLook:
        """As a look at a paused machine: what it has seen arrives when the process has gone on."""
        seen = look_at(pid, since, log, is_busy=is_busy)
        looks.append(seen.state)
        os.kill(pid, signal.SIGCONT)
        time.sleep(3.0)
        return seen

    monkeypatch.setattr(watch, "look_at", look)
    with RayWorkerGroup("woken", make_toy, (1,), placement) as woken:
        pid = woken.fetch([woken.call_rank(0, Toy.say, "asleep")], WAIT_S, "saying")[0]
        with watched(tmp_path, woken) as found:
            time.sleep(2.0)
            os.kill(pid, signal.SIGSTOP)
            end_s = time.monotonic() + WAIT_S
            while not looks:
                assert time.monotonic() < end_s, "it was never looked at"
                time.sleep(0.1)
            time.sleep(2 * SILENCE_S)
            again = woken.fetch([woken.call_rank(0, Toy.say, "awake")], WAIT_S, "saying")
    assert looks == ["T"]
    assert found == []
    assert again == [pid]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_time_for_which_the_control_service_stood_still_is_no_silence(
    placement: Placement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[ProgressReport] = []
    ends: list[float] = []
    looks: list[int] = []

    def late(key: str) -> ProgressReport | None:
        """Answers after a while, once, with what it had before."""
        report = read_report(key)
        if first and not ends:
            time.sleep(SILENCE_S + 2.0)
            ends.append(time.monotonic())
            return first[0]
        first.extend([report] if report else [])
        return report

    def look(pid: int, since: int, log: str, *, is_busy: bool = False) -> ProcessLook:
        looks.append(pid)
        return look_at(pid, since, log, is_busy=is_busy)

    monkeypatch.setattr(watch, "read_report", late)
    monkeypatch.setattr(watch, "look_at", look)
    with RayWorkerGroup("heard", make_toy, (1,), placement) as heard:
        heard.fetch([heard.call_rank(0, Toy.say, "here")], WAIT_S, "saying")
        with watched(tmp_path, heard) as found:
            end_s = time.monotonic() + WAIT_S
            while not ends:
                assert time.monotonic() < end_s, "nothing was read"
                time.sleep(0.1)
            time.sleep(4.0)
    assert (looks, found) == ([], [])


@pytest.mark.slow
def test_of_ranks_in_a_collective_the_one_that_has_not_entered_is_stuck(
    placement: Placement, tmp_path: Path
) -> None:
    with (
        RayWorkerGroup("choir", make_singer, (), placement, replicas=1) as choir,
        watched(tmp_path, choir) as found,
    ):
        choir.wait_ready(WAIT_S)
        with labelled(3, 0, 0):
            for _ in range(3):
                calls = choir.call(Singer.late_chord, 1.0, 1, 0.1)
                assert choir.fetch(calls, WAIT_S, "singing") == [2.0, 2.0]
            calls = choir.call(Singer.late_chord, 1.0, 1, WAIT_S)
            with pytest.raises(WorkerFrozenError) as caught:
                choir.fetch(calls, WAIT_S, "singing")
    assert [(one.group, one.rank) for one in found] == [("choir", 1)]
    assert (caught.value.group, caught.value.rank) == ("choir", 1)
    assert "stuck in late_chord() of iteration 3, part 0, micro-batch 0 for" in caught.value.cause
    dump = Path(caught.value.dump).read_text()
    late, partner = dump.split("== choir rank 0")
    assert "late_chord" in late
    assert "all_reduce" not in late
    assert "all_reduce" in partner


def died(group: RayWorkerGroup[Toy], call: Any, *arguments: Any) -> WorkerDiedError:
    with pytest.raises(WorkerDiedError) as caught:
        group.fetch([group.call_rank(0, call, *arguments)], WAIT_S, "painting")
    return caught.value


def test_a_death_is_one_sentence_with_the_last_log_lines(
    placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SERVICE_TOKEN", "planted-7f3a")
    with RayWorkerGroup("dead", make_toy, (1,), placement) as dead:
        said = [dead.call_rank(0, Toy.say, text) for text in ("loading", "with planted-7f3a")]
        pid = dead.fetch(said, WAIT_S, "saying")[0]
        os.kill(pid, signal.SIGKILL)
        error = died(dead, Toy.history)
    assert re.match("it ended without a word, as after SIGKILL", error.cause)
    assert (error.pid, error.last_lines[-2:]) == (pid, ("loading", "with ***"))
    with RayWorkerGroup("crashed", make_toy, (1,), placement) as crashed:
        error = died(crashed, Toy.crash)
    assert re.match("it crashed with a segmentation fault", error.cause)
    with RayWorkerGroup("left", make_toy, (1,), placement) as left:
        error = died(left, Toy.leave, 3)
    assert re.match("it ended itself with exit code 3", error.cause)
    for words in ("actor_id", "common causes", "Worker exit", "class_name"):
        assert words not in str(error)
