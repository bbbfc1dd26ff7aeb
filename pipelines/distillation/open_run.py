"""A run whose roles are started: what the loop and a repair both work on."""

from dataclasses import dataclass

from cluster.checkpoints import Checkpoints
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.groups import Groups
from pipelines.distillation.preflight import Preflight
from pipelines.run.data_log import DataLog
from pipelines.run.events import EventLog
from pipelines.run.folder import RunFolder
from pipelines.run.observer import RunObserver


@dataclass(frozen=True)
class OpenRun:
    """A run whose roles are started.

    Attributes:
        config: Its settings.
        checked: Result of the checks before it.
        groups: The roles, the caption feed and the validator; lost processes are replaced in place.
        folder: Where it is recorded.
        data: Log of the data that it has used.
        checkpoints: Its committed states.
        events: Log of its failures and repairs.
    """

    config: DistillConfig
    checked: Preflight
    groups: Groups
    folder: RunFolder
    data: DataLog
    checkpoints: Checkpoints
    events: EventLog

    @property
    def observer(self) -> RunObserver:
        """Receives what happens in the run."""
        return self.events.observer
