"""Calls as trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing show.

    process   a role               slice   a call, with its iteration and micro-batch
    thread    a rank of it         arrow   from the call that made a value to the one that takes it

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from collections.abc import Iterable, Sequence
from typing import Any

from cluster.measured import key_of_call, key_of_work
from cluster.schedule.execution import IssuedCall
from cluster.spans import Work

_CONTROLLER = "controller"
_SHORTEST_SHOWN_S = 1e-4
Event = dict[str, Any]


def trace_events(works: Sequence[Work], iterations: Sequence[Sequence[IssuedCall]]) -> list[Event]:
    """The events of some iterations.

    Args:
        works: What the ranks noted, on one clock.
        iterations: The calls of each, for the arrows and for the controller's own line.
    """
    roles = [_CONTROLLER, *dict.fromkeys(work.role for work in works)]
    pids = {role: number for number, role in enumerate(roles)}
    events = [_named("process_name", pids[role], 0, role) for role in roles]
    threads = dict.fromkeys((work.role, work.rank) for work in works)
    events += [_named("thread_name", pids[role], rank, f"rank {rank}") for role, rank in threads]
    for work in works:
        events += _slices(work, pids[work.role])
    by_key = {key_of_work(work): work for work in works}
    for asked in iterations:
        events += _arrows(asked, by_key, pids)
        ends = [by_key[key].left_s for one in asked if (key := key_of_call(one)) in by_key]
        if ends:
            began_s, number = asked[0].issued_s, asked[0].call.iteration
            events.append(_slice(f"iteration {number}", began_s, max(ends), 0, 0, {}))
    return events


def _slices(work: Work, pid: int) -> Iterable[Event]:
    label = work.label
    facts = {"iteration": label.iteration, "micro_batch": label.micro_batch, "phase": label.part}
    known = {name: value for name, value in facts.items() if value is not None}
    yield _slice(work.method, work.arrived_s, work.left_s, pid, work.rank, known)
    for name, start_s, end_s in (
        ("unpack", work.arrived_s, work.began_s),
        ("pack", work.ended_s, work.left_s),
    ):
        if end_s - start_s > _SHORTEST_SHOWN_S:
            yield _slice(name, start_s, end_s, pid, work.rank, {})


def _arrows(
    asked: Sequence[IssuedCall], works: dict[Any, Work], pids: dict[str, int]
) -> Iterable[Event]:
    by_place = {one.place: works.get(key_of_call(one)) for one in asked}
    for one in asked:
        taker = by_place[one.place]
        for place in one.call.inputs:
            maker = by_place.get(place)
            if maker is None or taker is None:
                continue
            # Iterations are not enough: a segment counts its places from 0.
            number = f"{one.call.iteration}.{place}.{one.place}"
            arrow = {"name": maker.method, "cat": "handed on", "id": number}
            for kind, work, at_s in (("s", maker, maker.left_s), ("f", taker, taker.arrived_s)):
                ends = {"ph": kind, "ts": _us(at_s), "pid": pids[work.role], "tid": work.rank}
                yield {**arrow, **ends, **({"bp": "e"} if kind == "f" else {})}


def _slice(
    name: str, start_s: float, end_s: float, pid: int, tid: int, args: dict[str, Any]
) -> Event:
    times = {"ts": _us(start_s), "dur": _us(end_s) - _us(start_s)}
    return {"name": name, "ph": "X", **times, "pid": pid, "tid": tid, "args": args}


def _named(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)
