"""Work in other processes: order, errors, and processes that die."""

import ctypes
import os
import threading
import time

import pytest

from pipelines.data.clips.hang_guard import guarded
from pipelines.data.making.ordered_pool import Died, map_in_order
from sgmd_core.errors import ConfigError


def slow_square(number: int) -> int:
    time.sleep(0.02 * (number % 3))
    return number * number


def die_at_three(number: int) -> int:
    if number == 3:
        os._exit(7)
    return number


def die_after_one(number: int) -> int:
    if number == 0:
        os._exit(7)
    if number == 1:
        # As where memory runs out a moment after the answer was sent.
        threading.Timer(0.3, os._exit, [7]).start()
    return number


def hang_at_three(number: int) -> int:
    with guarded():
        if number == 3:
            # Called so, a function of C keeps the interpreter's lock: no thread of ours could act.
            ctypes.PyDLL(None).sleep(60)
        time.sleep(0.02)
    return number


def fail_at_two(number: int) -> int:
    if number == 2:
        raise KeyError("two")
    return number


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [0, 2])
def test_results_come_in_the_order_of_the_items(num_processes):
    assert list(map_in_order(slow_square, range(9), num_processes)) == [n * n for n in range(9)]


@pytest.mark.slow
def test_items_are_taken_only_as_places_become_free():
    taken = []

    def items():
        for number in range(50):
            taken.append(number)
            yield number

    results = map_in_order(slow_square, items(), 2)
    assert next(results) == 0
    assert len(taken) <= 4
    results.close()


@pytest.mark.slow
def test_an_item_that_ends_its_process_is_named_and_the_others_come_through():
    assert list(map_in_order(die_at_three, range(8), 2)) == [0, 1, 2, Died(3), 4, 5, 6, 7]


@pytest.mark.slow
def test_a_process_that_ends_between_two_items_costs_none():
    found = []
    # 0 and 1 end the process, so what is under way with them is tried one by one.
    for result in map_in_order(die_after_one, range(4), 1):
        found.append(result)
        time.sleep(1.0)
    assert found == [Died(0), 1, 2, 3]


@pytest.mark.parametrize("limit_s", [float("inf"), float("nan"), -1.0, 1e10])
def test_a_limit_that_no_timer_takes_is_refused(limit_s):
    with pytest.raises(ConfigError, match="max-hang-seconds"):
        next(map_in_order(slow_square, range(3), 1, max_hang_s=limit_s))


@pytest.mark.slow
def test_an_item_that_hangs_in_a_decoder_is_named_and_the_others_come_through():
    found = list(map_in_order(hang_at_three, range(6), 2, max_hang_s=2.0))
    assert found == [0, 1, 2, Died(3, hung=True), 4, 5]
    assert list(map_in_order(hang_at_three, range(2), 0, max_hang_s=0.001)) == [0, 1]


@pytest.mark.slow
def test_an_error_of_the_function_is_raised():
    results = map_in_order(fail_at_two, range(4), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError, match="two"):
        next(results)
