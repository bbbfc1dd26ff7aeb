"""Trials of a sweep and what came of them, kept in trials.json as they go.

    Tune's events -> book -> trials.json -> results, page; `--resume` reads it again

One process writes the book: the sweep's own.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cluster.storage import read_json, write_json
from pipelines.run.ranking import Contender

TrialState = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of one point and what came of it.

    Attributes:
        settings: Values by dotted key.
        figures: Figures of its latest validation; empty before the first.
        seconds: Training time of the trial.
        run_folder: Its run folder.
        error: What went wrong, or an empty string.
        intervals: 95 % intervals of the figures.
        influences: Influence of each clip on the figures that rank.
        name: Its name, unique in the sweep.
        seed: Seed of the run.
        state: `stopped`: ended by the scheduler before its last iteration.
        iteration: Updates behind the figures.
        curve: (iteration, figures that are searched) of every validation.
    """

    settings: Mapping[str, Any]
    figures: Mapping[str, float]
    seconds: float
    run_folder: str
    error: str
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    influences: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    name: str = ""
    seed: int = 0
    state: TrialState = "done"
    iteration: int = 0
    curve: tuple[tuple[int, Mapping[str, float]], ...] = ()

    def contender(self, score: str) -> Contender:
        """Entry of the ranking."""
        return Contender.of_validation(f"({self.in_words})", asdict(self), score)

    @property
    def in_words(self) -> str:
        """Settings of the trial as `key=value`, for a line of progress."""
        return settings_in_words(self.settings)

    def to_json(self) -> dict[str, Any]:
        """As trials.json holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Trial":
        """From trials.json."""
        curve = tuple((iteration, figures) for iteration, figures in stored["curve"])
        intervals = {name: (low, high) for name, (low, high) in stored["intervals"].items()}
        influences = {name: tuple(values) for name, values in stored["influences"].items()}
        taken = {"curve": curve, "intervals": intervals, "influences": influences}
        return cls(**{**stored, **taken})


def settings_in_words(settings: Mapping[str, Any]) -> str:
    """Settings as a reader wants them: numbers with four digits."""
    return ", ".join(f"{key}={value_in_words(value)}" for key, value in settings.items())


def value_in_words(value: Any) -> str:  # noqa: ANN401 - any YAML
    """One value: a number with four digits, a word without quotes."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class TrialBook:
    """Every trial of a sweep, by name, in the order in which they began.

    Args:
        path: The file that holds them; read where it exists.
        on_written: Called when the file has been written: what Tune knows of a trial must not be
            kept before.
    """

    def __init__(self, path: Path, on_written: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._on_written = on_written
        stored = read_json(str(path))["trials"] if path.exists() else []
        self._trials = {each["name"]: Trial.from_json(each) for each in stored}

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials, in the order in which they began."""
        return tuple(self._trials.values())

    @property
    def num_ended(self) -> int:
        """Trials that are over."""
        return sum(trial.state != "running" for trial in self.trials)

    def begin(self, trial: Trial) -> None:
        """Adds a trial, or takes it up again with what it has reported before."""
        known = self._trials.get(trial.name)
        self._put(trial if known is None else replace(known, state="running", error=""))

    def report(self, name: str, result: Mapping[str, Any]) -> None:
        """Takes in a validation.

        Args:
            name: The trial.
            result: What `pipelines.sweeping.trial` reports.
        """
        trial, iteration = self._trials[name], result["iteration"]
        before = tuple(point for point in trial.curve if point[0] < iteration)
        self._put(
            replace(
                trial,
                # PB2 changes settings on the way.
                settings=result["settings"],
                figures=result["figures"],
                intervals=result["intervals"],
                influences=result["influences"],
                iteration=iteration,
                seconds=result["seconds"],
                run_folder=result["run_folder"],
                curve=(*before, (iteration, result["searched"])),
            )
        )

    def end(self, name: str, state: TrialState, error: str = "") -> None:
        """Records how a trial ended, with its error where it failed."""
        self._put(replace(self._trials[name], state=state, error=error))

    def keep(self, names: Collection[str], note: Callable[[str], None]) -> None:
        """Forgets all other trials, which Tune had begun and does not know after a restore.

        Args:
            names: Of the trials that Tune knows.
            note: Called with a sentence on each forgotten trial.
        """
        forgotten = [trial for name, trial in self._trials.items() if name not in names]
        self._trials = {name: trial for name, trial in self._trials.items() if name in names}
        self.write()
        for lost in forgotten:
            note(
                f"{lost.name}: began just before the sweep was killed, and Ray Tune does not know "
                f"it; not counted, and another trial ran in its place. Its folder may be deleted: "
                f"{lost.run_folder}"
            )

    def _put(self, trial: Trial) -> None:
        self._trials[trial.name] = trial
        self.write()

    def write(self) -> None:
        """Writes all trials to `trials.json`, whole."""
        write_json(str(self._path), {"trials": [each.to_json() for each in self.trials]})
        self._on_written()
