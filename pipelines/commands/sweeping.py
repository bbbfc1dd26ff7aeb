"""`sgmd sweep`: the command, its live table, and the table at its end."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from pipelines.commands.options import Json, Overrides, RecipeName
from pipelines.commands.output import FittingTable, plain_printer, show, working
from sgmd_core.collector import paused_collector

if TYPE_CHECKING:
    from pipelines.config.sweep import SweepSettings
    from pipelines.sweeping.results import SweepResult
    from pipelines.sweeping.trials import Trial

_MOST_ROWS = 14
_STATES = {"done": "done", "stopped": "ended early", "running": "running", "failed": "failed"}


def sweep_command(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Resume an interrupted sweep; finished trials are not run again."
        ),
    ] = False,
    resume_auto: Annotated[
        bool,
        typer.Option("--resume-auto", help="Resume the sweep if it has begun, else start it."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every point or corner; start nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Search settings with Ray Tune, by the recipe's `sweep`; write best.yaml and a report."""
    with working() as console:
        from pipelines.config.recipe import load_recipe
        from pipelines.config.unread import warn_of_foreign_sections

        config = load_recipe(recipe, overrides or [])
        warn_of_foreign_sections("sweep", overrides or [])

        with paused_collector():
            from pipelines.run.progress import LineObserver
            from pipelines.run.stop_rule import StopRule
            from pipelines.sweeping import run as job

        goes_on = "auto" if resume_auto else resume
        if dry_run:
            checked = job.dry_run_sweep(config, resume=goes_on)
            words = "{trials} trials of {iterations} iterations; {checked} points checked"
            show(checked, as_json, words.format(**checked))
            return
        observer = LineObserver(console, StopRule(config.sweep.iterations))
        with live_trials(console, config.sweep) as on_trials:
            result = job.sweep(config, observer, on_trials=on_trials, resume=goes_on)
    show(result.to_json(), as_json, *sweep_words(result))


@contextmanager
def live_trials(
    console: Console, settings: "SweepSettings"
) -> Iterator[Callable[[Sequence["Trial"], int], None]]:
    """Shows the trials so far: a table that stays on a terminal, a line an ended trial elsewhere.

    Args:
        console: Where to.
        settings: What is searched.
    """
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2, transient=True) as live:
            yield lambda trials, total: live.update(trials_so_far(settings, trials, total))
        return
    reported = -1

    def tell(trials: Sequence["Trial"], total: int) -> None:
        nonlocal reported
        ended = sum(trial.state != "running" for trial in trials)
        if ended != reported:
            reported = ended
            plain_printer(console)(f"trials: {ended}/{total}{_best_words(settings, trials)}")

    yield tell


def trials_so_far(
    settings: "SweepSettings", trials: Sequence["Trial"], total: int
) -> RenderableType:
    """Table of the trials under way and the best ones, and how many have ended."""
    from pipelines.sweeping.results import ranked_trials
    from pipelines.sweeping.trials import value_in_words

    running = [trial for trial in trials if trial.state == "running"]
    order = [trial for trial in ranked_trials(settings, trials) if trial.state != "running"]
    room = max(0, _MOST_ROWS - len(running))
    shown = [*running, *order[:room]]
    keys = list(settings.dimensions)
    names = list(settings.objectives)
    rows = [
        [
            _STATES[trial.state],
            f"{trial.iteration}/{settings.iterations}",
            *(_figure(trial, name) for name in names),
            *(value_in_words(trial.settings.get(key, "")) for key in keys),
        ]
        for trial in shown
    ]
    ended = sum(trial.state != "running" for trial in trials)
    count = Text(f"{ended}/{total} trials ended{_best_words(settings, trials)}")
    if not rows:
        return count
    heads = ["trial", "iteration", *names, *(key.rpartition(".")[2] for key in keys)]
    table = FittingTable(heads, rows, num_kept=3, elsewhere="sweep.csv")
    hidden = len(order) - len(order[:room])
    more = [Text(f"and {hidden} more that ended")] if hidden else []
    return Group(table, *more, count)


def _best_words(settings: "SweepSettings", trials: Sequence["Trial"]) -> str:
    done = [trial for trial in trials if settings.score in trial.figures and trial.state == "done"]
    if not done:
        return ""
    choose = min if settings.mode == "min" else max
    best = choose(done, key=lambda trial: trial.figures[settings.score])
    return f", best {settings.score} {best.figures[settings.score]:.4g}"


def _figure(trial: "Trial", name: str) -> str:
    return f"{trial.figures[name]:.4g}" if name in trial.figures else ""


def sweep_words(result: "SweepResult") -> list[RenderableType]:
    """Points, the best first, then errors, points that clips do not separate, and the next step."""
    from pipelines.config.figures import HEADLINE_FIGURES
    from pipelines.run.places import shared_place
    from pipelines.sweeping.trials import value_in_words

    points, folder, recipe = result.points, *map(shared_place, (result.folder, result.best_recipe))
    best = points[0].trials[0]
    searched = [name for name in result.objectives if name != result.score]
    others = [
        *searched,
        *(
            name
            for name in HEADLINE_FIGURES
            if name in best.figures and name not in (result.score, *searched)
        ),
    ]
    keys = list(dict.fromkeys(key for point in points for key in point.settings))
    rows = []
    for point in points:
        first = point.trials[0]
        ends = {trial.state for trial in point.trials}
        seconds = f"{sum(trial.seconds for trial in point.trials):.1f}"
        figures = []
        for name in (result.score, *others):
            found = point.spread(name)
            value = found.mean if found else first.figures.get(name)
            figures.append("" if value is None else f"{value:.4g}")
        how = "failed" if "failed" in ends else seconds
        if "stopped" in ends:
            how = f"{seconds}, ended at {first.iteration}"
        values = [value_in_words(point.settings.get(key, "")) for key in keys]
        rows.append([*values, figures[0], how, *figures[1:]])
    # Seconds stand before the other figures, which narrow terminals leave out.
    table = FittingTable(
        [*keys, result.score, "seconds", *others],
        rows,
        num_kept=len(keys) + 2,
        num_words=0,
        title=f"points by {result.score}" + _seeds_words(result),
        elsewhere=f"{folder}/sweep.csv",
    )
    failed = [
        f"failed, {trial.in_words}, seed {trial.seed}: {trial.error}"
        for trial in result.trials
        if trial.error
    ]
    return [
        table,
        *failed,
        *([result.note] if result.note else []),
        f"report: {folder}/report.html",
        f"best settings: {recipe}",
        f"next: sgmd distill {recipe}",
    ]


def _seeds_words(result: "SweepResult") -> str:
    most = max(len(point.trials) for point in result.points)
    return f", means over {most} seeds" if most > 1 else ""
