"""Dropped captions: the share that was asked for, counted draws, and the empty caption instead."""

import pytest

from pipelines.distillation.prompts import dropped_rows
from pipelines.distillation.run import distill
from tests.e2e.conftest import MakeRecipe
from tests.e2e.test_equivalence import drop_checkpoint, moments, state
from tests.helpers.moves import assert_moves


def test_the_share_is_that_of_the_setting_and_each_iteration_has_draws_of_its_own():
    drawn = [dropped_rows(0, iteration, 0, 100, 0.2) for iteration in range(100)]
    assert sum(map(len, drawn)) / 10_000 == pytest.approx(0.2, abs=0.015)
    assert len(set(drawn)) == 100
    assert drawn[3] == dropped_rows(0, 3, 0, 100, 0.2)
    assert drawn[3] != dropped_rows(1, 3, 0, 100, 0.2)
    assert drawn[3] != dropped_rows(0, 3, 1, 100, 0.2)
    # A smaller share drops some of the same.
    assert dropped_rows(0, 3, 0, 100, 0.1) < drawn[3]
    assert dropped_rows(0, 3, 0, 100, 0.0) == frozenset()


@pytest.mark.slow
def test_a_resumed_run_drops_the_same_captions(make_recipe: MakeRecipe):
    settings = ["data.prompt_dropout=0.5", "checkpoint.every=2"]
    whole = make_recipe("name=whole", "iterations=4", *settings)
    distill(whole)
    distill(make_recipe("name=parts", "iterations=3", *settings))
    parts = make_recipe("name=parts", "iterations=4", *settings)
    drop_checkpoint(parts, 3)
    distill(parts, resume=True)
    assert state(parts, 4) == state(whole, 4)
    other = make_recipe("name=other", "iterations=4", "checkpoint.every=2")
    distill(other)
    assert_moves(moments(whole, 4), moments(other, 4))
