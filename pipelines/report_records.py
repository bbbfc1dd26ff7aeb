"""Everything that a run folder says about its run, and what it does not say (yet).

A run that was stopped, or is still going, has only some of its files. Each one that is missing is
a fact to show, not an error; one that is there and cannot be read is an error.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pipelines.evaluate import EVALUATION_FILE
from pipelines.evaluation import Evaluation
from pipelines.overrides import read_yaml
from pipelines.run_folder import RunFolder, read_jsonl
from sgmd_core.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunRecords:
    """What was found in a run folder.

    Attributes:
        folder: The run's folder.
        config_text: config.yaml as it is.
        config: The same, read; a nested dict.
        metrics: Lines of metrics.jsonl, one an iteration.
        validations: Lines of validation.jsonl.
        summary: summary.json, written at the end of a run; empty before.
        evaluation: evaluation.json, written by `sgmd evaluate`; None before.
    """

    folder: RunFolder
    config_text: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    summary: dict[str, Any]
    evaluation: Evaluation | None

    @property
    def name(self) -> str:
        """What the run is called."""
        return str(self.config.get("name", self.folder.root.name))

    @property
    def num_iterations(self) -> int:
        """Iterations recorded."""
        return len(self.metrics)

    @property
    def num_planned(self) -> int | None:
        """Iterations that the configuration asks for."""
        return self.config.get("iterations")

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all recorded iterations."""
        return sum(line["seconds"]["total"] for line in self.metrics)

    @property
    def notes(self) -> list[str]:
        """What is missing, as sentences."""
        found: list[str] = []
        if not self.metrics:
            found.append("metrics.jsonl has no iteration: there are no curves to show.")
        elif self.num_planned and self.num_iterations < self.num_planned:
            found.append(
                f"The run is at iteration {self.num_iterations} of {self.num_planned}; go on with "
                "it by --resume."
            )
        if not self.summary:
            found.append("summary.json is not there: the run has not come to its end.")
        if self.evaluation is None:
            found.append(
                "evaluation.json is not there: `sgmd evaluate` compares the generator with its "
                "teacher."
            )
        return found


def read_run(run_folder: str | Path) -> RunRecords:
    """Reads all that is there.

    Raises:
        CheckpointError: It is not a run folder, or one of its files cannot be read.
    """
    folder = RunFolder(run_folder)
    if not folder.config.exists():
        raise CheckpointError(
            f"reading the run {run_folder}", "no config.yaml there", "the folder of a run"
        )
    text = folder.config.read_text(encoding="utf-8")
    evaluation = folder.root / EVALUATION_FILE
    return RunRecords(
        folder=folder,
        config_text=text,
        config=_read(folder.config, lambda path: dict(read_yaml(path.read_text("utf-8")))),
        metrics=_read(folder.metrics, read_jsonl),
        validations=_read(folder.validation, read_jsonl),
        summary=_read(folder.summary, _read_json) if folder.summary.exists() else {},
        evaluation=Evaluation.load(evaluation) if evaluation.exists() else None,
    )


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _read(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"reading {path}",
            f"text that cannot be read ({str(error).splitlines()[0]})",
            "what the run has written",
            "Put the file right or remove it",
        ) from error
