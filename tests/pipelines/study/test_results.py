"""Means, spreads, tables and plots of results that are written by hand."""

import csv
import io
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from pipelines.study.figures import write_plots
from pipelines.study.measured_runs import Point, RunResult
from pipelines.study.results import StudyResult, mean_curve, spread
from pipelines.study.tables import cost_csv, results_csv, results_markdown

TEACHER = {"frechet": 0.0, "flow_top": 2.0, "colour": 1.0, "diversity": 0.0}


def run(variant: str, seed: int, *distances: float, error: str = "") -> RunResult:
    points = tuple(
        Point(10 * n, 100.0 * n, 5.0 * n, {"frechet": distance, "flow_top": 1.0, "colour": 0.9})
        for n, distance in enumerate(distances, 1)
    )
    stages = {"generator.rollout": 0.1, "fake_score.track": 0.2}
    return RunResult(variant, seed, f"runs/{variant}{seed}", points, stages, 0.4, error)


@pytest.fixture
def result() -> StudyResult:
    return StudyResult(
        name="small",
        budget=("forwards", 200),
        seeds=(0, 1),
        num_captions=64,
        teacher={
            "reference": TEACHER,
            "floor": TEACHER | {"frechet": 0.1},
            "teacher_few": TEACHER | {"frechet": 1.0, "flow_top": 1.5},
            "teacher_few_guided": TEACHER | {"frechet": 0.5},
        },
        variants=("a", "b<c"),
        units_per_iteration={"a": {"generator": 4.5}, "b<c": {"generator": 4.5}},
        runs=(
            run("a", 0, 0.8, 0.4),
            run("b<c", 0, 0.9, 0.6),
            run("a", 1, 0.6, 0.2),
            run("b<c", 1, 0.9, error="NonFiniteError: a loss\nis NaN"),
        ),
        facts={},
    )


def test_a_spread_has_mean_and_deviation_over_what_is_finite():
    found = spread([1.0, 3.0, float("nan")])
    assert found is not None
    assert (found.mean, found.deviation, found.count) == (2.0, pytest.approx(2**0.5), 2)
    assert spread([7.0]).deviation is None
    assert spread([]) is None


def test_figures_at_the_end_leave_out_runs_that_failed(result):
    assert result.at_end("a", "frechet").mean == pytest.approx(0.3)
    assert result.at_end("b<c", "frechet").count == 1
    assert result.at_end("a", "flow_top", over_teacher=True).mean == 0.5
    assert result.at_end("a", "unknown") is None
    # Nothing to divide by.
    assert result.at_end("a", "diversity", over_teacher=True) is None


def test_variants_that_their_seeds_do_not_separate_are_named(result):
    # One seed of two failed: how much its runs differ is not known.
    assert "known from one seed for b<c" in result.note
    assert "study.seeds" in result.note
    assert result.note in results_markdown(result)
    runs = [run("a", seed, 0.4 + 0.01 * seed) for seed in range(3)]
    near = [run("b<c", seed, 0.41 + 0.01 * seed) for seed in range(3)]
    far = [run("b<c", seed, 0.9 + 0.01 * seed) for seed in range(3)]
    # The mean of 0.40, 0.41, 0.42 by Student's t with two degrees of freedom.
    assert replace(result, runs=(*runs, *near)).note == (
        "variants a and b<c are not told apart by these seeds: frechet 0.41 [0.385, 0.435] and "
        "0.42 [0.395, 0.445], 95 %; take more seeds: study.seeds"
    )
    assert replace(result, runs=(*runs, *far)).note == ""
    assert replace(result, runs=tuple(runs)).note == ""


def test_a_curve_is_the_mean_of_the_runs_that_have_got_so_far(result):
    curve = mean_curve(result.of("b<c"), "frechet")
    assert [(at.iteration, at.units, value) for at, value in curve] == [
        (10, 100.0, pytest.approx(0.9)),
        (20, 200.0, pytest.approx(0.6)),
    ]


def test_the_table_has_a_row_for_everybody_and_says_why_a_run_failed(result):
    text = results_markdown(result)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + 4 + 2
    (ours,) = [line for line in table if "**a**" in line]
    assert "0.3000 ± 0.1414" in ours
    (theirs,) = [line for line in table if "**b<c**" in line]
    assert "1 of 2" in theirs
    assert "**b<c, seed 1** failed: NonFiniteError: a loss is NaN" in text


def test_a_variant_of_which_every_run_failed_is_an_empty_row(result):
    failed = replace(result, runs=tuple(replace(r, error="gone") for r in result.runs))
    table = [line for line in results_markdown(failed).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 8


def test_the_csv_has_every_measured_point(result):
    rows = list(csv.DictReader(io.StringIO(results_csv(result))))
    assert len(rows) == 7
    assert [row["iteration"] for row in rows if row["is_end"] == "1"] == ["20", "20", "20"]
    assert rows[-1]["error"].startswith("NonFiniteError")
    assert len(list(csv.DictReader(io.StringIO(cost_csv(result))))) == 4


def test_a_run_without_a_point_is_a_row_all_the_same(result):
    alone = replace(result, runs=(RunResult("a", 0, "runs/a0", error="no GPU"),))
    (row,) = csv.DictReader(io.StringIO(results_csv(alone)))
    assert (row["variant"], row["iteration"], row["error"]) == ("a", "", "no GPU")


def test_the_result_can_be_written_as_json(result):
    stored = json.loads(json.dumps(result.to_json()))
    assert stored["at_end"]["a"]["frechet"]["mean"] == pytest.approx(0.3)
    assert len(stored["runs"]) == 4


def test_plots_are_well_formed_and_have_one_dot_a_run(result, tmp_path):
    paths = {path.stem: ElementTree.parse(path).getroot() for path in write_plots(tmp_path, result)}
    assert set(paths) == {"quality-seconds", "quality-forwards", "motion-frechet", "cost"}
    svg = "{http://www.w3.org/2000/svg}"
    seeds = [c for c in paths["motion-frechet"].iter(f"{svg}circle") if "seed" in c.get("class")]
    assert len(seeds) == 3
    assert len(list(paths["quality-seconds"].iter(f"{svg}polyline"))) == 2
    titles = [bar.findtext(f"{svg}title") for bar in paths["cost"].iter(f"{svg}rect")]
    assert "a, generator.rollout: 0.1 s" in titles


def test_a_study_of_which_nothing_came_has_no_plots(result, tmp_path):
    empty = replace(result, runs=(RunResult("a", 0, "runs/a0", error="no GPU"),))
    assert write_plots(tmp_path, empty) == []
