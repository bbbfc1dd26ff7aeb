"""Summaries of a run and of a dry run for a reader: short, with the next step on top."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from pipelines.commands.output import pairs
from pipelines.config.figures import HEADLINE_FIGURES
from pipelines.reporting.names import duration, title
from workers.models.vocabulary import UnknownWords

_FIGURES_A_LINE = 2


def summary_words(summary: Mapping[str, Any]) -> list[RenderableType]:
    """A finished run for a reader; summary.json has all of it."""
    folder = summary["run_folder"]
    shown: list[RenderableType] = [
        f"{summary['name']}: {summary['iterations']} iterations in {duration(summary['seconds'])}, "
        f"{summary['samples_seen']} captions",
        *_next_steps(summary),
    ]
    figures = summary["validation"]
    named = [name for name in HEADLINE_FIGURES if name in figures]
    if named:
        table = Table(title="last validation", title_justify="left", box=None, show_header=False)
        for _ in range(_FIGURES_A_LINE):
            table.add_column(style="bold")
            table.add_column(justify="right")
        for line in range(0, len(named), _FIGURES_A_LINE):
            cells = [
                (title(name), f"{figures[name]:.3g}")
                for name in named[line : line + _FIGURES_A_LINE]
            ]
            table.add_row(*(cell for pair in cells for cell in pair))
        shown.append(table)
    shown.append(f"generator: {summary['generator']}")
    if summary["best"]:
        best = summary["best"][0]
        shown.append(f"the best one: {folder}/best, of iteration {best['iteration']}")
    if summary.get("ranking_note"):
        shown.append(str(summary["ranking_note"]))
    shown.append(f"everything else: {folder}/summary.json")
    shown += [Text(problem, style="bold red") for problem in _problems(summary)]
    return shown


def dry_run_words(result: Mapping[str, Any]) -> list[RenderableType]:
    """A dry run for a reader: what the run is, what was checked, and what was not."""
    facts = {
        name: value
        for name, value in result.items()
        if name not in ("unknown_words", "unfinished_sets", "checked", "not_checked", "objective")
    }
    if not result["held_out_captions"]:
        facts["held_out_captions"] = "not looked at: validation.every is 0"
    method = {"objective": result["objective"].get("method", "")}
    shown: list[RenderableType] = [pairs(facts | method)]
    for heading, key in (("checked", "checked"), ("not checked", "not_checked")):
        table = Table(title=heading, title_justify="left", box=None, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, words in result[key].items():
            table.add_row(name.replace("_", " "), words)
        shown.append(table)
    shown += [Text(each, style="bold red") for each in result["unfinished_sets"]]
    unknown = UnknownWords(**result["unknown_words"])
    if unknown.num_affected:
        shown.append(Text(unknown.in_words(), style="bold red"))
    shown.append("No problem in what was checked; nothing was started.")
    return shown


def _next_steps(summary: Mapping[str, Any]) -> Iterator[str]:
    folder = summary["run_folder"]
    if not (lacking := summary.get("left_out")):
        yield f"next: sgmd evaluate {folder}"
        yield f"      sgmd report {folder}"
        return
    yield f"next: sgmd report {folder}"
    parts = " and ".join(lacking)
    yield f"      sgmd evaluate {folder}, once {summary['generator']} has its {parts}"


def _problems(summary: Mapping[str, Any]) -> Iterator[str]:
    quarantined = summary["quarantined"]
    left_out = sum(value for value in quarantined.values() if isinstance(value, int))
    if left_out:
        reasons = ", ".join(f"{reason} {count}" for reason, count in quarantined.items())
        yield f"left out of the data: {reasons}"
    if summary["alarms"]:
        yield f"alarms: {summary['alarms']}, in {summary['run_folder']}/alarms.jsonl"
    if summary.get("validation_problem"):
        yield str(summary["validation_problem"])
