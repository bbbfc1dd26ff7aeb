"""A sweep as one HTML page: response, importance, Pareto front, learning curves, cost, all points.

    recipe.yaml + trials.json -> points -> charts -> one template -> report.html

The page is one file without a script. It can be made while a sweep runs, and after it was killed.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pipelines.reporting
from cluster.storage import write_text
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.media.charts import number
from pipelines.media.pages import page_templates
from pipelines.media.scatter import interval_words
from pipelines.reporting.names import duration, title
from pipelines.run.outputs import require_inside, require_output_folder
from pipelines.run.places import shared_place
from pipelines.sweeping.importance import comparable, importances
from pipelines.sweeping.page_charts import (
    learning_cards,
    parallel_picture,
    pareto_cards,
    response_cards,
)
from pipelines.sweeping.results import BEST_FILE, SweepResult, TriedPoint, ranked_trials
from pipelines.sweeping.trials import TrialBook, value_in_words
from sgmd_core.errors import CheckpointError

PAGE_FILE = "report.html"
_ASSETS = Path(__file__).parent / "assets"
_STYLE = Path(pipelines.reporting.__file__).parent / "assets" / "style.css"
_MAX_ROWS = 200


def is_sweep(folder: Path) -> bool:
    """Returns True if a folder is that of a sweep."""
    return (folder / "trials.json").exists() and (folder / "recipe.yaml").exists()


def write_sweep_page(folder: Path, output: Path | None = None) -> Path:
    """Writes the page of a sweep, finished or not.

    Args:
        folder: The sweep's.
        output: File to write; None: report.html in the folder.

    Returns:
        Path of the file, or its address.

    Raises:
        CheckpointError: There is no sweep, or none of its trials has begun.
        StorageError: An object store does not take the page.
    """
    place = shared_place(folder)
    if not is_sweep(folder):
        raise CheckpointError(f"reading the sweep {place}", "no trials.json", "a sweep's folder")
    config = load_recipe(str(folder / "recipe.yaml"))
    trials = ranked_trials(config.sweep, TrialBook(folder / "trials.json").trials)
    if not trials:
        raise CheckpointError(f"reading the sweep {place}", "no trial", "at least one that began")
    best = Path(place) / BEST_FILE
    result = SweepResult(config.sweep.score, trials, Path(place), best, config.sweep.objectives)
    path = output or Path(place) / PAGE_FILE
    if not output:
        require_inside(Path(place), PAGE_FILE)
    require_output_folder(path, "--output", is_file=True)
    write_text(shared_place(path), _html(config, result))
    return path


def _html(config: DistillConfig, result: SweepResult) -> str:
    templates = page_templates(_ASSETS)
    return templates.get_template("sweep.html.j2").render(_content(config, result))


def _content(config: DistillConfig, result: SweepResult) -> dict[str, Any]:
    """Everything that the template shows."""
    sweep, points = config.sweep, result.points
    shares = importances(sweep, result.trials)
    most = max(shares.values(), default=1.0) or 1.0
    return {
        "style": _STYLE.read_text(encoding="utf-8"),
        "title": config.name,
        "facts": _facts(config, result),
        "notes": [result.note] if result.note else [],
        "tiles": _tiles(config, points),
        "responses": response_cards(sweep, points),
        "compared_at": comparable(sweep, result.trials)[0],
        "importance": [
            {"name": key, "share": f"{share:.0%}", "width": round(100 * share / most)}
            for key, share in shares.items()
        ],
        "parallel": parallel_picture(sweep, result),
        "pareto": pareto_cards(sweep, result),
        "learning": learning_cards(sweep, result.trials),
        "cost": _cost(config, result),
        "table": _table(config, result),
        "errors": [
            f"{trial.in_words}, seed {trial.seed}: {trial.error}"
            for trial in result.trials
            if trial.error
        ],
        "recipe": config.to_yaml(),
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def _facts(config: DistillConfig, result: SweepResult) -> list[str]:
    sweep, trials = config.sweep, result.trials
    states = [trial.state for trial in trials]
    words = {"done": "to the end", "stopped": "ended early", "failed": "failed"}
    found = [f"{len(trials)} trials"]
    found += [f"{states.count(key)} {text}" for key, text in words.items() if key in states]
    running = states.count("running")
    found += [f"{running} not ended"] if running else []
    found.append(f"search: {sweep.search}")
    if sweep.scheduler.method != "none":
        found.append(f"scheduler: {sweep.scheduler.method}")
    seeds = max(len(point.trials) for point in result.points)
    return [*found, f"{seeds} seeds a point"] if seeds > 1 else found


def _tiles(config: DistillConfig, points: Sequence[TriedPoint]) -> list[dict[str, str]]:
    best = points[0]
    tiles = []
    for figure in config.sweep.objectives:
        contender = best.contender(figure) if best.trials[0].figures.get(figure) else None
        if contender is not None:
            interval = interval_words(contender.interval)
            small = f"{title(figure)} {interval}, {best.trials[0].state}".strip()
            tiles.append({"big": number(contender.value), "small": small})
    return [
        *tiles,
        *({"big": value_in_words(value), "small": key} for key, value in best.settings.items()),
    ]


def _cost(config: DistillConfig, result: SweepResult) -> dict[str, Any]:
    """Table of iterations and seconds by how trials ended, and what was saved."""
    full = config.sweep.iterations
    rows = []
    for state, words in (("done", "to the end"), ("stopped", "ended early"), ("failed", "failed")):
        chosen = [trial for trial in result.trials if trial.state == state]
        if chosen:
            iterations = sum(trial.iteration for trial in chosen)
            seconds = sum(trial.seconds for trial in chosen)
            rows.append([words, str(len(chosen)), f"{iterations:,}", duration(seconds)])
    run = sum(trial.iteration for trial in result.trials)
    ended = [trial for trial in result.trials if trial.state in ("done", "stopped")]
    saved = 1 - sum(trial.iteration for trial in ended) / (full * len(ended)) if ended else 0.0
    seconds = sum(trial.seconds for trial in result.trials)
    rows.append(["all", str(len(result.trials)), f"{run:,}", duration(seconds)])
    note = "Seconds of training, without the start of processes and without validations."
    if saved > 0:
        note = f"Ending trials early saved {saved:.0%} of the iterations. {note}"
    return {"heads": ["trials", "number", "iterations", "seconds"], "rows": rows, "note": note}


def _table(config: DistillConfig, result: SweepResult) -> dict[str, Any]:
    keys = list(config.sweep.dimensions)
    figures = list(config.sweep.objectives)
    on_front = [dict(point.settings) for point in result.front]
    rows = []
    for place, point in enumerate(result.points[:_MAX_ROWS]):
        first = point.trials[0]
        cells = [str(place + 1)]
        for figure in figures:
            found = point.spread(figure)
            value = found.mean if found else first.figures.get(figure)
            ends = point.contender(figure).interval if value is not None else None
            cells.append("" if value is None else f"{number(value)} {interval_words(ends)}".strip())
        states = ", ".join(dict.fromkeys(trial.state for trial in point.trials))
        cells += [value_in_words(point.settings.get(key, "")) for key in keys]
        cells += [states, str(first.iteration), str(len(point.trials))]
        cells.append(duration(sum(trial.seconds for trial in point.trials)))
        rows.append({"cells": cells, "best": dict(point.settings) in on_front})
    heads = ["", *map(title, figures), *keys, "ended", "iteration", "seeds", "seconds"]
    return {"heads": heads, "rows": rows}
