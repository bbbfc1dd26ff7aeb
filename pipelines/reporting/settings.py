"""Settings and versions: of one run as a list, of several as what differs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.dotted import dotted_items
from pipelines.reporting.records import RunRecords

ABSENT = "–"
# What a run is called and where it is kept says nothing about how it was made.
_NAMES_ONLY = ("name", "output")


@dataclass(frozen=True, slots=True)
class Difference:
    """One setting and its value in every run."""

    name: str
    values: tuple[str, ...]


def facts(run: RunRecords) -> dict[str, str]:
    """Returns the origin of a run's figures: its folder, seed, digests and versions."""
    summary = run.summary
    evaluation = run.evaluation
    versions = summary.get("versions") or evaluation.get("versions")
    found: dict[str, Any] = {
        "run folder": run.folder.root,
        "seed": summary.get("seed", run.config.get("seed")),
        "configuration": summary.get("config_digest"),
        "revision": summary.get("git_revision"),
        "teacher": evaluation.get("teacher") or run.setting("model", "folder"),
        "measured on": evaluation.get("device"),
        **(versions if isinstance(versions, Mapping) else {}),
    }
    return {name: str(value) for name, value in found.items() if value not in (None, "")}


def differing_settings(runs: Sequence[RunRecords]) -> list[Difference]:
    """Settings of the configurations that are not the same in all runs."""
    return _differing([flat(run.config) for run in runs])


def differing_facts(runs: Sequence[RunRecords]) -> list[Difference]:
    """Versions, revisions and the like that are not the same in all runs."""
    return _differing([facts(run) for run in runs])


def flat(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings by their dotted names, as overrides call them."""
    return {
        name: str(value)
        for name, value in dotted_items(settings)
        if name not in _NAMES_ONLY and value != {}
    }


def _differing(found: Sequence[Mapping[str, str]]) -> list[Difference]:
    names = dict.fromkeys(name for entries in found for name in entries)
    rows = [
        Difference(name, tuple(entries.get(name, ABSENT) for entries in found)) for name in names
    ]
    return [row for row in rows if len(set(row.values)) > 1]
