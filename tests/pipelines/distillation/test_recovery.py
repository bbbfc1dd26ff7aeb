"""The budget of failures that a run recovers from."""

import pytest

from pipelines.distillation.recovery import FailureBudget

HOUR_S = 3600.0


def spend(budget: FailureBudget, *failures: tuple[int, float]) -> list[str]:
    return [budget.spend("the teacher died", iteration, now_s) for iteration, now_s in failures]


def test_failures_within_an_hour_are_counted_and_older_ones_forgotten():
    budget = FailureBudget(per_hour=2, per_iteration=9, backoff_s=1.0)
    early = spend(budget, (1, 0.0), (2, HOUR_S / 2), (3, HOUR_S + 1))
    assert early == ["", "", ""]
    (spent,) = spend(budget, (4, HOUR_S + 2))
    assert "3 failures within an hour" in spent
    assert "recovery.failures_per_hour is 2" in spent


def test_no_failure_is_repaired_where_none_is_allowed():
    (spent,) = spend(FailureBudget(per_hour=0, per_iteration=9, backoff_s=1.0), (0, 0.0))
    assert spent


def test_failures_at_one_iteration_are_counted_by_themselves():
    budget = FailureBudget(per_hour=100, per_iteration=2, backoff_s=1.0)
    # The second one comes while iterations are made again.
    assert spend(budget, (7, 0.0), (5, 1.0), (7, 2.0)) == ["", "", ""]
    (spent,) = spend(budget, (7, 3.0))
    assert "3 failures at iteration 7, and recovery.failures_per_iteration is 2" in spent
    assert spend(budget, (8, 4.0)) == [""]
    assert budget.story.count("the teacher died") == 5
    assert "iteration 5" in budget.story


@pytest.mark.parametrize(("failures", "pause_s"), [(1, 0.0), (2, 3.0), (3, 6.0), (9, 60.0)])
def test_the_pause_doubles_with_each_failure_at_one_iteration(failures, pause_s):
    budget = FailureBudget(per_hour=100, per_iteration=100, backoff_s=3.0)
    spend(budget, *((4, float(second)) for second in range(failures)))
    assert budget.pause_s == pause_s


def test_a_failure_at_another_iteration_is_repaired_at_once():
    budget = FailureBudget(per_hour=100, per_iteration=100, backoff_s=3.0)
    spend(budget, (4, 0.0), (4, 1.0), (5, 2.0))
    assert budget.pause_s == 0.0
