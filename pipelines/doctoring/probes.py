"""Probes of a cluster: one process a machine, asked together and answered for one by one."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from cluster.ray.group import RayWorkerGroup
from cluster.ray.shortage import Machine
from cluster.worker_group import Future
from pipelines.doctoring.findings import Finding, Status
from pipelines.doctoring.probe import MachineProbe

R = TypeVar("R")

_DEAD_REMEDY = (
    "Look into /tmp/ray/session_latest/logs there. A machine without our sources or dependencies "
    "needs them: install sgmd on it, or run this as a job, which takes the sources along"
)


class Probes:
    """The probes that answer; one that fails to start is left out afterwards.

    Args:
        group: A rank on each machine.
        machines: The machines, in the order of the ranks.
    """

    def __init__(self, group: RayWorkerGroup[MachineProbe], machines: Sequence[Machine]) -> None:
        self.group = group
        self.machines = {rank: machine for rank, machine in enumerate(machines)}

    def ask(
        self,
        call: Callable[[int], Future[R]],
        timeout_s: float,
        name: str,
        remedy: str,
        ranks: Sequence[int] | None = None,
    ) -> tuple[dict[int, R], list[Finding]]:
        """Asks machines the same, all at once.

        Args:
            call: Asks one rank.
            timeout_s: How long all of them together may take.
            name: Name of the check, for the findings about those that fail.
            remedy: What to do about a failure.
            ranks: Which; None: all that answer.

        Returns:
            (answers by rank, a finding for each machine without one).
        """
        asked = {rank: call(rank) for rank in (self.machines if ranks is None else ranks)}
        end_s = time.monotonic() + timeout_s
        answers: dict[int, R] = {}
        failures: list[Finding] = []
        for rank, future in asked.items():
            left_s = max(0.1, end_s - time.monotonic())
            try:
                (answers[rank],) = self.group.fetch([future], left_s, f"checking {name}")
            # Whatever it is that a machine fails with, it is what is to be reported.
            except Exception as error:
                found = getattr(error, "found", "") or f"{type(error).__name__}: {error}"
                machine = self.machines[rank].name
                failures.append(Finding(name, Status.MISSING, found, remedy, machine))
        return answers, failures

    def start(self, timeout_s: float) -> list[Finding]:
        """Waits for the probes and leaves those out that do not come up."""
        answers, failures = self.ask(
            lambda rank: self.group.call_rank(rank, MachineProbe.time_of_day),
            timeout_s,
            "probe",
            _DEAD_REMEDY,
        )
        self.machines = {rank: self.machines[rank] for rank in answers}
        return failures

    def by_name(self, answers: Mapping[int, R]) -> dict[str, R]:
        """Answers by the machine's name."""
        return {self.machines[rank].name: answer for rank, answer in answers.items()}
