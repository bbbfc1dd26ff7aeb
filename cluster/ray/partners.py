"""Search for the rank that has ended, when a collective fails in the ranks that live.

    gone        Ray says so, or the watch has ended it, or this machine has the process no more
    alive       it answers a call, or goes on reporting
    undecided   neither within `_PATIENCE_S`: its machine may be gone, or unreachable

An error of a network does not say which rank has failed. Ranks on all machines are asked, and no
rank is named without evidence.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from cluster.errors import ResultLostError, WorkerDiedError
from cluster.ray.deaths import death_of, frozen_or_gone, lost_machine
from cluster.ray.progress import read_report

_POLL_S = 0.2
# Ray counts a machine as lost after 14 s.
_PATIENCE_S = 30.0
# A report may have been under way when its process ended.
_REPORTS_OF_A_LIVING_ONE = 2


@dataclass(frozen=True, slots=True)
class Partner:
    """A rank that runs collectives.

    Attributes:
        actor: Ray's handle of its process.
        place: Its group and rank.
    """

    actor: Any
    place: tuple[str, int]


class SignsOfLife:
    """Numbers of reports, by actor id, each compared with the first that was read."""

    def __init__(self) -> None:
        self._first: dict[str, int] = {}

    def goes_on(self, actor: str, count: int | None) -> bool:
        """Notes the number of the newest report; returns True if the process goes on reporting.

        Args:
            actor: Actor id of the process.
            count: Number of its newest report; None where it could not be read.
        """
        if count is None:
            return False
        return count >= self._first.setdefault(actor, count) + _REPORTS_OF_A_LIVING_ONE


def dead_partner(
    partners: Mapping[str, Partner], attempted: str, found: str, patience_s: float = _PATIENCE_S
) -> WorkerDiedError | ResultLostError | None:
    """The error for a rank whose end made a collective of another rank fail.

    Args:
        partners: Ranks that run collectives, by actor id.
        attempted: What the controller was waiting for.
        found: The failure of the rank that lives.
        patience_s: How long to look for signs of life.

    Returns:
        The error of the rank that is gone; one that names no rank where that is not known; None
        where all of them live.
    """
    open_ones = dict(partners)
    places = {actor: one.place for actor, one in partners.items()}
    asked = {one.actor.process_id.remote(): actor for actor, one in partners.items()}
    signs = SignsOfLife()
    for actor in partners:
        signs.goes_on(actor, _count(actor))
    end_s = time.monotonic() + patience_s
    while open_ones:
        for actor, one in open_ones.items():
            if died := frozen_or_gone(actor, one.place, attempted):
                return died
        for answer in _answered(list(asked)):
            actor = asked.pop(answer)
            if died := _death(answer, {actor: places[actor]}, places, attempted):
                return died
            open_ones.pop(actor, None)
        if lost := lost_machine(places, attempted):
            return lost
        open_ones = {
            actor: one
            for actor, one in open_ones.items()
            if not signs.goes_on(actor, _count(actor))
        }
        if time.monotonic() > end_s:
            break
    return _undecided(open_ones, attempted, found, patience_s) if open_ones else None


def _answered(asked: list[ray.ObjectRef]) -> list[ray.ObjectRef]:
    """Those that have an answer a moment later."""
    if not asked:
        time.sleep(_POLL_S)
        return []
    return ray.wait(asked, num_returns=len(asked), timeout=_POLL_S)[0]


def _death(
    answer: ray.ObjectRef,
    known: Mapping[str, tuple[str, int]],
    others: Mapping[str, tuple[str, int]],
    attempted: str,
) -> WorkerDiedError | None:
    try:
        ray.get(answer)
    except RayActorError as error:
        return death_of(error, known, attempted, others)
    except RayError:
        return None
    return None


def _undecided(
    open_ones: Mapping[str, Partner], attempted: str, found: str, patience_s: float
) -> ResultLostError:
    names = ", ".join("{} rank {}".format(*one.place) for one in open_ones.values())
    return ResultLostError(
        attempted,
        f"a collective has failed ({found}), and there is no sign of life of {names} for "
        f"{patience_s:.0f} s; which process has ended, or which machine, is not known",
        "every rank to answer or to report",
        "Resume the run from its last checkpoint, and look at the network and at those machines",
    )


def _count(actor: str) -> int | None:
    """Number of the newest report; None where there is none, or the control service is silent."""
    with suppress(Exception):
        report = read_report(actor)
        return report.count if report else None
    return None
