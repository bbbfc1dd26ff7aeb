"""Watch over the processes of a run: events and stacks of what is frozen or stuck."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cluster.said import Said
from cluster.worker_group import WorkerGroup
from pipelines.config.topology import TopologySettings
from pipelines.run.events import EventLog
from pipelines.run.folder import RunFolder
from pipelines.run.records import RunEvent

# Ray is imported where it starts: mode `local` runs on machines that do not have it.
if TYPE_CHECKING:
    from cluster.ray.deaths import FrozenProcess
    from cluster.ray.watch_rules import WatchLimits

_WAIT_FOR_STORAGE = frozenset({"feed"})
_VALIDATOR = "validator"
_SHARE_OF_TIMEOUT = 0.8
"""Share of `call_timeout_s` and `start_timeout_s` after which the watch ends a process.

The controller itself gives up after all of it, with an error that is not repaired.
"""


def watch_limits(settings: TopologySettings, validation_s: float) -> "WatchLimits":
    """Returns the limits of the watch over a run.

    Args:
        settings: Limits of the recipe.
        validation_s: Limit of a validation.
    """
    from cluster.ray.watch_rules import WatchLimits

    return WatchLimits(
        settings.watch_s,
        _SHARE_OF_TIMEOUT * settings.call_timeout_s,
        _SHARE_OF_TIMEOUT * settings.start_timeout_s,
        _WAIT_FOR_STORAGE,
        {_VALIDATOR: validation_s},
    )


@contextmanager
def watch_groups(
    groups: Sequence[WorkerGroup[Any]],
    settings: TopologySettings,
    validation_s: float,
    folder: RunFolder,
    events: EventLog,
) -> Iterator[None]:
    """Watches every process of some groups; does nothing without Ray or with `watch_s: 0`.

    Args:
        groups: All groups of the run.
        settings: Limits.
        validation_s: Limit of a validation.
        folder: Stacks are written to its `stacks/`.
        events: Receives an event for each process and machine that is ended; its observer, what
            processes log.
    """
    if settings.mode == "local" or not settings.watch_s:
        yield
        return
    from cluster.ray.group import RayWorkerGroup
    from cluster.ray.watch import watch_processes

    limits = watch_limits(settings, validation_s)
    found = [group for group in groups if isinstance(group, RayWorkerGroup)]

    def process(frozen: "FrozenProcess") -> None:
        stacks = f"Its stack is in {frozen.dump}; it was ended" if frozen.dump else "It was ended"
        events.add(
            RunEvent(
                kind="worker_frozen",
                cause=frozen.cause,
                action=stacks,
                role=frozen.group,
                rank=frozen.rank,
                node=frozen.report.address,
                iteration=frozen.report.iteration,
                last_lines=frozen.last_lines,
            )
        )

    def machine(address: str, cause: str, workers: Sequence[str]) -> None:
        there = f"{cause}; it has {', '.join(workers)}" if workers else cause
        action = "The raylet was ended, and the machine counts as lost"
        events.add(
            RunEvent(kind="worker_frozen", cause=there, action=action, role="raylet", node=address)
        )

    def said(line: Said) -> None:
        events.observer.said(line)

    with watch_processes(lambda: found, limits, folder.stacks, process, machine, said):
        yield
