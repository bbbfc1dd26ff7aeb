"""AdamW, clip, warm-up and average, against numbers worked out by hand."""

import math
from typing import get_args

import pytest
import torch
from torch import nn

from sgmd_core.errors import ConfigError
from tests.helpers.tiny_wan import tiny_velocity
from workers.ema import AveragedWeights, effective_decay
from workers.network_settings import OptimizerSettings
from workers.optimizer import RoleOptimizer, learning_rate
from workers.rate_courses import CONSTANT, COURSES, Course


class Numbers(nn.Module):
    """A network that is nothing but its parameters."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def _updated(network: Numbers, settings: OptimizerSettings, *gradients: list[float]):
    optimizer = RoleOptimizer("generator", network, settings)
    for gradient in gradients:
        network.values.grad = torch.tensor(gradient, dtype=torch.float64)
        report = optimizer.gradient_report(optimizer.updates)
        optimizer.step(optimizer.updates)
    return optimizer, report


def test_first_update_without_momentum_moves_by_the_rate_and_decays():
    # Bias correction makes the first step lr * g / |g|, whatever the gradient's size.
    settings = OptimizerSettings(lr=0.1, weight_decay=0.5, eps=1e-12)
    network = Numbers(2.0, -3.0)
    _updated(network, settings, [4.0, -0.5])
    expected = torch.tensor([2.0 * (1 - 0.05) - 0.1, -3.0 * (1 - 0.05) + 0.1], dtype=torch.float64)
    torch.testing.assert_close(network.values.detach(), expected, rtol=1e-9, atol=0)


def test_clipping_scales_all_gradients_by_one_global_norm():
    # eps far above the gradients turns AdamW into plain descent, which shows their size.
    settings = OptimizerSettings(lr=1.0, weight_decay=0.0, eps=1e6, max_grad_norm=1.0)
    network = Numbers(0.0, 0.0)
    _, report = _updated(network, settings, [30.0, 40.0])
    assert report.grad_norm == pytest.approx(50.0)
    expected = torch.tensor([-0.6e-6, -0.8e-6], dtype=torch.float64)
    torch.testing.assert_close(network.values.detach(), expected, rtol=1e-5, atol=0)


def test_gradients_below_the_limit_are_not_clipped():
    settings = OptimizerSettings(lr=1.0, weight_decay=0.0, eps=1e6, max_grad_norm=100.0)
    network = Numbers(0.0, 0.0)
    _updated(network, settings, [30.0, 40.0])
    expected = torch.tensor([-30e-6, -40e-6], dtype=torch.float64)
    torch.testing.assert_close(network.values.detach(), expected, rtol=1e-4, atol=0)


def test_rate_rises_linearly_over_the_warm_up_and_then_stays():
    settings = OptimizerSettings(lr=0.8, warmup_iterations=4)
    assert [learning_rate(settings, count) for count in range(6)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 0.8, 0.8]
    )
    assert learning_rate(OptimizerSettings(lr=0.8), 0) == 0.8


@pytest.mark.parametrize(
    ("decay", "middle"), [("linear", 0.1 + 0.9 * 0.75), ("cosine", 0.1 + 0.9 * 0.8535533906)]
)
def test_rate_falls_from_the_warm_up_to_its_end_and_stays_there(decay, middle):
    settings = OptimizerSettings(
        lr=2.0, warmup_iterations=2, decay=decay, decay_iterations=10, final_lr_ratio=0.1
    )
    rates = [learning_rate(settings, count) / 2 for count in range(14)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[4] == pytest.approx(middle)
    assert rates[6] == pytest.approx(0.55)
    assert rates[10:] == pytest.approx([0.1] * 4)
    assert rates[2:11] == sorted(rates[2:11], reverse=True)


def test_every_course_that_a_recipe_may_name_is_constant_or_has_a_factor():
    assert get_args(Course) == (CONSTANT, *COURSES)
    assert [(course(0.0), course(1.0)) for course in COURSES.values()] == [(1, 0)] * len(COURSES)
    with pytest.raises(ConfigError, match=r"optimizer\.decay .*'cubic'.*'constant', 'linear'"):
        OptimizerSettings(lr=0.1, decay="cubic", decay_iterations=1)  # pyright: ignore


def test_norms_of_layers_add_up_to_the_norm_of_the_whole():
    network = tiny_velocity()
    plain, logged = (OptimizerSettings(lr=0.1, log_block_norms=on) for on in (False, True))
    optimizer = RoleOptimizer("generator", network, logged)
    for index, value in enumerate(network.parameters()):
        value.grad = torch.full_like(value, 0.1 * (index % 7))
    report = optimizer.gradient_report(0)
    assert set(report.blocks) == {
        "transformer.blocks.0",
        "transformer.blocks.1",
        "outside_layers",
    }
    assert min(report.blocks.values()) > 0
    assert math.hypot(*report.blocks.values()) == pytest.approx(report.grad_norm, rel=1e-5)
    other = RoleOptimizer("generator", network, plain)
    assert other.gradient_report(0).blocks == {}


def test_warm_up_reaches_the_weights():
    settings = OptimizerSettings(lr=0.8, weight_decay=0.0, eps=1e-12, warmup_iterations=4)
    network = Numbers(0.0)
    _updated(network, settings, [5.0])
    assert network.values.item() == pytest.approx(-0.2)


def test_updates_are_counted_and_gradients_forgotten():
    network = Numbers(1.0)
    optimizer, _ = _updated(network, OptimizerSettings(lr=0.1), [1.0], [2.0], [-1.0])
    assert optimizer.updates == 3
    assert network.values.grad is None


def test_average_follows_its_formula():
    network = Numbers(1.0)
    average = AveragedWeights(network, decay=0.25)
    expected = 1.0
    for updates, value in enumerate([2.0, 4.0, -1.0, 0.5]):
        network.values.data.fill_(value)
        average.update(updates)
        kept = min(0.25, (1 + updates) / (10 + updates))
        expected = kept * expected + (1 - kept) * value
    assert average.average["values"].item() == pytest.approx(expected)


def test_the_cap_forgets_the_initial_weights_and_meets_the_decay():
    left = 1.0
    for updates in range(100):
        left *= effective_decay(0.99, updates)
    assert left < 1e-10
    assert effective_decay(0.99, 890) == pytest.approx(0.99)
    assert effective_decay(0.99, 10_000) == 0.99


def test_average_of_half_precision_weights_is_kept_in_float32():
    network = Numbers(1.0).bfloat16()
    average = AveragedWeights(network, decay=0.9)
    assert average.average["values"].dtype == torch.float32
