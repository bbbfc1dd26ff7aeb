"""Ways of computing change the rounding and nothing else, for both losses and both players."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from sgmd_core.errors import ConfigError
from tests.helpers.moves import assert_every_tensor_moves, assert_moves, relative_error
from tests.helpers.roles import (
    Roles,
    gather,
    gradients,
    same_bits,
    tiny_roles,
    weights,
)
from tests.helpers.tiny_wan import tiny_velocity
from workers.attention import require_kernel
from workers.compute import prepare_network
from workers.network_settings import ComputeSettings

BATCHES = ((0, 1), (2, 3))


def gradients_of(
    roles: Roles, settings: ComputeSettings, batches: Sequence[Sequence[int]] = BATCHES
) -> dict[str, dict[str, Tensor]]:
    for network in roles.networks.values():
        prepare_network(network, settings)
    return gathered(roles, batches)


def gathered(
    roles: Roles, batches: Sequence[Sequence[int]] = BATCHES
) -> dict[str, dict[str, Tensor]]:
    gather(roles, 0, batches)
    return {role: gradients(roles.networks[role]) for role in ("generator", "fake_score")}


class CountedAttention(TorchDispatchMode):
    """Counts calls of the CPU's fused attention that are really made."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        self.calls += int(func is attention)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Tensor]]:
    return gradients_of(tiny_roles(), ComputeSettings())


@pytest.mark.slow
def test_the_gradients_compared_here_depend_on_what_is_computed(plain):
    # Other noise and captions for the same weights; compiled layers may differ by 1e-4.
    other = gradients_of(tiny_roles(), ComputeSettings(), ((4, 5), (6, 7)))
    for role in plain:
        assert_moves(plain[role], other[role], 1e-4)
        assert_every_tensor_moves(plain[role], other[role])


@pytest.mark.parametrize("mode", [True, "selective", "offload"])
def test_checkpointing_repeats_every_bit(plain, mode):
    # With shared tracking each graph of the fake score is walked twice.
    found = gradients_of(tiny_roles(), ComputeSettings(checkpointing=mode))
    assert all(same_bits(found[role], plain[role]) for role in plain)


@pytest.mark.parametrize("mode", [True, "selective"])
def test_attention_is_made_again_unless_its_outputs_are_kept(mode):
    network = prepare_network(tiny_velocity(2), ComputeSettings(checkpointing=mode))
    clip = torch.ones(2, 4, 3, 4, 4, requires_grad=True)
    with CountedAttention() as counted:
        loss = network(clip, torch.full((2,), 0.5), torch.ones(2, 6, 8)).sum()
        torch.autograd.grad(loss, clip, retain_graph=True)
        loss.backward()
    layers = len(network.blocks)
    # Self- and cross-attention of each layer: once, and again in both walks.
    again = 2 * 2 * layers if mode is True else 2 * layers
    assert counted.calls == 2 * layers + again


def test_outputs_that_cannot_be_kept_are_refused_by_name():
    network = prepare_network(tiny_velocity(2), ComputeSettings(checkpointing="selective"))
    with (
        sdpa_kernel(SDPBackend.MATH),
        pytest.raises(ConfigError, match="no fused attention in WanTransformerBlock on cpu"),
    ):
        network(torch.ones(2, 4, 3, 4, 4), torch.full((2,), 0.5), torch.ones(2, 6, 8))


def test_offloaded_checkpointing_hands_the_streams_of_all_layers_to_main_memory(monkeypatch):
    network = prepare_network(tiny_velocity(2), ComputeSettings(checkpointing="offload"))
    handed: list[tuple[int, ...]] = []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def watched(pack, unpack):
        def packed(value):
            handed.append(tuple(value.shape))
            return pack(value)

        return hooks(packed, unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", watched)
    network(torch.ones(2, 4, 3, 4, 4), torch.full((2,), 0.5), torch.ones(2, 6, 8))
    width = network.blocks[0].scale_shift_table.shape[-1]
    assert [shape for shape in handed if shape == (2, 12, width)] == [(2, 12, width)] * len(
        network.blocks
    )


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


@pytest.mark.slow
def test_bf16_rounds_products_and_leaves_weights_and_gradients_in_float32(plain):
    roles = tiny_roles()
    before = {role: weights(network) for role, network in roles.networks.items()}
    found = gradients_of(roles, ComputeSettings(precision="bf16"))
    for role in plain:
        assert same_bits(weights(roles.networks[role]), before[role])
        assert {value.dtype for value in found[role].values()} == {torch.float32}
        # bfloat16 has 8 bits; errors of some layers add up, and there must be some.
        assert 1e-4 < relative_error(found[role], plain[role]) < 0.1


class TestAttention:
    def test_a_chosen_kernel_is_the_one_that_computes_in_its_role_alone(self):
        chosen, other = tiny_velocity(2), tiny_velocity(2)
        prepare_network(chosen, ComputeSettings(attention="_native_math"))
        prepare_network(other, ComputeSettings())
        calls = []
        for network in (chosen, other):
            with CountedAttention() as counted:
                network(torch.ones(2, 4, 3, 4, 4), torch.full((2,), 0.5), torch.ones(2, 6, 8))
            calls.append(counted.calls)
        assert calls == [0, 2 * len(other.blocks)]

    @pytest.mark.slow
    @pytest.mark.parametrize("checkpointing", [False, True, "offload"])
    def test_another_kernel_changes_the_rounding_of_both_losses_alone(self, plain, checkpointing):
        settings = ComputeSettings(checkpointing=checkpointing, attention="_native_math")
        found = gradients_of(tiny_roles(), settings)
        for role in plain:
            assert 0 < relative_error(found[role], plain[role]) < 1e-5

    def test_kernels_of_16_bits_and_of_libraries_get_queries_and_keys_in_16_bits(self, monkeypatch):
        network = tiny_velocity(2)
        # It also runs in float32 on a CPU, and is told apart by the hooks alone.
        prepare_network(network, ComputeSettings(precision="bf16", attention="_native_flash"))
        assert not network.transformer.blocks[0].attn1.norm_q._forward_hooks
        with pytest.raises(RuntimeError, match="flash-attn"):
            prepare_network(network, ComputeSettings(precision="bf16", attention="flash"))
        # It takes float32 as well, but queries, keys and values of one type alone.
        monkeypatch.setattr("diffusers.models.attention_dispatch._CAN_USE_XFORMERS_ATTN", True)
        for name in ("_native_cudnn", "xformers"):
            network = tiny_velocity(2)
            norm = network.transformer.blocks[0].attn1.norm_q
            queries = torch.ones(1, 2, norm.normalized_shape[0], dtype=torch.bfloat16)
            # As autocast makes it on a GPU, and not on a CPU.
            monkeypatch.setattr(norm, "forward", Tensor.float)
            assert norm(queries).dtype == torch.float32
            prepare_network(network, ComputeSettings(precision="bf16", attention=name))
            assert norm(queries).dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("name", "device", "words"),
        [
            ("flash", "cpu", "the role is computed on a CPU"),
            ("flash", "cuda", "the module flash_attn is not installed"),
            ("sage", "cuda", "the module sageattention is not installed"),
            ("_native_cudnn", "cpu", "a kernel that runs here: native, _native_flash"),
        ],
    )
    def test_a_kernel_that_does_not_run_here_is_refused_by_name(self, name, device, words):
        with pytest.raises(ConfigError, match=words):
            require_kernel(name, device)
        require_kernel("_native_math", device)


# torch.compile warns while it looks at tensors, and here warnings are errors.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True, "offload"])
def test_compiled_layers_make_the_same_gradients(plain, checkpointing):
    roles = tiny_roles()
    # Both walks go through the fake score, the generator's to its input. A compiler makes some
    # twenty libraries for it, at a second or two each, where none are kept.
    settings = ComputeSettings(compile=True, checkpointing=checkpointing)
    prepare_network(roles.networks["fake_score"], settings)
    found = gathered(roles)
    for role in plain:
        assert not same_bits(found[role], plain[role]), "nothing is compiled"
        assert relative_error(found[role], plain[role]) < 1e-4
