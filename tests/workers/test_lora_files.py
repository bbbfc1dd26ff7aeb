"""LoRAs of other programs change the base by what they say, or are refused: nothing is left out."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from sgmd_core.errors import ModelFolderError
from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.tiny_wan import tiny_velocity, write_tiny_experts, write_tiny_wan
from workers.models.exchange import ScaledLora
from workers.models.wan import load_experts, load_transformer
from workers.models.wan_exchange import EXPERTS, WanExchange, names_in_loras, original_name

Weights = dict[str, Tensor]
PREFIX = "transformer."
LAYER = "blocks.0.attn1.to_q"
OTHER = "blocks.1.ffn.net.2"
ORIGINAL = f"diffusion_model.{original_name(LAYER)}"
KOHYA = f"lora_unet_{original_name(LAYER).replace('.', '_')}"
RANK = 2
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_wan(tmp_path_factory.mktemp("wan") / "model", ["a", "circle"])


@pytest.fixture(scope="module")
def base(folder: Path) -> Weights:
    return {name: value.detach() for name, value in load_transformer(folder).named_parameters()}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def halves(base: Weights, layer: str = LAYER, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) of a layer."""
    rows, columns = base[f"{PREFIX}{layer}.weight"].shape
    return drawn(RANK, columns, seed=seed), drawn(rows, RANK, seed=seed + 1)


def pair(base: Weights, stem: str, first="lora_A", second="lora_B", layer=LAYER) -> Weights:
    down, up = halves(base, layer)
    return {f"{stem}.{first}.weight": down, f"{stem}.{second}.weight": up}


def product(base: Weights, layer: str = LAYER) -> Tensor:
    down, up = halves(base, layer)
    return torch.einsum("or,ri->oi", up.double(), down.double())


def merged(folder: Path, path: Path, tensors: Weights, header=None, strength=1.0) -> Weights:
    save_file(tensors, path, metadata=header)
    return dict(WanExchange().merge_loras([ScaledLora({"": path}, strength)], folder))


def assert_merged(found: Weights, base: Weights, changes: Weights) -> None:
    """Checks the whole result against the base and changes taken in float64."""
    expected = dict(base)
    for name, change in changes.items():
        expected[PREFIX + name] = (base[PREFIX + name].double() + change).float()
    assert_moves(expected, base, TOLERANCE)
    assert found.keys() >= expected.keys()
    own = {name: found[name] for name in expected}
    assert relative_error(own, expected) < TOLERANCE
    for name in expected.keys() - {PREFIX + name for name in changes}:
        assert torch.equal(own[name], base[name]), name


@pytest.mark.parametrize(
    ("stem", "first", "second"),
    [
        (f"transformer.{LAYER}", "lora_A", "lora_B"),
        (LAYER, "lora_A", "lora_B"),
        (f"base_model.model.{LAYER}", "lora_A", "lora_B"),
        (f"base_model.model.{LAYER}", "lora_A.default", "lora_B.default"),
        (f"pipe.dit.{original_name(LAYER)}", "lora_A.default", "lora_B.default"),
        (f"transformer.{LAYER}", "lora.down", "lora.up"),
        (ORIGINAL, "lora_A", "lora_B"),
        (ORIGINAL, "lora_down", "lora_up"),
        (f"model.{ORIGINAL}", "lora_down", "lora_up"),
        (f"diffusion_model.{LAYER}", "lora_down", "lora_up"),
        (KOHYA, "lora_down", "lora_up"),
        (f"lora_unet_{LAYER.replace('.', '_')}", "lora_down", "lora_up"),
    ],
)
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_names_and_alphas_of_other_trainers(
    folder, base, tmp_path, stem, first, second, alpha
) -> None:
    tensors = pair(base, stem, first, second)
    tensors |= {} if alpha is None else {f"{stem}.alpha": torch.tensor(alpha)}
    found = merged(folder, tmp_path / "lora.safetensors", tensors, strength=0.7)
    scale = 0.7 * (1 if alpha is None else alpha / RANK)
    assert_merged(found, base, {f"{LAYER}.weight": scale * product(base)})


def test_every_layer_of_a_wan_has_a_name_in_each_program() -> None:
    own = tiny_velocity().transformer.state_dict()
    names = names_in_loras(own)
    assert set(names.values()) == set(own)
    assert names["lora_unet_blocks_1_cross_attn_k.weight"] == "blocks.1.attn2.to_k.weight"
    assert names["lora_unet_blocks_1_ffn_0.bias"] == "blocks.1.ffn.net.0.proj.bias"
    assert names["lora_unet_time_projection_1.weight"] == "condition_embedder.time_proj.weight"
    assert names["blocks.0.norm3.weight"] == "blocks.0.norm2.weight"
    assert names["head.modulation"] == "scale_shift_table"


class TestSettings:
    def header(self, **settings) -> dict[str, str]:
        packed = {f"transformer.{name}": value for name, value in settings.items()}
        return {"format": "pt", "lora_adapter_metadata": json.dumps(packed)}

    @pytest.mark.parametrize(
        ("settings", "scales"),
        [
            ({"lora_alpha": 1}, (0.5, 0.5)),
            ({"r": 2, "lora_alpha": 8.0}, (4, 4)),
            ({"r": 2, "lora_alpha": 8, "use_rslora": True}, (8 / 2**0.5,) * 2),
            ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"to_q": 1}}, (0.5, 4)),
            ({"lora_alpha": 2, "alpha_pattern": {r"blocks\.1\.ffn\.net\.2": 6}}, (1, 3)),
            ({"r": 16, "rank_pattern": {"to_q": 2, "^blocks.1.ffn.net.2": 2}}, (1, 1)),
        ],
    )
    def test_a_header_of_diffusers_decides_the_strength(
        self, folder, base, tmp_path, settings, scales
    ) -> None:
        tensors = pair(base, f"transformer.{LAYER}")
        tensors |= pair(base, f"transformer.{OTHER}", layer=OTHER)
        path = tmp_path / "lora.safetensors"
        found = merged(folder, path, tensors, self.header(**settings))
        layers = zip((LAYER, OTHER), scales, strict=True)
        changes = {f"{name}.weight": scale * product(base, name) for name, scale in layers}
        assert_merged(found, base, changes)

    @pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft expects no bias in its own file
    def test_a_folder_of_peft_is_merged_as_peft_merges_it(self, folder, base, tmp_path) -> None:
        network = load_transformer(folder).transformer
        adapted = get_peft_model(
            network,
            LoraConfig(
                r=4,
                lora_alpha=10,
                target_modules=["to_q", "net.2"],
                rank_pattern={"net.2": 2},
                alpha_pattern={"blocks.1.attn2.to_q": 3},
                use_rslora=True,
                lora_bias=True,
                init_lora_weights=False,
            ),
        )
        with torch.no_grad():
            for index, (name, value) in enumerate(adapted.named_parameters()):
                if "lora_B.default.bias" in name:
                    value.copy_(drawn(*value.shape, seed=index))
        adapted.save_pretrained(tmp_path / "peft")
        settings = json.loads((tmp_path / "peft/adapter_config.json").read_text())
        assert settings["lora_alpha"] == 10
        path = tmp_path / "peft/adapter_model.safetensors"
        found = dict(WanExchange().merge_loras([ScaledLora({"": path})], folder))
        whole = adapted.merge_and_unload().state_dict()
        expected = {PREFIX + name: value for name, value in whole.items()}
        assert_moves(expected, base, TOLERANCE)
        assert relative_error({name: found[name] for name in expected}, expected) < TOLERANCE

    def test_settings_of_another_file_are_not_taken_for_this_one(
        self, folder, base, tmp_path, caplog
    ) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
        alone = merged(folder, tmp_path / "mine.safetensors", pair(base, LAYER))
        assert_merged(alone, base, {f"{LAYER}.weight": 4 * product(base)})
        assert not caplog.records
        save_file(pair(base, LAYER), tmp_path / "adapter_model.safetensors")
        beside = merged(folder, tmp_path / "mine.safetensors", pair(base, LAYER))
        assert_merged(beside, base, {f"{LAYER}.weight": product(base)})
        assert "adapter_config.json was not read" in caplog.text

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"r": 4, "lora_alpha": 4}, "has rank 2, and the LoRA's settings say 4"),
            ({"lora_alpha": 0}, "has an alpha of 0"),
            ({"lora_alpha": 10**400}, "lora_alpha 1000"),
            ({"lora_alpha": "8"}, "lora_alpha 8"),
            ({"alpha_pattern": [1]}, "alpha_pattern"),
            ({"use_dora": True}, "use_dora"),
            ({"peft_type": "LOHA"}, "peft_type LOHA"),
            ({"init_lora_weights": "pissa_niter_16"}, "changes the base too"),
        ],
    )
    def test_settings_that_fit_no_lora_are_refused(
        self, folder, base, tmp_path, settings, words
    ) -> None:
        with pytest.raises(ModelFolderError, match=re.escape(words)):
            merged(folder, tmp_path / "x.safetensors", pair(base, LAYER), self.header(**settings))

    def test_a_tensor_and_a_header_that_differ_are_refused(self, folder, base, tmp_path) -> None:
        tensors = pair(base, LAYER) | {f"{LAYER}.alpha": torch.tensor(1.0)}
        path = tmp_path / "lora.safetensors"
        agreed = merged(folder, path, tensors, self.header(lora_alpha=1))
        assert_merged(agreed, base, {f"{LAYER}.weight": product(base) / 2})
        with pytest.raises(ModelFolderError, match="alpha of 1, and the LoRA's settings say 8"):
            merged(folder, path, tensors, self.header(lora_alpha=8))


WHOLE = {
    "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
    "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
    "blocks.1.norm3.diff": "blocks.1.norm2.weight",
    "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
    "blocks.1.diff_m": "blocks.1.scale_shift_table",
    "head.diff_m": "scale_shift_table",
    "head.head.diff": "proj_out.weight",
    "head.head.diff_b": "proj_out.bias",
    "patch_embedding.diff": "patch_embedding.weight",
    "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
    "text_embedding.2.diff": "condition_embedder.text_embedder.linear_2.weight",
}


class TestWholeDifferences:
    def test_differences_beside_a_lora_are_merged_and_scaled(self, folder, base, tmp_path) -> None:
        """As extracted LoRAs of few-step Wans have them, norms and modulation included."""
        assert {PREFIX + name for name in WHOLE.values()} <= base.keys()
        whole = {
            name: drawn(*base[PREFIX + own].shape, seed=index)
            for index, (name, own) in enumerate(WHOLE.items())
        }
        tensors = pair(base, ORIGINAL, "lora_down", "lora_up")
        tensors |= {f"diffusion_model.{name}": value for name, value in whole.items()}
        found = merged(folder, tmp_path / "lora.safetensors", tensors, strength=0.5)
        changes = {own: 0.5 * whole[name].double() for name, own in WHOLE.items()}
        assert_merged(found, base, changes | {f"{LAYER}.weight": 0.5 * product(base)})

    def test_the_bias_of_a_lora_has_its_scale(self, folder, base, tmp_path) -> None:
        bias = drawn(*base[f"{PREFIX}{LAYER}.bias"].shape)
        tensors = pair(base, LAYER) | {f"{LAYER}.lora_B.bias": bias}
        tensors[f"{LAYER}.alpha"] = torch.tensor(8.0)
        found = merged(folder, tmp_path / "lora.safetensors", tensors)
        changes = {f"{LAYER}.weight": 4 * product(base), f"{LAYER}.bias": 4 * bias.double()}
        assert_merged(found, base, changes)

    def test_a_convolution_has_a_lora_too(self, folder, base, tmp_path) -> None:
        shape = base[f"{PREFIX}patch_embedding.weight"].shape
        down, up = drawn(RANK, *shape[1:]), drawn(shape[0], RANK, 1, 1, 1)
        stem = "diffusion_model.patch_embedding"
        tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        found = merged(folder, tmp_path / "lora.safetensors", tensors)
        change = torch.einsum("orxyz,rcthw->octhw", up.double(), down.double())
        assert_merged(found, base, {"patch_embedding.weight": change})


def test_several_files_are_summed_each_with_its_strength(folder, base, tmp_path) -> None:
    loras, total = [], torch.zeros_like(base[f"{PREFIX}{LAYER}.weight"], dtype=torch.float64)
    for index, strength in enumerate((1.0, -0.4, 0.25)):
        down, up = halves(base, seed=10 * index)
        path = tmp_path / f"{index}.safetensors"
        save_file({f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.lora_up.weight": up}, path)
        loras.append(ScaledLora({"": path}, strength))
        total += strength * (up.double() @ down.double())
    found = dict(WanExchange().merge_loras(loras, folder))
    assert_merged(found, base, {f"{LAYER}.weight": total})


@pytest.mark.slow
def test_each_expert_takes_its_own_file(tmp_path) -> None:
    folder = write_tiny_experts(tmp_path / "model", ["a"])
    before = {name: value.detach() for name, value in load_experts(folder).named_parameters()}
    paths: dict[str, Path] = {}
    expected = dict(before)
    for seed, (part, own) in enumerate({"high_noise": "high.", "low_noise": "low."}.items()):
        name = f"{own}{PREFIX}{LAYER}.weight"
        down, up = drawn(RANK, before[name].shape[1], seed=seed), drawn(32, RANK, seed=seed + 5)
        paths[part] = tmp_path / f"{part}.safetensors"
        tensors = {f"{ORIGINAL}.lora_down.weight": down, f"{ORIGINAL}.lora_up.weight": up}
        save_file(tensors, paths[part])
        expected[name] = (before[name].double() + 0.5 * up.double() @ down.double()).float()
    for chosen in (["high_noise"], ["high_noise", "low_noise"]):
        lora = ScaledLora({part: paths[part] for part in chosen}, 0.5)
        found = dict(WanExchange(EXPERTS).merge_loras([lora], folder))
        # Of an expert without a file nothing is read.
        assert found.keys() >= {n for n in before if n.startswith("high.")}
        assert any(name.startswith("low.") for name in found) == (len(chosen) > 1)
        wanted = {name: expected[name] for name in before if name in found}
        assert_moves(wanted, {name: before[name] for name in wanted}, TOLERANCE)
        assert relative_error({name: found[name] for name in wanted}, wanted) < TOLERANCE


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w | {f"{LAYER}.lora_magnitude_vector": ONE}, "DoRA"),
        (lambda w: w | {f"{KOHYA}.dora_scale": ONE}, "dora_scale: a DoRA"),
        (lambda w: w | {f"{KOHYA}.hada_w1_a": ONE}, "another kind than LoRA"),
        (lambda w: w | {f"{KOHYA}.lokr_w1": ONE}, "another kind than LoRA"),
        (lambda w: w | {f"{KOHYA}.lora_mid.weight": ONE}, "another kind than LoRA"),
        (lambda w: w | {f"{LAYER}.base_layer.bias": ONE}, "weights in place of changes"),
        (lambda w: w | {"lora_te1_layer.lora_up.weight": ONE}, "a change of the text encoder"),
        (lambda w: w | {"transformer_2.x.lora_A.weight": ONE}, "high_noise and low_noise"),
        (
            lambda w: w | {"diffusion_model.blocks.0.cross_attn.k_img.diff_b": ONE},
            "a part of an image-to-video model",
        ),
        (lambda w: w | {"scale": ONE}, "scale belongs to no LoRA"),
        (lambda w: {}, "there is nothing in it"),
        (
            lambda w: {n.replace("blocks.0", "blocks.99"): v for n, v in w.items()},
            "blocks.99.attn1.to_q.weight is of no layer of the base",
        ),
        (
            lambda w: {"lora_unet_blocks_0_self_attn_x.diff": ONE},
            "lora_unet_blocks_0_self_attn_x.weight is of no layer of the base",
        ),
        (lambda w: w | {f"{OTHER}.lora_A.weight": ONE}, f"{OTHER} has down without"),
        (lambda w: w | {f"{OTHER}.alpha": ONE}, f"{OTHER} has alpha without"),
        (lambda w: w | {f"{LAYER}.diff": torch.ones(32, 32)}, "a LoRA and a difference"),
        (
            lambda w: w | {f"{ORIGINAL}.diff": torch.ones(32, 32)},
            f"{LAYER}.weight is changed twice",
        ),
        (lambda w: w | {f"transformer.{LAYER}.lora_A.weight": ONE}, "is there twice"),
        (lambda w: w | {f"{LAYER}.diff_b": torch.ones(7)}, "where the base has (32,)"),
        (
            lambda w: {n: v[..., :5].contiguous() for n, v in w.items()},
            "is (32, 5), where the base has (32, 32)",
        ),
        (lambda w: {n: v * torch.nan for n, v in w.items()}, "NaN or infinity"),
        (lambda w: {n: v.to(torch.int8) for n, v in w.items()}, "torch.int8"),
    ],
)
def test_a_file_that_cannot_be_merged_whole_is_refused_by_name(
    folder, base, tmp_path, change, words
) -> None:
    with pytest.raises(ModelFolderError) as refused:
        merged(folder, tmp_path / "lora.safetensors", change(pair(base, LAYER)))
    assert words in str(refused.value)
    assert refused.value.remedy


def test_what_is_read_was_in_the_file(folder, base, tmp_path) -> None:
    path = tmp_path / "lora.safetensors"
    merged(folder, path, {n: v.bfloat16() for n, v in pair(base, LAYER).items()})
    assert load_file(path)[f"{LAYER}.lora_A.weight"].dtype == torch.bfloat16
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelFolderError, match="Copy it again"):
        WanExchange().merge_loras([ScaledLora({"": path})], folder)
