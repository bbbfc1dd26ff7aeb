"""A training ends by iterations or by time, and saves at equal distances of its time."""

import itertools

from pipelines.run.stop_rule import StopRule


def test_iterations_end_it_where_no_time_is_set():
    rule = StopRule(3)
    assert [rule.is_reached(made, 1e9) for made in (2, 3, 4)] == [False, True, True]
    assert not rule.saves_between(0.0, 1e9)


def test_time_ends_it_before_its_iterations():
    rule = StopRule(100, max_seconds=10.0)
    assert not rule.is_reached(99, 9.9)
    assert rule.is_reached(1, 10.0)
    assert rule.is_reached(100, 0.0)


def test_states_are_saved_at_equal_distances_the_last_at_the_end():
    rule = StopRule(100, max_seconds=10.0, num_saves=4)
    moments = [0.0, 1.0, 2.4, 2.6, 4.9, 5.0, 9.0, 10.2]
    due = [now for before, now in itertools.pairwise(moments) if rule.saves_between(before, now)]
    assert due == [2.6, 5.0, 9.0, 10.2]
