"""Runs that end before a part of their method begins."""

import logging

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.study.plan import plan_study

LOW = "the low-noise expert is never trained"
MATCHING = "the matching on own samples never begins"
RATE = "the learning rate never exceeds 9e-06 of 1e-05"
FIVE_UPDATES = ["objective.fake_updates=5", "fake_score.tracking=fresh"]
OFF = "the loss off the trajectory never has more than"


@pytest.mark.parametrize(
    ("recipe", "settings", "expected"),
    [
        ("tiny-phased", ["iterations=50"], LOW),
        ("tiny-phased", ["iterations=51"], ""),
        ("tiny-phased", ["iterations=1", "objective.order=alternate"], LOW),
        ("tiny-phased", ["iterations=2", "objective.order=alternate"], ""),
        ("tiny-rcm", ["iterations=50"], MATCHING),
        ("tiny-rcm", ["iterations=51"], ""),
        (
            "tiny-rcm",
            ["iterations=50", "objective.matching_weight=0", "objective.fake_updates=1"],
            "the tangent never counts in full",
        ),
        ("tiny-rcm", ["iterations=50", "objective.consistency.weight=0"], ""),
        ("tiny-cdm", ["iterations=100", "objective.off_trajectory_warmup=1000"], f"{OFF} 0.099"),
        ("tiny-cdm", ["iterations=101", "objective.off_trajectory_warmup=100"], ""),
        (
            "tiny-cdm",
            ["objective.off_trajectory_warmup=1000", "objective.off_trajectory=0"],
            "",
        ),
        ("tiny", ["iterations=9", "generator.optimizer.warmup_iterations=10"], RATE),
        ("tiny", ["iterations=10", "generator.optimizer.warmup_iterations=10"], ""),
        (
            "tiny",
            ["iterations=9", "fake_score.optimizer.warmup_iterations=46", *FIVE_UPDATES],
            "the learning rate never exceeds",
        ),
        ("tiny", ["iterations=9", "fake_score.optimizer.warmup_iterations=45", *FIVE_UPDATES], ""),
        *((name, [], "") for name in ("tiny", "tiny-phased", "tiny-rcm", "tiny-cdm", "tiny-tmd")),
    ],
)
def test_a_run_that_never_reaches_a_part_of_its_method_is_warned_of(
    recipe: str, settings: list[str], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_recipe(recipe, settings)
    told = [record.getMessage() for record in caplog.records if "iterations " in record.message]
    assert len(told) == bool(expected)
    assert all(expected in sentence for sentence in told)


def test_a_study_says_which_variants_its_budget_is_too_short_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = ["study.budget={unit: iterations, amount: 40}", "iterations=100"]
    config = load_recipe("tiny-phased", settings)
    with caplog.at_level(logging.WARNING):
        plan_study(config)
    told = [text for text in caplog.messages if LOW in text]
    # Not of the variant in turns, nor of dmd2.
    assert [text.partition(":")[0] for text in told] == ["runs of phased", "runs of phased-paper"]
