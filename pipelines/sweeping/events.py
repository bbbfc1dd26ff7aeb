"""Tune's events: written into the log of trials, and passed to observers."""

import json
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ray import tune

from cluster.errors import StorageError
from cluster.stores import opened_store
from pipelines.run.observer import RunObserver
from pipelines.run.stopping import StopNow, StopRequests
from pipelines.sweeping.trial import ERROR_FILE, CommonToTrials
from pipelines.sweeping.trials import Trial, TrialBook, settings_in_words

OnProgress = Callable[[str, int, int], None]
"""Called with the thing that is counted, the number done, and the number of all."""
OnTrials = Callable[[Sequence[Trial], int], None]
"""Called with all trials so far, and the number that there will be."""

_RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)(\(.*\))?(: |$)")
_TAKEN_BY_TUNE = (signal.SIGINT, signal.SIGUSR1)
_PRESENT: list["TrialEvents"] = []


class SearchEnding:
    """Ends a search of Tune's once a stop was asked for, by whichever signal.

    Tune takes SIGINT and SIGUSR1 when a search begins, and does not tell which of them has come. So
    they are taken back, and Tune's own answer to them is called: it ends the search after its
    present step, with all that it knows written down. A Tune that takes no signals has no such
    answer: the search is broken off, and what Tune has written down before is what it knows.

    Args:
        stops: Has the signals; in another than the main thread neither it nor Tune takes any.
    """

    def __init__(self, stops: StopRequests) -> None:
        self._stops = stops
        is_main = threading.current_thread() is threading.main_thread()
        self._before = {each: signal.getsignal(each) for each in _TAKEN_BY_TUNE if is_main}
        self._answer: Callable[[int, FrameType | None], Any] | None = None
        self._is_told = False

    def take_back(self) -> None:
        """Gives the signals back to those who had them before the search."""
        for number, before in self._before.items():
            found = signal.getsignal(number)
            if found != before:
                self._answer = found if callable(found) else None
                signal.signal(number, before)

    def end_if_asked(self) -> None:
        """Tells Tune of a stop that was asked for.

        Raises:
            StopNow: Tune cannot be told.
        """
        if not self._stops.received or self._is_told:
            return
        if self._answer is None:
            raise StopNow
        self._is_told = True
        self._answer(signal.SIGUSR1, None)


class TrialEvents(tune.Callback):
    """Receives the callbacks of Tune.

    Args:
        sweep: What all trials have in common.
        book: Trials and what came of them.
        total: Trials that there will be.
        observer: Receives a note when a trial ends.
        on_progress: Called with the number of trials that have ended.
        on_trials: Called with every change.
    """

    def __init__(
        self,
        sweep: CommonToTrials,
        book: TrialBook,
        total: int,
        observer: RunObserver,
        on_progress: OnProgress,
        on_trials: OnTrials,
    ) -> None:
        self._sweep = sweep
        self._book = book
        self._total = total
        self._observer = observer
        self._on_progress = on_progress
        self._on_trials = on_trials
        self._ending: SearchEnding | None = None
        _PRESENT[:] = [self]

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        # Tune writes its callbacks down for a later restore, and a console cannot be written down:
        # what is restored is the one that listens by then.
        return _present_events, ()

    @contextmanager
    def ending_on(self, stops: StopRequests) -> Iterator[None]:
        """Ends a search of Tune's inside once a stop was asked for.

        Args:
            stops: Has the signals.

        Raises:
            StopNow: A stop was asked for, and Tune cannot be told so.
        """
        self._ending = SearchEnding(stops)
        try:
            yield
        finally:
            self._ending.take_back()
            self._ending = None

    def setup(
        self,
        stop: Any = None,  # noqa: ANN401 - Tune's interface
        num_samples: int | None = None,
        total_num_samples: int | None = None,
        **info: Any,  # noqa: ANN401
    ) -> None:
        """Takes back the signals that Tune has taken by now."""
        if self._ending is not None:
            self._ending.take_back()
            self._ending.end_if_asked()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ANN401 - Tune's interface
        """Ends the search if a stop was asked for."""
        if self._ending is not None:
            self._ending.end_if_asked()

    def note(self, text: str) -> None:
        """Says one line."""
        self._observer.note(text)

    def tell(self) -> None:
        """Tells how far the sweep is."""
        self._on_progress("trials", self._book.num_ended, self._total)
        self._on_trials(self._book.trials, self._total)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401 - Tune's interface
        """Opens a row."""
        settings, seed = self._sweep.run_of(trial.config)
        folder = self._folder(trial)
        self._book.begin(
            Trial(settings, {}, 0.0, folder, "", name=str(trial), seed=seed, state="running")
        )
        self.tell()

    def on_trial_result(  # noqa: D102 - Tune's interface
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,  # noqa: ANN401
        result: dict[str, Any],
        **info: Any,  # noqa: ANN401
    ) -> None:
        # Tune adds a last result of its own, without figures, when a function ends.
        if "figures" in result and "iteration" in result:
            self._book.report(str(trial), result)
            self.tell()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401 - Tune's interface
        """Closes a row: its trial came to its end, or the scheduler has ended it."""
        row = next(each for each in self._book.trials if each.name == str(trial))
        is_whole = row.iteration >= self._sweep.config.sweep.iterations
        score = self._sweep.config.sweep.score
        value = row.figures.get(score)
        if is_whole and (value is None or not math.isfinite(value)):
            found = f"no {score}" if value is None else f"{score} {value}"
            self._book.end(str(trial), "failed", f"its validation has {found}")
            self._end(trial, f"failed, {found},")
            return
        self._book.end(str(trial), "done" if is_whole else "stopped")
        self._end(trial, "done" if is_whole else f"stopped at iteration {row.iteration}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401 - Tune's interface
        """Closes a row with the error of its trial."""
        row = next((each for each in self._book.trials if each.name == str(trial)), None)
        if row is None:
            self.on_trial_start(iteration, trials, trial)
            row = next(each for each in self._book.trials if each.name == str(trial))
        self._book.end(str(trial), "failed", self._error_of(trial, row))
        self._end(trial, "failed")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401 - Tune's interface
        """Says that a trial starts again, unless it will say again what it failed with."""
        if not self._written_error(str(trial)):
            self._observer.warning(f"{trial}: its process was lost; it goes on from its own state")

    def _error_of(self, trial: Any, row: Trial) -> str:  # noqa: ANN401 - Tune's own
        if written := self._written_error(row.name):
            return written
        error = trial.get_pickled_error() or trial.get_error()
        return "unknown error" if error is None else trial_error(error)

    def _folder(self, trial: Any) -> str:  # noqa: ANN401 - Tune's own
        return f"{self._sweep.config.output}/{trial}"

    def _written_error(self, name: str) -> str:
        """Error in the newest folder of a trial, its own or one it has branched to; or nothing."""
        output = self._sweep.config.output
        try:
            with opened_store(output, f"looking for errors in {output}") as (files, root):
                found = sorted(files.glob(f"{root}/{name}*/{ERROR_FILE}"))
                return str(json.loads(files.cat_file(found[-1]))["error"]) if found else ""
        except StorageError as error:
            self._observer.warning(str(error))
            return ""

    def _end(self, trial: Any, how: str) -> None:  # noqa: ANN401 - Tune's own
        settings, _ = self._sweep.run_of(trial.config)
        self._observer.note(f"{trial}: {how} with {settings_in_words(settings)}")
        self.tell()


def _present_events() -> TrialEvents:
    return _PRESENT[0]


def trial_error(error: Exception) -> str:
    """The error of a trial in a line, without the traceback that Ray puts around it.

    Ray's text is a traceback whose last unindented line of the form `Type: words` is the error;
    notes, which an error takes along, follow it and do not say what it was.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {cause}".partition("\n")[0]
    lines = str(error).strip().splitlines()
    raised = [line for line in lines if _RAISED.match(line)]
    kind, colon, words = (raised or lines or ["unknown error"])[-1].strip().partition(": ")
    return (kind.rpartition(".")[2] if raised else kind) + colon + words
