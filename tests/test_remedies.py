"""Remedies name the likely cause: broken weights before the first update, a rate after it."""

import pytest
import torch

from sgmd_core.errors import NonFiniteError, non_finite_remedy
from workers.network_settings import OptimizerSettings
from workers.optimizer import RoleOptimizer


def test_before_the_first_update_no_rate_is_blamed():
    assert "no rate is at fault" in non_finite_remedy(0, "optimizer.lr")
    assert "optimizer.lr" not in non_finite_remedy(0, "optimizer.lr")
    assert non_finite_remedy(3, "optimizer.lr").startswith("Lower optimizer.lr")


@pytest.mark.parametrize("updates", [0, 2])
def test_an_optimizer_blames_its_rate_only_once_it_has_been_used(updates):
    network = torch.nn.Linear(2, 1)
    optimizer = RoleOptimizer("generator", network, OptimizerSettings(lr=0.1))
    for value in [1.0] * updates + [float("nan")]:
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.gradient_report(optimizer.updates)
        if value == 1.0:
            optimizer.step(optimizer.updates)
    with pytest.raises(NonFiniteError) as caught:
        optimizer.step(optimizer.updates)
    assert ("no rate is at fault" in caught.value.remedy) == (updates == 0)
