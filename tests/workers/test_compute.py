"""Ways of computing change the rounding and nothing else, for both losses and both players."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.helpers.moves import assert_every_tensor_moves, assert_moves, relative_error
from tests.helpers.roles import (
    Roles,
    gather,
    gradients,
    same_bits,
    tiny_roles,
    weights,
)
from workers.compute import prepare_network
from workers.settings import ComputeSettings

BATCHES = ((0, 1), (2, 3))


def gradients_of(
    roles: Roles, settings: ComputeSettings, batches: Sequence[Sequence[int]] = BATCHES
) -> dict[str, dict[str, Tensor]]:
    for network in roles.networks.values():
        prepare_network(network, settings)
    gather(roles, 0, batches)
    return {role: gradients(roles.networks[role]) for role in ("generator", "fake_score")}


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Tensor]]:
    return gradients_of(tiny_roles(), ComputeSettings())


def test_the_gradients_compared_here_depend_on_what_is_computed(plain):
    # Other noise and captions for the same weights; compiled layers may differ by 1e-4.
    other = gradients_of(tiny_roles(), ComputeSettings(), ((4, 5), (6, 7)))
    for role in plain:
        assert_moves(plain[role], other[role], 1e-4)
        assert_every_tensor_moves(plain[role], other[role])


def test_checkpointing_repeats_every_bit(plain):
    found = gradients_of(tiny_roles(), ComputeSettings(checkpointing=True))
    assert all(same_bits(found[role], plain[role]) for role in plain)


def test_checkpointing_keeps_fewer_activations():
    kept: list[int] = []
    for checkpointing in (False, True):
        roles = tiny_roles()
        network = prepare_network(
            roles.networks["fake_score"], ComputeSettings(checkpointing=checkpointing)
        )
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(torch.ones(2, 4, 3, 4, 4), torch.full((2,), 0.5), torch.ones(2, 6, 8))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_bf16_rounds_products_and_leaves_weights_and_gradients_in_float32(plain):
    roles = tiny_roles()
    before = {role: weights(network) for role, network in roles.networks.items()}
    found = gradients_of(roles, ComputeSettings(precision="bf16"))
    for role in plain:
        assert same_bits(weights(roles.networks[role]), before[role])
        assert {value.dtype for value in found[role].values()} == {torch.float32}
        # bfloat16 has 8 bits; errors of some layers add up, and there must be some.
        assert 1e-4 < relative_error(found[role], plain[role]) < 0.1


# torch.compile warns while it looks at tensors, and here warnings are errors.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_make_the_same_gradients(plain, checkpointing):
    settings = ComputeSettings(compile=True, checkpointing=checkpointing)
    found = gradients_of(tiny_roles(), settings)
    for role in plain:
        assert relative_error(found[role], plain[role]) < 1e-4
