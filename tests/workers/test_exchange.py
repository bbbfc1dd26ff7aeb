"""Files of a denoiser for other programs hold it whole, in the names that these programs read."""

import logging
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file

from tests.helpers.tiny_wan import tiny_velocity, write_tiny_wan
from workers.models.exchange import LORA_FORMATS, WEIGHT_FORMATS
from workers.models.low_rank import approximate, approximate_all, share_kept
from workers.models.wan import load_transformer
from workers.models.wan_exchange import WanExchange, original_name

CAPTION = "a red circle moves left"


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_wan(tmp_path_factory.mktemp("wan") / "model", CAPTION.split())


def test_original_names_are_those_that_diffusers_converts_back() -> None:
    names = tiny_velocity().transformer.state_dict()
    original = {original_name(name): torch.tensor(index) for index, name in enumerate(names)}
    assert len(original) == len(names)
    converted = convert_wan_transformer_to_diffusers(dict(original))
    assert [int(converted[name]) for name in names] == list(range(len(names)))


def test_original_names_are_those_of_the_release() -> None:
    # From the index of Wan-AI/Wan2.1-T2V-1.3B.
    assert original_name("patch_embedding.weight") == "patch_embedding.weight"
    assert original_name("blocks.7.norm2.weight") == "blocks.7.norm3.weight"
    assert original_name("blocks.7.attn2.norm_q.weight") == "blocks.7.cross_attn.norm_q.weight"
    assert original_name("blocks.7.attn1.to_out.0.bias") == "blocks.7.self_attn.o.bias"
    assert original_name("blocks.7.ffn.net.0.proj.weight") == "blocks.7.ffn.0.weight"
    assert original_name("condition_embedder.time_proj.bias") == "time_projection.1.bias"
    assert original_name("scale_shift_table") == "head.modulation"


@pytest.mark.parametrize("form", WEIGHT_FORMATS)
def test_a_file_of_weights_is_read_back_to_the_bit(base, tmp_path, form) -> None:
    weights = tiny_velocity(seed=5).state_dict()
    path = tmp_path / "wan.safetensors"
    WanExchange().write_weights(form, {"": path}, weights)
    assert all(name.startswith("model.diffusion_model.") for name in load_file(path)) == (
        form == "comfyui"
    )
    # diffusers' loggers do not propagate to where caplog listens.
    logger, heard = logging.getLogger("diffusers.models.modeling_utils"), Heard()
    logger.addHandler(heard)
    try:
        read = WanExchange().read_weights({"": path}, base)
    finally:
        logger.removeHandler(heard)
    assert heard.messages == []
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)


class TestLowRank:
    @pytest.mark.parametrize("shape", [(48, 32), (32, 48), (1200, 1100)])
    def test_a_change_of_that_rank_is_kept_whole(self, shape) -> None:
        draw = torch.Generator().manual_seed(0)
        up = torch.randn(shape[0], 4, generator=draw)
        change = up @ torch.randn(4, shape[1], generator=draw)
        found = approximate(change, 4)
        assert found.up.shape == (shape[0], 4)
        assert found.kept == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(found.up @ found.down, change, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("shape", [(48, 32), (1200, 1100)])
    def test_what_is_kept_is_what_the_product_has(self, shape) -> None:
        change = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        found = approximate(change, 8)
        lost = (change - found.up @ found.down).square().sum() / change.square().sum()
        assert 0.02 < found.kept < 0.9
        assert found.kept == pytest.approx(1 - float(lost), abs=2e-3)
        again = approximate(change, 8)
        assert torch.equal(found.up, again.up)

    def test_a_full_rank_is_exact_and_a_change_without_one_is_left_out(self) -> None:
        before, after = (tiny_velocity(seed).state_dict() for seed in (0, 1))
        frozen = "transformer.proj_out.weight"
        after[frozen] = before[frozen]
        factors = approximate_all(before, after, rank=64)
        assert "transformer.proj_out" not in factors
        assert all(each.kept == pytest.approx(1, abs=1e-5) for each in factors.values())
        # Convolution, biases, norms and modulation are not matrices.
        changes = (after[name].double() - before[name].double() for name in after)
        energy = sum(float(change.square().sum()) for change in changes)
        assert 0.5 < share_kept(factors, energy) < 1


@pytest.mark.parametrize("form", LORA_FORMATS)
def test_a_lora_of_full_rank_gives_the_matrices_back(base, tmp_path, form) -> None:
    before = load_transformer(base).state_dict()
    after = tiny_velocity(seed=1).state_dict()
    factors = approximate_all(before, after, rank=64)
    read = WanExchange().read_low_rank({"": _written(tmp_path, "whole", form, factors)}, base)
    matrices = [f"{name}.weight" for name in factors]
    assert len(matrices) > 20
    for name in matrices:
        moved = (after[name] - before[name]).abs().max()
        assert moved > 0.1
        torch.testing.assert_close(read[name], after[name], rtol=0, atol=1e-5)
    others = [name for name in before if name not in matrices]
    assert all(torch.equal(read[name], before[name]) for name in others)


@pytest.mark.slow
def test_a_pipeline_of_diffusers_takes_the_lora_as_its_users_load_it(base, tmp_path) -> None:
    pipeline = WanPipeline.from_pretrained(base)
    before = {k: v.clone() for k, v in pipeline.transformer.state_dict().items()}
    after = tiny_velocity(seed=1).state_dict()
    named = {f"transformer.{name}": value for name, value in before.items()}
    path = _written(tmp_path, "lora", "lora", approximate_all(named, after, rank=64))
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    pipeline.fuse_lora()
    layer = pipeline.transformer.blocks[1].attn2.to_k
    fused = getattr(layer, "base_layer", layer).weight
    torch.testing.assert_close(
        fused, after["transformer.blocks.1.attn2.to_k.weight"], rtol=0, atol=1e-5
    )


def _written(folder: Path, stem: str, form: str, factors) -> Path:
    path = folder / f"{stem}.safetensors"
    WanExchange().write_low_rank(form, {"": path}, factors, torch.float32)
    return path
