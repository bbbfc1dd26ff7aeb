"""Hypotheses: tested on results written by hand, recorded with what had been run before."""

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.config.study import Hypothesis
from pipelines.study.hypotheses import (
    LEVEL,
    RECORD_FILE,
    expectation_words,
    judge_hypotheses,
    record_words,
    verdict_rows,
    write_down,
)
from pipelines.study.measured_runs import Point, RunResult
from pipelines.study.results import StudyResult
from pipelines.study.tables import TEACHER_LABELS, results_markdown
from sgmd_core.errors import ConfigError

REFERENCE = {"frechet": 0.0, "flow_top": 2.0, "diversity": 1.0}
SEEDS = range(6)


def runs(variant: str, *places: dict[str, float], error: str = "") -> list[RunResult]:
    """A run a seed, measured at even places; figures grow by a hundredth a seed."""
    made = []
    for seed in SEEDS:
        points = tuple(
            Point(n, 100.0 * n, 1.0 * n, {name: v + 0.01 * seed for name, v in figures.items()})
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
    assert verdict.p == verdict.corrected_p == 1 / 64
    assert verdict.seeds == tuple(SEEDS)
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


def test_runs_that_failed_and_figures_that_are_missing_are_no_pairs():
    ours, theirs = runs("ours", {"frechet": 0.1}), runs("theirs", {"frechet": 0.3})
    failed = [replace(theirs[0], error="gone"), *theirs[1:]]
    (verdict,) = judge_hypotheses({"h": expects()}, ours + failed, REFERENCE)
    assert verdict.seeds == (1, 2, 3, 4, 5)
    assert verdict.p == 1 / 32
    (nothing,) = judge_hypotheses({"h": expects(figure="diversity")}, ours + theirs, REFERENCE)
    assert (nothing.seeds, nothing.gain, nothing.outcome) == ((), None, "undecided")
    assert nothing.p == 1.0


def test_more_hypotheses_need_more_evidence():
    ours, theirs = runs("ours", {"frechet": 0.1}), runs("theirs", {"frechet": 0.3})
    several = {f"h{n}": expects(by=0.01 * n) for n in range(4)}
    found = judge_hypotheses(several, ours + theirs, REFERENCE)
    assert {each.p for each in found} == {1 / 64}
    assert {each.corrected_p for each in found} == {4 / 64}
    assert LEVEL < 4 / 64
    assert {each.outcome for each in found} == {"undecided"}


def test_the_record_keeps_every_version_and_how_much_had_been_run(tmp_path: Path):
    first = {"h1": expects()}
    assert write_down(tmp_path, {}, 0) == ()
    assert not (tmp_path / RECORD_FILE).exists()
    (version,) = write_down(tmp_path, first, 0)
    assert version["finished_runs"] == 0
    assert version["hypotheses"]["h1"]["by"] == 0.0
    assert write_down(tmp_path, first, 5) == (version,)
    changed = write_down(tmp_path, {"h1": expects(by=0.1)}, 7)
    assert [each["finished_runs"] for each in changed] == [0, 7]
    assert changed[0] == version
    assert json.loads((tmp_path / RECORD_FILE).read_text()) == {"versions": list(changed)}
    words = record_words(changed)
    assert "before any run had come to its end; changed on" in words
    assert "after 7 runs had come to the end" in words
    # To drop one that does not please is a change, too.
    assert len(write_down(tmp_path, {}, 9)) == 3


def test_the_results_have_a_table_of_verdicts():
    ours, theirs = runs("ours", {"frechet": 0.1}), runs("theirs", {"frechet": 0.3})
    given = {"H1": expects(by=0.05, of_budget=0.5), "H2": expects(better="higher")}
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
        record=({"date": "2026-11-29T00:00:00+00:00", "finished_runs": 0, "hypotheses": {}},),
    )
    head, first, second = verdict_rows(result.verdicts)
    assert len(head) == len(first) == len(second)
    assert first[1:3] == ["holds", "+0.2 (+0.2, +0.2)"]
    assert second[1] == "fails"
    assert first[-1] == (
        "frechet of ours after 0.5 of the budget lower than of theirs by more than 0.05"
    )
    text = results_markdown(result)
    assert "## Hypotheses" in text
    assert "Written down on 2026-11-29T00:00:00+00:00, before any run" in text
    stored = result.to_json()["verdicts"]
    assert [each["outcome"] for each in stored] == ["holds", "fails"]
    json.dumps(stored)


def test_a_margin_below_zero_reads_as_not_much_worse():
    assert expectation_words(expects(by=-0.01)) == (
        "frechet of ours lower than of theirs, or worse by less than 0.01"
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
