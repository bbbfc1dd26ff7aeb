"""Everything that a run folder says about its run, and what it does not say.

A run that was stopped, or is still going, has only some of its files, and a crash may have torn
one. Whatever is missing or cannot be read becomes a sentence on the page; the rest is shown.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cluster.logs import is_number
from pipelines.config.yaml_text import read_yaml
from pipelines.evaluation.run import EVALUATION_FILE
from pipelines.run.folder import RunFolder
from pipelines.run.outputs import file_inside
from sgmd_core.errors import CheckpointError

T = TypeVar("T")

_MAX_LINES_NAMED = 5


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a log.

    Attributes:
        iteration: Updates of the generator made before it (metrics) or by then (all others).
        groups: Its named groups of numbers, such as `losses`; numbers of no group are in "".
        texts: What it says in words.
    """

    iteration: int
    groups: Mapping[str, Mapping[str, float]]
    texts: Mapping[str, str]

    def number(self, name: str, group: str = "") -> float:
        """A number, or NaN where the line has none of that name."""
        return self.groups.get(group, {}).get(name, math.nan)


@dataclass(frozen=True, slots=True)
class RunRecords:
    """Content of a run folder.

    Attributes:
        folder: The run's folder.
        config_text: config.yaml as it is; empty where there is none.
        config: The same, read; a nested dict.
        metrics: Lines of metrics.jsonl, one an iteration, in order.
        validations: Lines of validation.jsonl, in order.
        alarms: Lines of alarms.jsonl, in order.
        events: Lines of events.jsonl, in order: failures, and what was done about them.
        alarms_recorded: Whether there is such a file: none raised is not the same as none kept.
        ranking: ranking.json, where checkpoints are ranked; empty where not.
        summary: summary.json, written at the end of a run; empty before.
        evaluation: evaluation.json, written by `sgmd evaluate`; empty before.
        notes: What is missing or cannot be read, as sentences.
        broken: Those of what is there and cannot be read, in whole or in part.
        unreadable: Names of the files of which nothing can be read.
    """

    folder: RunFolder
    config_text: str
    config: Mapping[str, Any]
    metrics: Sequence[Line]
    validations: Sequence[Line]
    alarms: Sequence[Line]
    events: Sequence[Mapping[str, Any]]
    alarms_recorded: bool
    ranking: Mapping[str, Any]
    summary: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    notes: Sequence[str]
    broken: Sequence[str] = ()
    unreadable: Sequence[str] = ()

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.config.get("name", self.folder.root.name))

    @property
    def num_iterations(self) -> int:
        """Iterations recorded."""
        return len(self.metrics)

    @property
    def is_empty(self) -> bool:
        """True where there is nothing to show yet, and nothing is lost."""
        return not (self.metrics or self.evaluation or self.unreadable)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all recorded iterations."""
        return sum(finite([line.number("total", "seconds") for line in self.metrics]))

    def setting(self, *path: str) -> Any:  # noqa: ANN401 - whatever the recipe holds there
        """A setting of the configuration, or None."""
        found: Any = self.config
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found


def read_run(run_folder: str | Path) -> RunRecords:
    """Reads all that is there; links that lead out of the folder are not followed.

    Raises:
        CheckpointError: Nothing in the folder looks like a run's.
    """
    folder = RunFolder(run_folder)
    evaluation = folder.root / EVALUATION_FILE
    if not any(path.exists() for path in (folder.config, folder.metrics, evaluation)):
        raise CheckpointError(
            f"reading the run {folder}",
            "neither config.yaml nor metrics.jsonl nor evaluation.json there"
            + ("" if folder.root.is_dir() else ", and no such folder"),
            "the folder of a run",
            "Check the path; a run's folder is OUTPUT/NAME",
        )
    faults = _Faults()
    text = _text(folder.config, faults)
    config = _document(folder.config, read_yaml, faults)
    metrics = _lines(folder.metrics, faults)
    summary = _document(folder.summary, json.loads, faults)
    found = _document(evaluation, json.loads, faults)
    if not metrics and folder.metrics.name not in faults.files:
        _lose_metrics(folder, faults)
    missing = _missing(folder, evaluation, config.get("iterations"), len(metrics))
    validations, alarms = _lines(folder.validation, faults), _lines(folder.alarms, faults)
    ranking = _document(folder.ranking, json.loads, faults)
    return RunRecords(
        folder=folder,
        config_text=text,
        config=config,
        metrics=metrics,
        validations=validations,
        alarms=alarms,
        events=_entries(folder.events, faults, _event),
        alarms_recorded=(folder.alarms).exists(),
        ranking=ranking,
        summary=summary,
        evaluation=found,
        notes=[*faults.sentences, *missing],
        broken=tuple(faults.sentences),
        unreadable=tuple(faults.files),
    )


@dataclass(slots=True)
class _Faults:
    """Faults of the files of a run: one sentence each, and the files that are lost whole."""

    sentences: list[str] = field(default_factory=list)
    files: dict[str, None] = field(default_factory=dict)

    def lose(self, path: Path, sentence: str) -> None:
        """Adds a file of which nothing can be read."""
        self.sentences.append(sentence)
        self.files[path.name] = None


def _lose_metrics(folder: RunFolder, faults: _Faults) -> None:
    """Counts an empty or missing log as lost where the run has left signs of its iterations.

    A run that has only been started has no line yet, and lacks nothing.
    """
    signs = [
        f"{path.name}/" if path.is_dir() else path.name
        for path in (folder.summary, folder.validation, folder.checkpoints)
        if (any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size)
    ]
    if signs:
        state = "has no iteration" if folder.metrics.exists() else "is not there"
        faults.lose(
            folder.metrics,
            f"{folder.metrics.name} {state}, but {' and '.join(signs)} come from iterations that "
            "were made: restore it from a copy.",
        )


def numbers(entry: object) -> dict[str, float]:
    """The numbers of a JSON object by name; whatever else it holds is left out."""
    if not isinstance(entry, Mapping):
        return {}
    return {str(name): float(value) for name, value in entry.items() if is_number(value)}


def finite(values: Sequence[float]) -> list[float]:
    """The values that are neither NaN nor infinite, in order."""
    return [value for value in values if math.isfinite(value)]


def _missing(
    folder: RunFolder, evaluation: Path, num_planned: object, num_iterations: int
) -> list[str]:
    found: list[str] = []
    if not folder.config.exists():
        found.append("config.yaml is not there: the settings are not known.")
    if not num_iterations:
        found.append("No iteration has been finished: there are no curves to show.")
    elif isinstance(num_planned, int) and num_iterations < num_planned:
        found.append(
            f"The run is at iteration {num_iterations} of {num_planned}; go on with it by --resume."
        )
    if not folder.summary.exists():
        found.append("summary.json is not there: the run has not come to its end.")
    if not evaluation.exists():
        found.append(
            "evaluation.json is not there: `sgmd evaluate` compares the generator with its teacher."
        )
    return found


def _text(path: Path, faults: _Faults) -> str:
    """A file's text, empty where it is not there; bytes that are not text are replaced."""
    if not path.exists():
        return ""
    inside = file_inside(path.parent, path.name)
    if inside is None:
        faults.lose(path, f"{path.name} is left out: it is not a file inside the run's folder.")
        return ""
    try:
        return inside.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        faults.lose(path, f"{path.name} cannot be read: {error}.")
        return ""


def _document(path: Path, read: Callable[[str], Any], faults: _Faults) -> dict[str, Any]:
    """One object, or nothing and a note."""
    text = _text(path, faults)
    if not text.strip():
        if path.exists() and path.name not in faults.files:
            faults.lose(path, f"{path.name} is empty.")
        return {}
    try:
        content = read(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        faults.lose(path, f"{path.name} cannot be read: {str(error).splitlines()[0]}.")
        return {}
    if not isinstance(content, Mapping):
        faults.lose(path, f"{path.name} cannot be read: it holds no names and values.")
        return {}
    return dict(content)


def _lines(path: Path, faults: _Faults) -> list[Line]:
    """All lines that can be read, one an iteration; the others are counted in a note.

    Where a resumed run has written an iteration again, the later line counts.
    """
    found = _entries(path, faults, _line)
    if path.name != RunFolder(path.parent).alarms.name:
        found = list({line.iteration: line for line in found}.values())
    return sorted(found, key=lambda line: line.iteration)


def _entries(path: Path, faults: _Faults, read: Callable[[str], T | None]) -> list[T]:
    """All lines that can be read; the others are counted in a note."""
    found: list[T] = []
    wrong: list[int] = []
    for number, text in enumerate(_text(path, faults).split("\n"), start=1):
        if text.strip():
            line = read(text)
            if line is None:
                wrong.append(number)
            else:
                found.append(line)
    if wrong:
        which = ", ".join(map(str, wrong[:_MAX_LINES_NAMED]))
        more = " and others" if len(wrong) > _MAX_LINES_NAMED else ""
        noun = "line" if len(wrong) == 1 else "lines"
        summary = f"{path.name}: {len(wrong)} {noun} left out, torn or wrong ({which}{more})."
        if found:
            faults.sentences.append(summary)
        else:
            faults.lose(path, summary)
    return found


def _event(text: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_whole = isinstance(entry, dict) and {"time", "kind", "cause"} <= entry.keys()
    return entry if is_whole else None


def _line(text: str) -> Line | None:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, Mapping) or not isinstance(entry.get("iteration"), int):
        return None
    groups = {name: numbers(value) for name, value in entry.items() if isinstance(value, Mapping)}
    texts = {name: value for name, value in entry.items() if isinstance(value, str)}
    return Line(entry["iteration"], {**groups, "": numbers(entry)}, texts)
