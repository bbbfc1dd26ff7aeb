"""Hypotheses: tested on results written by hand, recorded with what had been run before."""

import json
import random
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from cluster.errors import StorageError
from pipelines.config.recipe import load_recipe
from pipelines.config.study import Hypothesis, StudySettings
from pipelines.study.hypotheses import (
    LEVEL,
    RECORD_FILE,
    all_hypotheses,
    expectation_words,
    fewest_seeds,
    judge_hypotheses,
    power_words,
    record_words,
    verdict_rows,
    write_down,
)
from pipelines.study.measured_runs import Point, RunResult
from pipelines.study.results import StudyResult
from pipelines.study.tables import TEACHER_LABELS, results_markdown
from sgmd_core.errors import ConfigError
from sgmd_core.metrics.paired import holm, two_sided_p

REFERENCE = {"frechet": 0.0, "flow_top": 2.0, "diversity": 1.0}
SEEDS = range(8)


def runs(variant: str, *places: dict[str, float], error: str = "") -> list[RunResult]:
    """A run a seed, measured at even places; figures grow by a hundredth a seed."""
    made = []
    for seed in SEEDS:
        points = tuple(
            Point(
                10 * n, 100.0 * n, 1.0 * n, {name: v + 0.01 * seed for name, v in figures.items()}
            )
            for n, figures in enumerate(places, 1)
        )
        made.append(RunResult(variant, seed, f"{variant}{seed}", points, error=error))
    return made


def expects(**changes: object) -> Hypothesis:
    given = {"variant": "ours", "baseline": "theirs", "figure": "frechet", **changes}
    return Hypothesis.model_validate(given)


def outcome(expected: Hypothesis, *found: list[RunResult]) -> str:
    (verdict,) = judge_hypotheses({"h": expected}, [*chain(*found)], REFERENCE)
    return verdict.outcome


def test_a_gain_in_every_seed_holds_and_its_opposite_fails():
    ours, theirs = runs("ours", {"frechet": 0.1}), runs("theirs", {"frechet": 0.3})
    (verdict,) = judge_hypotheses({"h": expects()}, ours + theirs, REFERENCE)
    assert verdict.gain is not None
    assert verdict.gain.value == pytest.approx(0.2)
    assert verdict.p == verdict.corrected_p == 2 / 256
    assert tuple(verdict.gains) == tuple(SEEDS)
    assert verdict.outcome == "holds"
    assert outcome(expects(better="higher"), ours, theirs) == "fails"
    assert outcome(expects(), ours, runs("theirs", {"frechet": 0.1})) == "undecided"


def test_the_margin_moves_what_is_claimed():
    ours, theirs = runs("ours", {"frechet": 0.1}), runs("theirs", {"frechet": 0.3})
    assert outcome(expects(by=0.19), ours, theirs) == "holds"
    assert outcome(expects(by=0.25), ours, theirs) == "fails"
    # Not worse by more than 0.3.
    assert outcome(expects(variant="theirs", baseline="ours", by=-0.3), ours, theirs) == "holds"


def test_nearer_looks_at_the_teachers_value_from_both_sides():
    above, below = runs("ours", {"flow_top": 2.1}), runs("theirs", {"flow_top": 1.2})
    assert outcome(expects(figure="flow_top", better="nearer"), above, below) == "holds"
    too_much = runs("ours", {"flow_top": 3.5})
    assert outcome(expects(figure="flow_top", better="nearer"), too_much, below) == "fails"
    assert outcome(expects(figure="flow_top", better="higher"), too_much, below) == "holds"


def test_a_share_of_the_budget_is_that_of_the_variant_alone():
    ours = runs("ours", {"frechet": 0.2}, {"frechet": 0.2}, {"frechet": 0.9})
    theirs = runs("theirs", {"frechet": 0.8}, {"frechet": 0.8}, {"frechet": 0.4})
    assert outcome(expects(), ours, theirs) == "fails"
    (early,) = judge_hypotheses({"h": expects(of_budget=0.34)}, ours + theirs, REFERENCE)
    assert early.gain is not None
    assert early.gain.value == pytest.approx(0.2)
    # Later than its second point, before its third.
    assert outcome(expects(of_budget=0.9), ours, theirs) == "holds"


def test_the_first_point_may_lie_an_iteration_beyond_its_share():
    # Points as a run of 34 iterations has them: 12 is above a third of it, and its first one.
    ours = [
        replace(
            run,
            points=tuple(
                replace(point, iteration=at)
                for point, at in zip(run.points, (12, 24, 34), strict=True)
            ),
        )
        for run in runs("ours", {"frechet": 0.2}, {"frechet": 0.5}, {"frechet": 0.9})
    ]
    theirs = runs("theirs", {"frechet": 0.4})
    (verdict,) = judge_hypotheses({"h": expects(of_budget=0.33)}, ours + theirs, REFERENCE)
    assert verdict.gain is not None
    assert verdict.gain.value == pytest.approx(0.2)
    # What was really used is said.
    assert verdict.measured_at == pytest.approx(1 / 3)
    assert "after 0.33 of the budget" in expectation_words(verdict.expected, verdict.measured_at)
    # Nothing was measured so early: no run is taken for a failed one.
    late = [replace(run, points=run.points[2:]) for run in ours]
    (nothing,) = judge_hypotheses({"h": expects(of_budget=0.33)}, late + theirs, REFERENCE)
    assert (nothing.gains, nothing.p, nothing.outcome) == ({}, 1.0, "undecided")


@pytest.mark.parametrize(
    ("iterations", "points", "share", "measured"),
    [
        (2, (1, 2), 0.5, 1),
        (18, (5, 10, 15, 18), 0.5, 5),
        (16, (3, 6, 9, 12, 15, 16), 0.5, 6),
        (19, (7, 14, 19), 0.34, 7),
        (100, (34, 67, 100), 0.33, 34),
        (100, (34, 67, 100), 0.67, 67),
        (100, (34, 67, 100), 1.0, 100),
    ],
)
def test_no_later_point_counts_than_the_share_allows(iterations, points, share, measured):
    run = RunResult(
        "ours",
        0,
        "",
        tuple(Point(at, float(at), 1.0, {"frechet": float(at)}) for at in points),
    )
    other = RunResult("theirs", 0, "", (Point(iterations, 1.0, 1.0, {"frechet": 0.0}),))
    (verdict,) = judge_hypotheses({"h": expects(of_budget=share)}, [run, other], REFERENCE)
    assert verdict.gains == {0: -float(measured)}


@pytest.mark.parametrize("broken", ["error", "figure"])
def test_a_run_that_failed_is_worse_than_any_other(broken):
    ours, theirs = runs("ours", {"frechet": 0.1}), runs("theirs", {"frechet": 0.3})

    def failed(run: RunResult) -> RunResult:
        if broken == "error":
            return replace(run, points=(), error="NonFiniteError: diverged")
        (point,) = run.points
        return replace(run, points=(replace(point, figures={"frechet": float("nan")}),))

    # Better with seven seeds and broken with one is not better.
    (verdict,) = judge_hypotheses(
        {"h": expects()}, [failed(ours[0]), *ours[1:], *theirs], REFERENCE
    )
    assert (len(verdict.gains), verdict.num_failed, verdict.gain) == (8, 1, None)
    assert verdict.outcome == "undecided"
    assert "8, a run of 1 failed" in verdict_rows([verdict])[1]
    assert verdict.to_json()["gains"]["0"] is None
    # Against one that breaks it is; where both break, nothing is known.
    assert outcome(expects(), ours, [failed(theirs[0]), *theirs[1:]]) == "holds"
    assert outcome(expects(), ours, [failed(run) for run in theirs]) == "holds"
    assert outcome(expects(), [failed(run) for run in ours], theirs) == "fails"
    assert outcome(expects(), *([failed(run) for run in each] for each in (ours, theirs))) == (
        "undecided"
    )


def test_seeds_that_one_variant_has_not_run_yet_are_left_out():
    ours, theirs = runs("ours", {"frechet": 0.1}), runs("theirs", {"frechet": 0.3})
    (verdict,) = judge_hypotheses({"h": expects()}, ours + theirs[:3], REFERENCE)
    assert tuple(verdict.gains) == (0, 1, 2)
    assert verdict.outcome == "undecided"


@pytest.mark.slow
def test_variants_that_are_equal_are_told_apart_as_seldom_as_is_said():
    drawn = random.Random(0)
    told = 0
    for _ in range(400):
        both = [
            RunResult(name, seed, "", (Point(1, 1.0, 1.0, {"frechet": drawn.gauss(1, 0.1)}),))
            for name in ("ours", "theirs")
            for seed in range(8)
        ]
        told += outcome(expects(), both) != "undecided"
    # 5 % of 400 and three of its standard deviations.
    assert told <= 33


def test_more_hypotheses_need_more_evidence():
    ours, theirs = runs("ours", {"frechet": 0.1}), runs("theirs", {"frechet": 0.3})
    several = {f"h{n}": expects(by=0.01 * n) for n in range(8)}
    found = judge_hypotheses(several, ours + theirs, REFERENCE)
    assert {each.p for each in found} == {2 / 256}
    assert {each.corrected_p for each in found} == {16 / 256}
    assert 2 / 256 < LEVEL < 16 / 256
    assert {each.outcome for each in found} == {"undecided"}


def study_of(seeds: int = 3, **hypotheses: Hypothesis) -> StudySettings:
    variants = {"ours": {}, "theirs": {}}
    return StudySettings(variants=variants, seeds=[*range(seeds)], hypotheses=hypotheses)


def test_the_record_keeps_every_version_and_how_much_had_been_run(tmp_path: Path):
    assert write_down(tmp_path, study_of(), 0) == ()
    assert not (tmp_path / RECORD_FILE).exists()
    (version,) = write_down(tmp_path, study_of(h1=expects()), 0)
    assert version["finished_runs"] == 0
    assert version["study"]["hypotheses"]["h1"]["by"] == 0.0
    assert write_down(tmp_path, study_of(h1=expects()), 5) == (version,)
    changed = write_down(tmp_path, study_of(h1=expects(by=0.1)), 7)
    assert [each["finished_runs"] for each in changed] == [0, 7]
    assert changed[0] == version
    assert json.loads((tmp_path / RECORD_FILE).read_text()) == {"versions": list(changed)}
    # More seeds after a look at the results are told, too, and so is to have none any more.
    more = write_down(tmp_path, study_of(9, h1=expects(by=0.1)), 8)
    words = record_words(more)
    assert "before any run had finished; hypotheses changed on" in words
    assert "after 7 runs had finished; seeds changed on" in words
    assert len(write_down(tmp_path, study_of(9), 9)) == 4


def test_a_claim_is_not_freed_by_dropping_its_neighbours(tmp_path: Path):
    ours, theirs = runs("ours", {"frechet": 0.1}), runs("theirs", {"frechet": 0.3})
    bad = {f"bad{n}": expects(figure="diversity", by=0.1 * n) for n in range(1, 5)}
    # Changes before the first run are free.
    write_down(tmp_path, study_of(typo=expects(by=9.0)), 0)
    versions = write_down(tmp_path, study_of(good=expects(), **bad), 0)
    assert set(all_hypotheses(versions)) == {"good", *bad}
    versions = write_down(tmp_path, study_of(good=expects()), 12)
    found = all_hypotheses(versions)
    date = versions[-1]["date"][:19]
    assert set(found) == {"good", *(f"{name} (until {date})" for name in bad)}
    good, *_ = judge_hypotheses(found, ours + theirs, REFERENCE)
    assert (good.name, good.p, good.corrected_p) == ("good", 2 / 256, 10 / 256)
    # Under another name it is the same hypothesis.
    renamed = write_down(tmp_path, study_of(better=expects()), 12)
    assert "good" not in "".join(all_hypotheses(renamed))
    # Dropped altogether they still stand in the results.
    assert len(all_hypotheses(write_down(tmp_path, study_of(), 12))) == 5


@pytest.mark.parametrize("content", ["{}", "[]", '{"versions": [{}]}', '{"versions": 3}'])
def test_a_record_that_is_none_is_an_error_that_says_what_to_do(tmp_path: Path, content: str):
    (tmp_path / RECORD_FILE).write_text(content)
    with pytest.raises(StorageError, match="move it away"):
        write_down(tmp_path, study_of(h1=expects()), 0)


def test_the_results_have_a_table_of_verdicts():
    ours, theirs = (
        runs(name, {"frechet": distance}, {"frechet": distance})
        for name, distance in (("ours", 0.1), ("theirs", 0.3))
    )
    given = {"H1": expects(by=0.05, of_budget=0.5), "H2": expects(better="higher")}
    study = study_of(len(SEEDS), **given).model_dump(mode="json")
    result = StudyResult(
        name="small",
        budget=("forwards", 200),
        seeds=tuple(SEEDS),
        num_captions=64,
        teacher=dict.fromkeys(TEACHER_LABELS, REFERENCE),
        variants=("ours", "theirs"),
        units_per_iteration={},
        runs=tuple(ours + theirs),
        facts={},
        verdicts=judge_hypotheses(given, ours + theirs, REFERENCE),
        record=({"date": "2026-11-29T00:00:00+00:00", "finished_runs": 0, "study": study},),
    )
    head, first, second = verdict_rows(result.verdicts)
    assert len(head) == len(first) == len(second)
    assert first[1:3] == ["holds", "+0.2 (+0.2, +0.2)"]
    assert second[1] == "fails"
    assert first[-1] == (
        "frechet of ours after 0.5 of the budget: lower than theirs's by more than 0.05"
    )
    text = results_markdown(result)
    assert "## Hypotheses" in text
    assert "Written down on 2026-11-29T00:00:00+00:00, before any run" in text
    stored = result.to_json()["verdicts"]
    assert [each["outcome"] for each in stored] == ["holds", "fails"]
    json.dumps(stored)


def test_a_margin_below_zero_reads_as_not_much_worse():
    assert expectation_words(expects(by=-0.01)) == (
        "frechet of ours: lower than, or at most 0.01 worse than, theirs's"
    )


@pytest.mark.parametrize(
    ("hypothesis", "said"),
    [
        ("{variant: sgmd, baseline: ours, figure: frechet}", "names sgmd, which is not one of"),
        ("{variant: ours, baseline: ours, figure: frechet}", "compares ours with itself"),
        ("{variant: ours, baseline: theirs, figure: flow_tip}", "the nearest one is flow_top"),
        (
            "{variant: ours, baseline: theirs, figure: frechet, of_budget: 0.2}",
            "have their first point after 1/3 of it: raise measurements",
        ),
    ],
)
def test_a_hypothesis_that_cannot_be_tested_is_refused_before_anything_runs(hypothesis, said):
    variants = "study.variants={ours: {}, theirs: {objective.method: tsg_sim}}"
    with pytest.raises(ConfigError, match=said):
        load_recipe("tiny", [variants, f"study.hypotheses={{h: {hypothesis}}}"])


@pytest.mark.parametrize("number", [1, 2, 5, 8, 20])
def test_as_few_seeds_as_are_asked_for_decide_and_one_fewer_does_not(number: int):
    def lowest(num_seeds: int) -> float:
        return min(holm([two_sided_p([1.0] * num_seeds)] + [1.0] * (number - 1)))

    needed = fewest_seeds(number)
    assert lowest(needed) < LEVEL <= lowest(needed - 1)
    assert power_words(number, needed) == ""
    assert f"Take {needed} seeds or more" in power_words(number, needed - 1)


def test_the_table_says_that_its_seeds_can_decide_nothing(tmp_path: Path):
    def words(seeds: int) -> str:
        return record_words(write_down(tmp_path / str(seeds), study_of(seeds, h=expects()), 0))

    assert "3 seeds cannot decide 1 hypothesis" in words(3)
    assert "cannot decide" not in words(6)
