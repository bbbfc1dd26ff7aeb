"""Ends of a run before its last iteration: by an alarm or by a stop, with its state saved."""

from contextlib import suppress
from dataclasses import dataclass

from cluster.errors import ClusterError, StorageError
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.exports import Exports
from pipelines.distillation.position import Position
from pipelines.distillation.states import States
from pipelines.run.alarms import Alarm
from pipelines.run.events import EventLog
from pipelines.run.folder import RunFolder
from pipelines.run.records import RunEvent
from pipelines.run.stopping import StopRequests
from sgmd_core.errors import AlarmError, StopRequestedError


@dataclass(frozen=True)
class Endings:
    """Saves what there is to save, and words the error that ends the run.

    Attributes:
        config: The run's settings.
        folder: The run.
        states: Its states.
        exports: Its generators' folders.
        events: Receives the event.
    """

    config: DistillConfig
    folder: RunFolder
    states: States
    exports: Exports
    events: EventLog

    def alarm(self, alarm: Alarm, position: Position) -> AlarmError:
        """Saves the state at which an alarm ends the run."""
        try:
            self.states.save_if_newer(position)
            state = f"The state is {self.states.folder(position)}"
        except Exception as error:
            # The alarm is the cause, and what it is about may have broken the weights.
            state = f"Saving the state failed: {error} {self.states.last_good()}"
        error = AlarmError(
            f"training {self.config.name}",
            alarm.in_words(),
            f"none of the alarms in alarms.stop ({', '.join(self.config.alarms.stop)})",
            f"{state}; change the settings, or continue nevertheless with --resume {self.folder}",
        )
        error.add_note(self._best())
        return error

    def stopped(self, stops: StopRequests, position: Position) -> StopRequestedError:
        """Saves the state at which a stop ends the run, between two iterations."""
        self.states.save_if_newer(position)
        self._record(stops, f"saved {self.states.folder(position)}", position)
        error = stops.error(
            f"training {self.config.name}",
            f"the state is {self.states.folder(position)}",
            f"Go on with --resume {self.folder}",
        )
        error.add_note(self._best())
        return error

    def gave_up(
        self, stops: StopRequests, position: Position, *, is_in_step: bool
    ) -> StopRequestedError:
        """Saves the state before an iteration that took longer than a stop waits for it.

        Args:
            stops: With the signal.
            position: Where the run stood before.
            is_in_step: Whether the roles may still stand there.
        """
        limit_s = self.config.checkpoint.stop_after_s
        saved = self.states.save_given_up(position, limit_s) if is_in_step else ""
        self._record(stops, f"gave up iteration {position.iteration}", position)
        return stops.error(
            f"training {self.config.name}",
            f"iteration {position.iteration} took longer than checkpoint.stop_after_s "
            f"({limit_s:g} s) and was given up. {saved}{self.states.last_good()}",
            f"Go on with --resume {self.folder}",
        )

    def lost(self, stops: StopRequests, error: ClusterError) -> StopRequestedError:
        """Words a stop whose signal, or whoever sent it, has ended processes of the run too."""
        return stops.error(
            f"training {self.config.name}",
            f"processes of the run ended before its state was saved ({error.found}). "
            f"{self.states.last_good()}",
            f"Go on with --resume {self.folder}",
        )

    def while_repairing(self, stops: StopRequests) -> StopRequestedError:
        """Words a stop that came while lost processes were replaced; keeps what is being saved."""
        return stops.error(
            f"repairing {self.config.name}",
            f"no iteration was under way. {self.states.last_good()}",
            f"Go on with --resume {self.folder}",
        )

    def while_finishing(self, stops: StopRequests) -> StopRequestedError:
        """Waits for the last state alone; the rest is made when the run is resumed."""
        return stops.error(
            f"finishing {self.config.name}",
            f"its training is complete. {self.states.last_good()}",
            f"--resume {self.folder} writes the missing results, and does not train",
        )

    def _best(self) -> str:
        """Writes the best generator, and says which it is, or why it was not written."""
        try:
            return self.exports.export_best()
        except Exception as error:
            # The state is saved, and what ends the run is the error to raise.
            return f"The best generator was not written: {error}"

    def _record(self, stops: StopRequests, action: str, position: Position) -> None:
        cause = f"{stops.received} asked for a stop"
        # What is saved counts, and must be reported even if this cannot be written.
        with suppress(StorageError):
            self.events.add(
                RunEvent(kind="stopped", cause=cause, action=action, iteration=position.iteration)
            )


def stopped_early(stops: StopRequests, config: DistillConfig, root: str) -> StopRequestedError:
    """The error of a run that was stopped while its roles were started, or started again."""
    return stops.error(
        f"starting the roles of {config.name}",
        "no iteration was under way, and what was saved before is kept",
        f"Go on with --resume {root}",
    )
