"""The order of calls in one iteration, as a pure function."""

from itertools import accumulate

import pytest

from pipelines.iteration import Stage, stage_order

SIZES = [(m, w) for m in (1, 2, 3, 4, 8) for w in (1, 2, 3, 8)]


@pytest.mark.parametrize(("micro_batches", "window"), SIZES)
def test_every_micro_batch_rolls_out_once_and_then_learns_once(
    micro_batches: int, window: int
) -> None:
    order = stage_order(micro_batches, window)
    for stage in Stage:
        assert [index for kind, index in order if kind is stage] == list(range(micro_batches))
    for index in range(micro_batches):
        assert order.index((Stage.ROLLOUT, index)) < order.index((Stage.LEARN, index))


@pytest.mark.parametrize(("micro_batches", "window"), SIZES)
def test_at_most_window_rollouts_are_kept_at_once(micro_batches: int, window: int) -> None:
    steps = [1 if kind is Stage.ROLLOUT else -1 for kind, _ in stage_order(micro_batches, window)]
    assert max(accumulate(steps)) == min(window, micro_batches)
