"""What a narrower wire does to what the roles tell one another."""

import pytest
import torch

from cluster.transfer import from_wire, to_wire
from pipelines.config.recipe import load_recipe
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.types import GRADIENT, VALUE, GeneratorSignal, NoisedBatch, TeacherPrediction
from tests.helpers.small_network import SmallNetwork, random_query
from workers.fake_score_tracker import FakeScoreTracker
from workers.settings import FakeScoreSettings


def sent(value, *kinds):
    return from_wire(to_wire(value, bf16_kinds=set(kinds)))


def signal_of(query: NoisedBatch, *kinds: str) -> GeneratorSignal:
    """What the fake score answers to a query and a prediction that came over the wire."""
    tracker = FakeScoreTracker(SmallNetwork(seed=1), SgmdObjective(), FakeScoreSettings())
    with torch.no_grad():
        prediction = TeacherPrediction(
            query.key, SmallNetwork(seed=2)(query.x_t, query.sigma, query.text)
        )
    return tracker.signal(sent(query, *kinds), sent(prediction, *kinds), 1.0)


def test_a_recipe_says_what_is_rounded_and_rounds_nothing_by_itself():
    assert load_recipe("tiny").topology.bf16_kinds == frozenset()
    values = load_recipe("tiny", ["topology.wire_dtype=bf16"]).topology
    assert values.bf16_kinds == {VALUE}
    both = load_recipe(
        "tiny", ["topology.wire_dtype=bf16", "topology.gradient_wire_dtype=bf16"]
    ).topology
    assert both.bf16_kinds == {VALUE, GRADIENT}


def test_rounding_is_no_part_of_what_names_a_run():
    exact, rounded = (
        load_recipe("tiny", settings) for settings in ([], ["topology.wire_dtype=bf16"])
    )
    assert exact.digest == rounded.digest


def test_noise_levels_and_keys_are_never_rounded():
    query = random_query(torch.float32)
    received = sent(query, VALUE, GRADIENT)
    assert torch.equal(received.sigma, query.sigma)
    assert received.key == query.key
    assert torch.equal(received.x0, query.x0.bfloat16().float())
    # Rounding would have changed the noise levels too.
    assert not torch.equal(query.sigma.bfloat16().to(query.sigma.dtype), query.sigma)
    assert not torch.equal(received.x0, query.x0)


def test_a_gradient_keeps_its_bits_when_only_values_are_rounded():
    signal = signal_of(random_query())
    assert torch.equal(sent(signal, VALUE).grad_x0, signal.grad_x0)
    assert not torch.equal(sent(signal, GRADIENT).grad_x0, signal.grad_x0)


def test_a_rounded_query_changes_the_signal_by_some_tenths_of_a_per_cent():
    query = random_query()
    exact, rounded = signal_of(query).grad_x0, signal_of(query, VALUE).grad_x0
    error = float((rounded - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.005
    cosine = torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-3)
