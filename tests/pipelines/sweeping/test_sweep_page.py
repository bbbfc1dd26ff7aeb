"""The page of a sweep, of trials with known figures, in a real browser."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Route, sync_playwright

from pipelines.config.recipe import load_recipe
from pipelines.sweeping.importance import importances
from pipelines.sweeping.page import write_sweep_page
from pipelines.sweeping.results import (
    TriedPoint,
    pareto_front,
    points_of,
    ranked_trials,
    write_results,
    write_table,
)
from pipelines.sweeping.trials import Trial, TrialBook
from tests.pipelines.commands.rendering import rendered

NR, LR = "objective.lambda_nr", "generator.optimizer.lr"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SETTINGS = (
    "sweep.grid={}",
    f"sweep.space={{{NR}: {{log_uniform: [0.01, 1.0]}}, {LR}: {{uniform: [1.0e-6, 1.0e-4]}}}}",
    "sweep.search=tpe",
    "sweep.iterations=30",
    "sweep.validate_every=10",
    "sweep.scheduler.method=asha",
    "sweep.tradeoffs={flow_top_ratio: max}",
)


def trial(index: int) -> Trial:
    """The weight alone decides the distance; the best one is 0.1. It trades off with motion."""
    nr = 10 ** (-2 + 2 * (index * 0.618 % 1))
    lr = 1e-6 + 9.9e-5 * (index * 0.414 % 1)
    last = 30 if index % 2 else 10
    distance = 0.1 + (math.log10(nr) + 1) ** 2
    figures = {"frechet": distance, "flow_top_ratio": nr}
    curve = tuple((at, {**figures, "frechet": distance + 1 / at}) for at in range(10, last + 1, 10))
    final = dict(curve[-1][1])
    return Trial(
        {NR: nr, LR: lr},
        final,
        float(last),
        f"runs/{index}",
        "",
        {"frechet": (final["frechet"] - 0.01, final["frechet"] + 0.01)},
        name=f"trial-{index}",
        state="done" if last == 30 else "stopped",
        iteration=last,
        curve=curve,
    )


def failed() -> Trial:
    error = "NonFiniteError: <b>While</b> updating"
    return Trial({NR: 0.5, LR: 1e-5}, {}, 1.0, "runs/x", error, name="trial-x", state="failed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = load_recipe("tiny", list(SETTINGS))
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    book = TrialBook(tmp_path / "trials.json")
    for each in [*(trial(index) for index in range(40)), failed()]:
        book.begin(each)
        if each.error:
            book.end(each.name, "failed", each.error)
        else:
            book.end(each.name, each.state)
    write_results(config, tmp_path, book.trials)
    return tmp_path


@pytest.mark.slow
def test_a_book_is_what_was_written_into_it(folder: Path) -> None:
    again = TrialBook(folder / "trials.json").trials
    assert list(again) == [*(trial(index) for index in range(40)), failed()]


def test_the_best_comes_first_then_those_ended_early_then_failed_ones() -> None:
    config = load_recipe("tiny", list(SETTINGS))
    order = ranked_trials(config.sweep, [failed(), *(trial(index) for index in range(9))])
    assert [each.state for each in order] == ["done"] * 4 + ["stopped"] * 5 + ["failed"]
    done = [each.figures["frechet"] for each in order[:4]]
    assert done == sorted(done)


def test_a_point_that_was_tried_twice_is_one_trial_of_its_seed() -> None:
    """A search over choices repeats points; one of the copies may have been ended early."""
    config = load_recipe("tiny", list(SETTINGS))
    best, other = sorted((trial(1), trial(3)), key=lambda each: each.figures["frechet"])
    ended = replace(best, name="copy", state="stopped", iteration=10)
    order = ranked_trials(config.sweep, [ended, other, best])
    assert order == (best, other, ended)
    again = replace(best, name="again")
    (point,) = points_of([ended, best, again])
    assert point.trials == (best,)
    # The interval is that over the clips, not that of two equal numbers.
    assert point.contender("frechet").interval == best.intervals["frechet"]
    assert len(points_of([best, replace(best, seed=1)])[0].trials) == 2


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_never_comes_first(mode: str, broken: float) -> None:
    config = load_recipe("tiny", [*SETTINGS, "sweep.score=frechet", f"sweep.mode={mode}"])
    good, other = sorted((trial(1), trial(3)), key=lambda each: each.figures["frechet"])
    best, second = (good, other) if mode == "min" else (other, good)
    diverged = replace(trial(5), figures={"frechet": broken, "flow_top_ratio": 1.0})
    ended = trial(2)
    for trials in ([diverged, other, ended, good], [good, ended, diverged, other]):
        order = ranked_trials(config.sweep, [*trials, failed()])
        assert order == (best, second, ended, diverged, failed())
    # A seed that diverged is not made good by another one.
    (point,) = points_of([good, replace(diverged, settings=good.settings, seed=1)])
    assert math.isnan(point.value("frechet"))


def test_the_front_has_what_no_other_point_beats() -> None:
    objectives = {"frechet": "min", "flow_top_ratio": "max"}
    points = points_of([trial(index) for index in range(1, 40, 2)])
    found = pareto_front(points, objectives)  # pyright: ignore
    # Below 0.1 a larger weight is better in both figures; above, one pays for the other.
    best = min(points, key=lambda point: point.value("frechet"))
    larger = [point for point in points if point.settings[NR] >= best.settings[NR]]
    assert {point.settings[NR] for point in found} == {point.settings[NR] for point in larger}
    assert pareto_front(points, {"frechet": "min"}) == [best]


def test_points_are_compared_seed_by_seed() -> None:
    """Seeds differ by far more than the points, and by the same."""

    def point(shift: float, spread: float) -> TriedPoint:
        return TriedPoint(
            {NR: shift},
            tuple(
                Trial(
                    {NR: shift},
                    {"frechet": level + shift + spread * (-1) ** seed},
                    1.0,
                    "run",
                    "",
                    seed=seed,
                )
                for seed, level in enumerate((1.0, 5.0, 9.0))
            ),
        )

    best, other, noisy = (
        each.contender("frechet") for each in (point(0.0, 0.0), point(0.1, 0.0), point(0.1, 0.2))
    )
    assert best.interval is not None
    assert best.interval[0] < other.value < best.interval[1]
    assert best.is_told_from(other)
    assert not best.is_told_from(noisy)


def test_a_sweep_of_failed_trials_has_its_table_and_its_page(tmp_path: Path) -> None:
    config = load_recipe("tiny", list(SETTINGS))
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    book = TrialBook(tmp_path / "trials.json")
    book.begin(failed())
    book.end("trial-x", "failed", failed().error)
    (row,) = write_table(config, tmp_path, book.trials).trials
    assert row.error == failed().error
    assert failed().error in (tmp_path / "sweep.csv").read_text()
    assert "NonFiniteError" in write_sweep_page(tmp_path).read_text()


def test_the_setting_that_decides_is_the_important_one() -> None:
    config = load_recipe("tiny", list(SETTINGS))
    shares = importances(config.sweep, [trial(index) for index in range(40)])
    assert list(shares) == [NR, LR]
    assert shares[NR] > 0.8
    assert importances(config.sweep, [trial(index) for index in range(4)]) == {}


@pytest.mark.slow
def test_the_live_table_fits_80_columns(folder: Path) -> None:
    from pipelines.commands.sweeping import trials_so_far

    config = load_recipe("tiny", list(SETTINGS))
    trials = TrialBook(folder / "trials.json").trials
    for columns in (60, 80):
        text = rendered([trials_so_far(config.sweep, trials, 48)], columns)
        lines = text.splitlines()
        assert max(map(len, lines)) <= columns
        assert len(lines) <= 24
        assert "41/48 trials ended, best frechet" in lines[-1]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: `make browser` brings it")
def test_the_page_fits_a_phone_and_asks_for_nothing(folder: Path) -> None:
    page_file = write_sweep_page(folder)
    asked: list[str] = []
    said: list[str] = []

    def refuse(route: Route) -> None:
        if not route.request.url.startswith(("file:", "data:")):
            asked.append(route.request.url)
        route.continue_()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width in (390, 1280):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("console", lambda message: said.append(message.text))
            page.route("**/*", refuse)
            page.goto(page_file.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            # The distance and the motion over each of two settings, the front, the curves.
            assert page.locator("section:has(h2:text-is('Response')) svg").count() == 4
            assert page.locator("path.band").count() == 4
            assert page.locator("h2:text-is('Pareto front')").count() == 1
            assert page.locator("h2:text-is('Importance')").count() == 1
            assert "saved" in page.inner_text("section:has(h2:text-is('Cost'))")
            assert "NonFiniteError: <b>While</b>" in page.inner_text("body")
        browser.close()
    assert asked == said == []
