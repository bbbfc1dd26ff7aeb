"""A step of the check: what it is given, and the JSON that it writes while it runs."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Context:
    """Input of a step.

    Attributes:
        name: Of the step.
        folder: Where every step's JSON is.
        device: `cuda` or `cpu`.
        small: Sizes that a CPU runs in seconds.
        model: Key of `cases.SHAPES`.
        results: What has been found so far.
    """

    name: str
    folder: Path
    device: str
    small: bool
    model: str
    results: dict[str, Any] = field(default_factory=dict)

    def record(self, **figures: Any) -> None:  # noqa: ANN401  (whatever JSON holds)
        """Writes figures down at once: a step that is stopped keeps what it has found."""
        self.results |= figures
        write(self.folder, self.name, {"status": "running", "results": self.results})

    def of(self, step: str) -> dict[str, Any]:
        """Returns the results of another step; empty where it has not run."""
        return read(self.folder, step).get("results", {})


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    Attributes:
        name: Of its JSON.
        about: What it shows.
        budget_s: Seconds after which it is stopped.
        needs: Groups of packages; see `wheels.GROUPS`.
        run: Does it.
    """

    name: str
    about: str
    budget_s: float
    needs: tuple[str, ...]
    run: Callable[[Context], None]


def read(folder: Path, step: str) -> dict[str, Any]:
    """A step's JSON; empty where there is none that can be read."""
    try:
        return json.loads((folder / f"{step}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write(folder: Path, step: str, document: dict[str, Any]) -> None:
    """Replaces a step's JSON whole; with the standard library alone, which is all that is sure."""
    draft = folder / f".{step}.draft"
    draft.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    draft.replace(folder / f"{step}.json")
