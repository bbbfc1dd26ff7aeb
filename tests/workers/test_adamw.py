"""AdamW as one kernel: where it runs, and how states of either kernel go on in the other."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils import _foreach_utils

from sgmd_core.errors import CheckpointError
from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.roles import same_bits
from workers.adamw import FUSED_DEVICES, make_adamw, restore_moments
from workers.ema import AveragedWeights
from workers.network_settings import OptimizerSettings
from workers.optimizer import RoleOptimizer
from workers.role_state import RoleState

SETTINGS = OptimizerSettings(lr=1e-2, betas=(0.9, 0.999), max_grad_norm=1e6)
OPTIONS = {"lr": SETTINGS.lr, "betas": SETTINGS.betas, "weight_decay": SETTINGS.weight_decay}
NUM_UPDATES = 3
TOLERANCE = 1e-6


class Layers(nn.Module):
    """Tensors of several sizes, one of them a scalar's."""

    def __init__(self, row: int = 7) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        for name, shape in (("matrix", (33, row)), ("vector", (5,)), ("single", (1,))):
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=made)))

    def learn(self, update: int) -> None:
        """Gives every parameter a gradient that depends on the update's number."""
        for place, value in enumerate(self.parameters()):
            made = torch.Generator().manual_seed(100 * update + place)
            value.grad = torch.randn(value.shape, generator=made)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def by_single_operations(network: Layers, updates: range) -> torch.optim.AdamW:
    """Updates a network with torch's unfused AdamW."""
    optimizer = torch.optim.AdamW(network.parameters(), **OPTIONS, fused=False)
    for update in updates:
        network.learn(update)
        optimizer.step()
    return optimizer


def steps(network: Layers, optimizer: RoleOptimizer, updates: range) -> None:
    for update in updates:
        network.learn(update)
        optimizer.gradient_report(update)
        optimizer.step(update)


def saved_by(network: Layers, optimizer: torch.optim.AdamW) -> RoleState:
    """What a checkpoint holds of a role that was updated by this optimizer."""
    moments = {
        f"{kind}/{name}": value.clone()
        for name, parameter in network.named_parameters()
        for kind, value in optimizer.state[parameter].items()
    }
    return RoleState(NUM_UPDATES, weights_of(network), moments)


def kernels_of(update) -> set[str]:
    """Names of the operations that a call runs."""
    with profile() as recorded:
        update()
    return {event.key for event in recorded.key_averages()}


def test_an_update_is_one_kernel_and_its_numbers_are_those_of_single_operations():
    network, plain = Layers(), Layers()
    optimizer = RoleOptimizer("generator", network, SETTINGS)
    steps(network, optimizer, range(NUM_UPDATES))
    by_single_operations(plain, range(NUM_UPDATES))
    assert_moves(weights_of(plain), weights_of(Layers()), TOLERANCE)
    assert relative_error(weights_of(network), weights_of(plain)) < TOLERANCE
    run = kernels_of(lambda: steps(network, optimizer, range(NUM_UPDATES, NUM_UPDATES + 1)))
    assert "aten::_fused_adamw_" in run
    assert "aten::addcdiv_" not in run


def test_a_device_without_the_kernel_gets_single_operations():
    value = nn.Parameter(torch.zeros(3, device="meta"))
    value.grad = torch.zeros_like(value)
    with pytest.raises(RuntimeError, match="fused"):
        torch.optim.AdamW([value], fused=True).step()
    make_adamw([value], **OPTIONS).step()


def test_every_device_that_is_given_the_kernel_has_one():
    supported = set(_foreach_utils._get_fused_kernels_supported_devices())
    assert supported >= FUSED_DEVICES


@pytest.mark.parametrize("step_dtype", [torch.float32, torch.float64])
def test_a_checkpoint_of_the_unfused_optimizer_goes_on_in_the_kernel(step_dtype):
    old, resumed, without = Layers(), Layers(), Layers()
    unfused = by_single_operations(old, range(NUM_UPDATES))
    state = saved_by(old, unfused)
    for name in weights_of(old):
        state.moments[f"step/{name}"] = state.moments[f"step/{name}"].to(step_dtype)
    optimizer = RoleOptimizer("generator", resumed, SETTINGS)
    optimizer.load_state(state)
    assert optimizer._adamw.param_groups[0]["fused"]
    more = range(NUM_UPDATES, 2 * NUM_UPDATES)
    steps(resumed, optimizer, more)
    for update in more:
        old.learn(update)
        unfused.step()
    # An optimizer that has lost its moments moves elsewhere.
    without.load_state_dict(state.weights)
    by_single_operations(without, more)
    assert_moves(weights_of(old), weights_of(without), TOLERANCE)
    assert relative_error(weights_of(resumed), weights_of(old)) < TOLERANCE


@pytest.mark.parametrize("kept", [True, False])
def test_saved_groups_do_not_decide_which_kernel_runs(kept):
    saver, loader = Layers(), Layers()
    saved = torch.optim.AdamW(saver.parameters(), **OPTIONS, fused=kept)
    saver.learn(0)
    saved.step()
    here = torch.optim.AdamW(loader.parameters(), **OPTIONS, fused=not kept)
    restore_moments(here, deepcopy(saved.state_dict()["state"]))
    assert here.param_groups[0]["fused"] is not kept
    for network, optimizer in ((saver, saved), (loader, here)):
        network.load_state_dict(weights_of(Layers()))
        network.learn(1)
        optimizer.step()
    assert_moves(weights_of(saver), weights_of(Layers()), TOLERANCE)
    assert relative_error(weights_of(loader), weights_of(saver)) < TOLERANCE


def by_torch(network: Layers, betas: tuple[float, float], updates: range) -> torch.optim.AdamW:
    """Updates a network with torch's AdamW, which always keeps both moments."""
    optimizer = torch.optim.AdamW(network.parameters(), **OPTIONS | {"betas": betas}, fused=True)
    for update in updates:
        network.learn(update)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("moments", ["device", "cpu"])
def test_what_is_kept_of_the_moments_and_where_changes_no_bit_and_resumes(moments, beta1):
    betas = (beta1, 0.999)
    settings = replace(SETTINGS, betas=betas, moments=moments)
    network, plain, resumed = Layers(), Layers(), Layers()
    optimizer = RoleOptimizer("generator", network, settings)
    steps(network, optimizer, range(NUM_UPDATES))
    state = optimizer.state()
    steps(network, optimizer, range(NUM_UPDATES, 2 * NUM_UPDATES))
    other = RoleOptimizer("generator", resumed, settings)
    other.load_state(state)
    steps(resumed, other, range(NUM_UPDATES, 2 * NUM_UPDATES))
    by_torch(plain, betas, range(2 * NUM_UPDATES))
    without = Layers()
    by_torch(without, (0.5, 0.999), range(2 * NUM_UPDATES))
    assert_moves(weights_of(plain), weights_of(without))
    assert same_bits(weights_of(network), weights_of(plain))
    assert same_bits(weights_of(resumed), weights_of(plain))
    kinds = {"exp_avg_sq", "step"} | ({"exp_avg"} if beta1 else set())
    assert {name.split("/")[0] for name in state.moments} == kinds


def test_without_momentum_the_optimizer_holds_one_number_a_parameter():
    network = Layers()
    optimizer = RoleOptimizer("generator", network, replace(SETTINGS, betas=(0.0, 0.999)))
    steps(network, optimizer, range(1))
    held = sum(
        value.numel() for state in optimizer._adamw.state.values() for value in state.values()
    )
    num_parameters = sum(value.numel() for value in network.parameters())
    assert held == num_parameters + len(list(network.parameters()))


def test_a_checkpoint_with_needless_first_moments_goes_on_bitwise():
    old, resumed = Layers(), Layers()
    betas = (0.0, 0.999)
    state = saved_by(old, by_torch(old, betas, range(NUM_UPDATES)))
    assert any(name.startswith("exp_avg/") for name in state.moments)
    optimizer = RoleOptimizer("generator", resumed, replace(SETTINGS, betas=betas))
    optimizer.load_state(state)
    steps(resumed, optimizer, range(NUM_UPDATES, 2 * NUM_UPDATES))
    expected = Layers()
    by_torch(expected, betas, range(2 * NUM_UPDATES))
    assert_moves(weights_of(expected), weights_of(old))
    assert same_bits(weights_of(resumed), weights_of(expected))
    assert not any(name.startswith("exp_avg/") for name in optimizer.state().moments)


def test_a_checkpoint_without_the_first_moments_that_betas_need_is_refused_by_name():
    network = Layers()
    saver = RoleOptimizer("generator", network, replace(SETTINGS, betas=(0.0, 0.999)))
    steps(network, saver, range(1))
    loader = RoleOptimizer("generator", Layers(), SETTINGS)
    with pytest.raises(CheckpointError, match="no exp_avg in it") as refused:
        loader.load_state(saver.state())
    assert "betas" in str(refused.value)


def test_an_average_in_main_memory_has_the_bits_of_one_on_the_device():
    network = Layers()
    kept, offloaded = AveragedWeights(network, 0.9), AveragedWeights(network, 0.9, offload=True)
    for update in range(NUM_UPDATES):
        with torch.no_grad():
            for value in network.parameters():
                value.add_(update + 0.3)
        kept.update(update)
        offloaded.update(update)
    assert_moves(dict(kept.average), weights_of(network))
    assert same_bits(dict(offloaded.shards()), dict(kept.average))


def test_the_average_of_all_tensors_at_once_has_the_bits_of_one_after_another():
    network = Layers()
    average = AveragedWeights(network, decay=0.99)
    expected = weights_of(network)
    for update in range(NUM_UPDATES):
        with torch.no_grad():
            for value in network.parameters():
                value.add_(update + 0.3)
        for name, value in weights_of(network).items():
            expected[name].lerp_(value, 1 - (1 + update) / (10 + update))
        average.update(update)
    assert_moves(expected, weights_of(Layers()))
    assert all(torch.equal(average.average[name], value) for name, value in expected.items())


def test_moments_in_8_bits_move_weights_as_those_in_32_and_go_on_bitwise():
    start, rough, exact, resumed = (Layers(row=96) for _ in range(4))
    settings = replace(SETTINGS, betas=(0.0, 0.999))
    in_8_bits = replace(settings, moment_bits=8)
    optimizer = RoleOptimizer("generator", rough, in_8_bits)
    steps(rough, optimizer, range(NUM_UPDATES))
    state = optimizer.state()
    # Vectors keep theirs in float32.
    kinds = {name.split("/")[0] for name in state.moments}
    assert kinds == {"exp_avg_sq_codes", "exp_avg_sq_bases", "exp_avg_sq", "step"}
    steps(exact, RoleOptimizer("generator", exact, settings), range(NUM_UPDATES))
    off = relative_error(weights_of(rough), weights_of(exact))
    moved = relative_error(weights_of(start), weights_of(exact))
    # A step of the grid is 7 % of a moment, which is 4 % of an update.
    assert 0 < off < 0.1 * moved
    again = RoleOptimizer("generator", resumed, in_8_bits)
    again.load_state(state)
    for network, each in ((rough, optimizer), (resumed, again)):
        steps(network, each, range(NUM_UPDATES, 2 * NUM_UPDATES))
    assert same_bits(weights_of(resumed), weights_of(rough))
    loader = RoleOptimizer("generator", Layers(row=96), settings)
    with pytest.raises(CheckpointError, match="no exp_avg_sq in it") as refused:
        loader.load_state(state)
    assert "moment_bits" in str(refused.value)
