"""Command that compares methods: `sgmd study`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from pipelines.commands.options import Json, Overrides, RecipeName
from pipelines.commands.output import FittingTable, plain_printer, show, working
from sgmd_core.collector import paused_collector

if TYPE_CHECKING:
    from pipelines.config.recipe import DistillConfig
    from pipelines.study.results import StudyResult

Shown = tuple[dict[str, Any], list[RenderableType]]
"""A result as JSON can hold it, and the same for a reader."""


def study_command(
    recipe: RecipeName,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show runs, forward passes and predicted time; start nothing."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare the recipe's `study.variants`: the same budget for each, with several seeds.

    Run again, the same command continues. The recipe `gaussians` compares the
    methods on Gaussian mixtures, where every answer is known.
    """
    with working() as console:
        from pipelines.config.gaussian_study import is_gaussian_study
        from pipelines.config.recipe import load_recipe
        from pipelines.config.unread import warn_of_foreign_sections

        if is_gaussian_study(recipe):
            data, shown = _in_closed_form(recipe, overrides or [], console, dry_run=dry_run)
            show(data, as_json, *shown)
            return
        config = load_recipe(recipe, overrides or [])
        warn_of_foreign_sections("study", overrides or [])
        data, shown = _planned(config) if dry_run else _made(config, console)
    show(data, as_json, *shown)


def _in_closed_form(
    recipe: str, overrides: Sequence[str], console: Console, *, dry_run: bool
) -> Shown:
    """The study on Gaussian mixtures: a table a world."""
    from pipelines.config.gaussian_study import GaussianStudyConfig
    from pipelines.config.recipe_files import load
    from pipelines.run.places import shared_place
    from pipelines.study.gaussians import run as job
    from pipelines.study.gaussians.tables import gaussian_rows, world_words

    config = load(GaussianStudyConfig, recipe, overrides)
    folder = shared_place(config.folder)
    if dry_run:
        planned = job.dry_run_gaussian_study(config)
        names = ("world", "variant", "iterations", "forwards_per_iteration")
        rows = [[f"{cell[name]}" for name in names] for cell in planned["cells"]]
        table = FittingTable(names, rows, num_kept=2, elsewhere="--json")
        return planned, [table, f"{len(rows)} cells of {config.num_seeds} seeds in {folder}"]
    results = job.gaussian_study(config, plain_printer(console))
    shown: list[RenderableType] = []
    for name, world in config.worlds.items():
        rows = gaussian_rows(results, name)
        # The names, then the distance; learning rates and counts last.
        table = _in_columns(rows, [0, 3, 4, 5, 6, 7, 1, 2], num_kept=2, folder=folder)
        shown += [f"{name}: {world_words(world)}", table]
    return results.to_json(), [*shown, f"written to {folder}"]


def _planned(config: "DistillConfig") -> Shown:
    with paused_collector():
        from pipelines.study.run import dry_run_study

    planned = dry_run_study(config)
    return planned, [_plan_table(planned), _plan_words(planned)]


def _made(config: "DistillConfig", console: Console) -> Shown:
    with paused_collector():
        from pipelines.run.progress import console_observer
        from pipelines.study import run as job

    result = job.study(
        config,
        plain_printer(console),
        lambda rule, spent_s: console_observer(rule, console, spent_s),
    )
    return result.to_json(), result_words(result, job.folder_of(config), job.WRITTEN)


def result_words(
    result: "StudyResult", folder: str, written: Sequence[str]
) -> list[RenderableType]:
    """The table as far as it fits, what it does not tell apart, errors, and files."""
    from pipelines.study.tables import results_rows, setting_words

    rows = results_rows(result)
    # Names, runs and the distance first; times and counts last.
    order = [0, 1, *range(6, len(rows[0])), *range(2, 6)]
    failed = [
        f"failed, {run.variant}, seed {run.seed}: {' '.join(run.error.split())}"
        for run in result.runs
        if run.error
    ]
    return [
        _in_columns(rows, order, num_kept=3, folder=folder),
        setting_words(result),
        *([result.note] if result.note else []),
        *failed,
        *_verdict_words(result, folder),
        f"written to {folder}: {', '.join(written)}",
    ]


def _in_columns(
    rows: Sequence[Sequence[str]], order: Sequence[int], *, num_kept: int, folder: str
) -> FittingTable:
    """A table of a study's results, headings first, with its columns in another order."""
    head, *shown = ([row[place] for place in order] for row in rows)
    return FittingTable(head, shown, num_kept=num_kept, elsewhere=f"{folder}/results.md")


def _verdict_words(result: "StudyResult", folder: str) -> list[RenderableType]:
    """The hypotheses, and when they were written down."""
    from pipelines.study.hypotheses import record_words, verdict_rows

    if not result.verdicts:
        return []
    headings, *rows = verdict_rows(result.verdicts)
    table = FittingTable(headings, rows, num_kept=2, num_words=2, elsewhere=f"{folder}/results.md")
    return [table, record_words(result.record)]


def _plan_table(planned: Mapping[str, Any]) -> Table:
    """One row a variant: what one run of it does and costs."""
    table = Table()
    headings = ("variant", "tracking", "iterations", "forwards / iteration", "forwards", "seconds")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for row in planned["variants"]:
        table.add_row(
            row["variant"],
            row["tracking"],
            _number(row["iterations"]),
            _number(row["units_per_iteration"]),
            _number(row["units"]),
            _number(row["seconds"]),
        )
    return table


def _plan_words(planned: Mapping[str, Any]) -> str:
    from pipelines.reporting.names import duration
    from pipelines.study.plan import pass_cost_words

    total, source = planned["training_seconds"], planned["seconds_per_forward_from"]
    seeds = ", ".join(map(str, planned["seeds"]))
    lines = [f"{planned['runs']} runs (seeds {seeds}) in {planned['folder']}"]
    if total is None:
        lines.append(f"how long a forward pass takes is not known: {source}")
    else:
        lines.append(
            f"predicted training time: {duration(total)}, from {source}; measuring is on top"
        )
    lines += [f"{name}: {words}" for name, words in planned["hypotheses"].items()]
    lines += [planned["power"]] if planned["power"] else []
    lines.append(pass_cost_words(planned["variants"]))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}"
