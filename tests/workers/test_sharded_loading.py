"""Networks are read in parts, and every part has the bits that diffusers' own loading gives it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from sgmd_core.errors import ModelFolderError
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny_wan import LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, write_tiny_wan
from workers.build import build_denoiser
from workers.models.wan import WanVelocity, load_transformer
from workers.network_settings import ComputeSettings
from workers.settings import ModelSettings
from workers.sharding import full_tensor, is_sharded, shard

NUM_RANKS = 3
"""So that no width of the network divides by it, and some ranks have no row of a tensor."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = write_tiny_wan(tmp_path_factory.mktemp("wan"), ["a", "circle"])
    part = folder / "transformer"
    network: Any = WanTransformer3DModel.from_pretrained(part)
    (part / "diffusion_pytorch_model.safetensors").unlink()
    network.save_pretrained(part, max_shard_size="20KB")
    assert len(list(part.glob("*.safetensors"))) > 2
    return folder


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> WanVelocity:
    loaded: Any = WanTransformer3DModel.from_pretrained(
        folder / "transformer", dtype=dtype, output_loading_info=True
    )
    network, info = loaded
    assert not info["missing_keys"]
    return WanVelocity(network).eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *LATENT_SHAPE, generator=generator)
    text = torch.randn(2, TEXT_LENGTH, TEXT_DIM, generator=generator)
    return x_t, torch.tensor([0.3, 0.8]), text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_process_has_the_bits_and_types_that_diffusers_loads(model: Path, dtype) -> None:
    ours, theirs = load_transformer(model, dtype), reference(model, dtype)
    assert ours.training is theirs.training is False
    for found, expected in (
        (dict(ours.named_parameters()), dict(theirs.named_parameters())),
        (dict(ours.named_buffers()), dict(theirs.named_buffers())),
    ):
        assert found.keys() == expected.keys()
        assert found
        for name, value in expected.items():
            assert found[name].dtype is value.dtype, name
            assert found[name].is_contiguous()
            assert torch.equal(found[name], value), name
    with torch.no_grad():
        velocity = ours(*inputs())
        assert torch.equal(velocity, theirs(*inputs()))
        ours.get_buffer("transformer.rope.freqs_cos").zero_()
        assert not torch.equal(ours(*inputs()), velocity)


def test_preparing_sees_no_value_and_may_move_modules_into_others(model: Path) -> None:
    class Outer(torch.nn.Module):
        def __init__(self, inner: torch.nn.Linear) -> None:
            super().__init__()
            self.inner = inner

    def prepare(denoiser: Any) -> None:
        assert all(value.is_meta for value in denoiser.parameters())
        denoiser.transformer.proj_out = Outer(denoiser.transformer.proj_out)

    moved: Any = load_transformer(model, prepare=prepare).transformer
    expected: Any = reference(model).transformer
    assert torch.equal(moved.proj_out.inner.weight, expected.proj_out.weight)


def whole(network: torch.nn.Module) -> dict[str, Tensor]:
    values = {name: full_tensor(value.detach()) for name, value in network.named_parameters()}
    return {name: value.clone() for name, value in values.items()}


def on_some(rank: int, size: int, folder: Path) -> dict[str, Any]:
    model = ModelSettings(str(folder), TEXT_LENGTH)
    ours = build_denoiser(model, ComputeSettings(), 1)
    theirs = reference(folder)
    shard(theirs, theirs.blocks)
    brought: dict[str, Any] = {"sharded": is_sharded(ours)}
    for name, network in (("ours", ours), ("theirs", theirs)):
        network.requires_grad_(True)
        velocity = network(*inputs())
        velocity.square().mean().backward()
        brought[name] = {
            "weights": whole(network),
            "buffers": dict(network.named_buffers()),
            "velocity": velocity.detach(),
            "gradients": {
                name: full_tensor(value.grad)
                for name, value in network.named_parameters()
                if value.grad is not None
            },
        }
    narrow = load_transformer(
        folder,
        torch.bfloat16,
        prepare=lambda made: shard(made.requires_grad_(False), made.blocks, device="cpu"),
    )
    brought["narrow"] = {"weights": whole(narrow), "velocity": narrow(*inputs())}
    return brought


@pytest.mark.slow
def test_ranks_that_read_their_rows_have_the_bits_of_a_network_that_was_loaded_and_cut(
    model: Path, tmp_path: Path
) -> None:
    alone = reference(model)
    narrow = reference(model, torch.bfloat16)
    for brought in on_ranks(NUM_RANKS, on_some, tmp_path, model):
        assert brought["sharded"]
        for kind in ("weights", "buffers", "gradients"):
            found, expected = brought["ours"][kind], brought["theirs"][kind]
            assert found.keys() == expected.keys()
            assert found
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert torch.equal(brought["ours"]["velocity"], brought["theirs"]["velocity"])
        for network, found in ((alone, brought["ours"]), (narrow, brought["narrow"])):
            for name, value in network.named_parameters():
                assert found["weights"][name].dtype is value.dtype
                assert torch.equal(found["weights"][name], value)
        with torch.no_grad():
            assert torch.equal(brought["narrow"]["velocity"], narrow(*inputs()))


def test_weights_that_overflow_in_the_wanted_type_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_wan(tmp_path, ["a", "circle"])
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"proj_out.bias": weights["proj_out.bias"] + 1e6}, file)
    load_transformer(folder)
    with pytest.raises(ModelFolderError, match=r"NaN or infinity in proj_out\.bias"):
        load_transformer(folder, torch.float16)
