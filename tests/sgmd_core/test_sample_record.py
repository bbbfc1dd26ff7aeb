"""Cut and joined again, a record is what it was; metrics of a whole are weighted means."""

import pytest
import torch

from sgmd_core.types import GeneratorSignal, MicroBatchKey, NoisedBatch, TextBatch

KEY = MicroBatchKey(2, 1)


def a_query(num_samples: int = 5) -> NoisedBatch:
    x0 = torch.arange(num_samples * 8.0).reshape(num_samples, 1, 2, 2, 2)
    sigma = torch.linspace(0.1, 0.9, num_samples)
    return NoisedBatch(x0, sigma, -x0, torch.ones(num_samples, 3, 2), KEY, 7)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_record_cut_in_two_and_joined_is_the_record(at: int):
    query = a_query()
    parts = [query.cut(0, at), query.cut(at, 5)]
    assert [part.num_samples for part in parts] == [at, 5 - at]
    again = NoisedBatch.joined(parts)
    assert (again.key, again.generator_version) == (KEY, 7)
    for name in ("x0", "sigma", "noise", "text"):
        assert torch.equal(getattr(again, name), getattr(query, name))


def test_sample_indices_go_with_their_samples():
    batch = TextBatch(torch.ones(4, 3, 2), (8, 9, 10, 11))
    assert batch.cut(1, 3).sample_indices == (9, 10)
    assert TextBatch.joined([batch.cut(0, 1), batch.cut(1, 4)]).sample_indices == (8, 9, 10, 11)


def test_metrics_are_weighted_by_samples():
    one = GeneratorSignal(KEY, torch.zeros(1, 1, 1, 1, 1), 0, {"fisher": 4.0})
    three = GeneratorSignal(KEY, torch.ones(3, 1, 1, 1, 1), 0, {"fisher": 8.0})
    whole = GeneratorSignal.joined([one, three])
    assert whole.metrics == {"fisher": 7.0}
    assert whole.grad_x0.flatten().tolist() == [0.0, 1.0, 1.0, 1.0]
