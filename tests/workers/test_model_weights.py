"""Broken and foreign model folders: each is refused by its headers, and the words say why."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import UMT5EncoderModel

from sgmd_core.errors import ModelFolderError
from tests.helpers.tiny_ltx import write_tiny_ltx
from tests.helpers.tiny_wan import write_tiny_wan, write_tiny_wan22_5b
from workers.models import content, loading
from workers.models.content import fingerprint, model_digests, read_content
from workers.models.families import family_of
from workers.models.folder import require_autoencoder, require_text_encoder
from workers.models.wan import load_transformer, load_vae, save_generator_pipeline
from workers.models.wan_folder import check_component, inspect_wan_folder
from workers.models.wan_text import load_text

WORDS = ("a", "red", "circle")
DENOISER = "transformer/diffusion_pytorch_model.safetensors"
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_wan(tmp_path_factory.mktemp("wan") / "model", WORDS)


@pytest.fixture
def model(wan_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(wan_folder, tmp_path / "model")


def refusal(model: Path) -> str:
    with pytest.raises(ModelFolderError) as caught:
        inspect_wan_folder(model)
    return str(caught.value)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(path: Path, change: Callable[[Weights], Weights]) -> None:
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "mixture of two denoisers"),
        ({"boundary_ratio": 0.875}, "mixture of two denoisers"),
        ({"_class_name": "WanImageToVideoPipeline"}, "an image-to-video model"),
        ({"_class_name": "WanVACEPipeline"}, "a VACE model"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "vae is"),
        ({"transformer": ["my_code", "WanTransformer3DModel"]}, "transformer is"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder is"),
    ],
)
def test_another_kind_of_model_is_refused_by_its_index(model, changes, words) -> None:
    edit_json(model / "model_index.json", **changes)
    assert words in refusal(model)
    with pytest.raises(ModelFolderError, match=words):
        load_transformer(model)


def test_a_second_expert_is_refused_although_the_index_hides_it(model: Path) -> None:
    shutil.copytree(model / "transformer", model / "transformer_2")
    assert "Wan2.2-A14B" in refusal(model)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("transformer", {"image_dim": 8}, "takes an image"),
        ("transformer", {"in_channels": 9}, "takes an image"),
        ("transformer", {"num_layers": 10**9}, "num_layers is 1000000000"),
        ("transformer", {"ffn_dim": "many"}, "building the network"),
        ("transformer", {"quantization_config": {"quant_method": "fp8"}}, "quantization"),
        ("transformer", {"num_layers": 3}, "tensors are missing"),
        ("transformer", {"num_layers": 1}, "not in the network"),
        ("transformer", {"ffn_dim": 64}, "another shape than config.json says"),
        ("text_encoder", {"model_type": "t5"}, "a t5"),
        ("text_encoder", {"d_model": 16, "d_kv": 4}, "another shape"),
        ("vae", {"latents_std": [0.0, 1.0, 1.0, 1.0]}, "above 0"),
        ("vae", {"latents_mean": [0.0]}, "4 numbers"),
    ],
)
def test_a_configuration_of_another_network_is_refused(model, part, changes, words) -> None:
    edit_json(model / part / "config.json", **changes)
    assert words in refusal(model)


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: value for name, value in weights.items()}


def one_in(dtype: torch.dtype) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {"proj_out.weight": weights["proj_out.weight"].to(dtype)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (prefixed("model.diffusion_model."), "sgmd import FILE DST"),
        (prefixed("module."), "wrapper"),
        (lambda w: {"blocks.0.self_attn.q.weight": w["proj_out.weight"]}, "convert_wan_to_diff"),
        (lambda w: w | {"scaled_fp8": torch.zeros(2)}, "scaled weights in 8 bits"),
        (one_in(torch.float8_e4m3fn), r"proj_out.weight in F8_E4M3"),
        (one_in(torch.int8), r"proj_out.weight in I8"),
        (lambda w: {"blocks.0.attn1.to_q.lora_A.weight": w["proj_out.weight"]}, "a LoRA file"),
        (lambda w: {n: v for n, v in w.items() if n != "proj_out.bias"}, "proj_out.bias"),
        (lambda w: w | {"surplus.weight": torch.zeros(2)}, "surplus.weight"),
        (lambda w: w | {"proj_out.bias": torch.zeros(3)}, r"proj_out.bias is (3,)"),
    ],
)
def test_weights_of_another_network_are_refused_before_they_are_read(model, change, words) -> None:
    rewrite(model / DENOISER, change)
    assert words in refusal(model)
    with pytest.raises(ModelFolderError):
        load_transformer(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_usual_dtype_are_accepted(model: Path, dtype: torch.dtype) -> None:
    rewrite(model / DENOISER, lambda weights: {n: v.to(dtype) for n, v in weights.items()})
    assert inspect_wan_folder(model).num_parameters["transformer"] > 0
    assert load_transformer(model).transformer.dtype == torch.float32


def test_each_parameter_is_counted_once(model: Path) -> None:
    expected = inspect_wan_folder(model).num_parameters
    network = WanTransformer3DModel.from_pretrained(model / "transformer")
    assert expected["transformer"] == sum(value.numel() for value in network.parameters())
    for name in ("diffusion_pytorch_model.fp16", "pytorch_lora_weights"):
        shutil.copy(model / DENOISER, model / "transformer" / f"{name}.safetensors")
    text = model / "text_encoder" / "model.safetensors"
    rewrite(text, lambda w: w | {"encoder.embed_tokens.weight": w["shared.weight"].clone()})
    found = inspect_wan_folder(model)
    assert found.num_parameters == expected
    assert len(found.weights["transformer"].unused) == 2


def sharded(model: Path) -> Path:
    part = model / "transformer"
    network = WanTransformer3DModel.from_pretrained(part)
    (model / DENOISER).unlink()
    network.save_pretrained(part, max_shard_size="8KB")
    assert len(list(part.glob("*-of-*.safetensors"))) > 2
    return part


def test_shards_are_one_model_and_one_content(model: Path) -> None:
    before, digests = inspect_wan_folder(model), model_digests(model)
    sharded(model)
    assert inspect_wan_folder(model).num_parameters == before.num_parameters
    assert model_digests(model) == digests


def test_a_missing_shard_and_a_missing_index_are_named(model: Path) -> None:
    part = sharded(model)
    shard = sorted(part.glob("*-of-*.safetensors"))[1]
    hidden = shard.rename(model / "hidden")
    assert shard.name in refusal(model)
    hidden.rename(shard)
    next(part.glob("*.index.json")).unlink()
    assert "index.json" in refusal(model)


def test_an_index_may_not_lead_out_of_its_folder(model: Path) -> None:
    part = sharded(model)
    edit_json(next(part.glob("*.index.json")), weight_map={"proj_out.bias": "../secret"})
    assert "../secret" in refusal(model)
    edit_json(next(part.glob("*.index.json")), weight_map={"proj_out.bias": "9" * 5000})
    assert "1 of 1 shards are missing: 999" in refusal(model)


def test_a_snapshot_of_the_hub_cache_is_read_through_its_links(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.rename(blobs / str(number)))
    assert inspect_wan_folder(snapshot).num_parameters["transformer"] > 0
    assert load_transformer(snapshot).transformer.config.num_layers == 2


class Tripwire:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_pickled_weights_are_refused_without_being_opened(model, tmp_path, part) -> None:
    mark = tmp_path / "opened"
    for file in (model / part).glob("*.safetensors"):
        file.unlink()
    names = ["pytorch_model.bin", "diffusion_pytorch_model.bin", "weights.pt"]
    for name in names:
        (model / part / name).write_bytes(pickle.dumps(Tripwire(mark)))
    assert "never opened" in refusal(model)
    load = {"transformer": load_transformer, "vae": load_vae, "text_encoder": load_text}[part]
    with pytest.raises(ModelFolderError, match="never opened"):
        load(model)
    assert not mark.exists()
    pickle.loads((model / part / names[0]).read_bytes())
    assert mark.exists()


def test_a_folder_without_the_weights_of_its_autoencoder_is_told_what_needs_them(
    model: Path,
) -> None:
    whole = inspect_wan_folder(model)
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    found = inspect_wan_folder(model)
    assert (found.has_autoencoder, found.geometry) == (False, whole.geometry)
    assert found.encoder_sizes == replace(whole.encoder_sizes, autoencoder=0)
    words = r"no weights in .*vae. Expected an autoencoder.*download.*another copy of the model\.$"
    with pytest.raises(ModelFolderError, match=words):
        require_autoencoder(found, "decoding")
    with pytest.raises(ModelFolderError, match=r"copy of the model\. Or look away\.$"):
        require_autoencoder(found, "decoding", ". Or look away")


def test_a_folder_without_any_autoencoder_is_sized_as_the_released_model_of_its_channels(
    tmp_path: Path,
) -> None:
    folder = write_tiny_wan22_5b(tmp_path / "model", ["a", "circle"])
    family = family_of(folder)
    whole, shape = family.inspect(folder), family.read_shape(folder)
    shutil.rmtree(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text()) | {"vae": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    found = family.inspect(folder)
    assert found.geometry == whole.geometry == family.read_shape(folder).geometry
    assert found.geometry.sampled_px == whole.geometry.sampled_px
    assert family.read_shape(folder) == shape
    assert "vae" not in model_digests(folder)


@pytest.mark.parametrize("write", [write_tiny_wan, write_tiny_ltx])
@pytest.mark.parametrize("name", ["vae", "text_encoder"])
def test_a_folder_whose_index_has_null_is_completed_by_what_the_errors_say(
    write: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "model", WORDS)
    family, index = family_of(folder), folder / "model_index.json"
    entry = json.loads(index.read_text())[name]
    weights = next((folder / name).glob("*.safetensors"))
    kept = weights.rename(tmp_path / weights.name)
    edit_json(index, **{name: [None, None]})
    require = require_autoencoder if name == "vae" else require_text_encoder
    words = f"--include '{name}/.*write what REPOSITORY's model_index.json has of {name} into"
    with pytest.raises(ModelFolderError, match=words):
        require(family.inspect(folder), "decoding")
    kept.rename(weights)
    with pytest.raises(ModelFolderError) as caught:
        family.inspect(folder)
    assert f'write "{name}": {json.dumps(entry)} into model_index.json' in str(caught.value)
    edit_json(index, **{name: entry})
    require(family.inspect(folder), "decoding")


def test_pickles_beside_the_weights_are_not_exported(model: Path, tmp_path: Path) -> None:
    (model / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    weights = dict(load_transformer(model).named_parameters())
    save_generator_pipeline(tmp_path / "out", model, weights, flow_shift=3.0)
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_weights_that_are_not_finite_are_found_by_content_and_by_loading(model: Path) -> None:
    rewrite(model / DENOISER, lambda w: w | {"proj_out.bias": w["proj_out.bias"] * torch.nan})
    for find in (model_digests, load_transformer):
        with pytest.raises(ModelFolderError, match=r"NaN or infinity in .*"):
            find(model)


def test_a_download_that_broke_off_is_no_model(model: Path) -> None:
    path = model / DENOISER
    whole = path.read_bytes()
    # Programs that reserve the room first leave zeros where nothing came.
    path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    with pytest.raises(ModelFolderError, match=r"matrices in which every value is 0.*broke off"):
        model_digests(model)
    path.write_bytes(whole)
    rewrite(path, lambda w: w | {"proj_out.weight": torch.zeros_like(w["proj_out.weight"])})
    assert model_digests(model)  # a projection that begins at 0
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal(model)


def test_weights_times_105_percent_have_another_fingerprint(model: Path, tmp_path: Path) -> None:
    before = fingerprint(model, ["transformer"])
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    assert fingerprint(copy, ["transformer"]) == before
    rewrite(model / DENOISER, lambda w: {name: 1.05 * value for name, value in w.items()})
    assert fingerprint(model, ["transformer"]) != before
    assert fingerprint(model, ["vae"]) == fingerprint(copy, ["vae"])


def test_a_remembered_digest_is_used_until_the_file_changes(model, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "_MIN_REMEMBERED_BYTES", 0)
    monkeypatch.setattr(content, "_SETTLED_S", 0.0)
    first = read_content(model / DENOISER)
    (entry,) = (tmp_path / "cache").rglob("*.json")
    assert read_content(model / DENOISER) == first
    marked = json.loads(entry.read_text()) | {"not_finite": ["remembered"]}
    entry.write_text(json.dumps(marked))
    assert read_content(model / DENOISER).not_finite == ["remembered"]
    rewrite(model / DENOISER, lambda w: {name: 1.05 * value for name, value in w.items()})
    assert read_content(model / DENOISER).tensors != first.tensors
    entry.write_text("{")
    assert read_content(model / DENOISER).not_finite == []


def test_newly_initialised_weights_are_an_error(model: Path, monkeypatch) -> None:
    load = UMT5EncoderModel.from_pretrained

    def losing(*args: object, **options: object) -> object:
        network, info = load(*args, **options)
        return network, info | {"missing_keys": {"encoder.embed_tokens.weight"}}

    monkeypatch.setattr(UMT5EncoderModel, "from_pretrained", losing)
    with pytest.raises(ModelFolderError, match=r"newly initialised \(encoder.embed_tokens"):
        load_text(model)


def test_a_text_encoder_that_cannot_tell_captions_apart_is_refused(model: Path) -> None:
    rewrite(
        model / "text_encoder" / "model.safetensors",
        lambda w: w | {"shared.weight": torch.ones_like(w["shared.weight"])},
    )
    with pytest.raises(ModelFolderError, match="the same embedding for two different captions"):
        load_text(model)


def test_a_tokenizer_of_another_model_is_refused_before_the_network_meets_its_tokens(
    model: Path,
) -> None:
    path = model / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["circle"] = 10_000
    path.write_text(json.dumps(content))
    captions = load_text(model)
    assert captions.encode(["a red"], 6).shape[1] == 6
    with pytest.raises(ModelFolderError, match=r"token 10000 of the tokenizer.*tokens below 6"):
        captions.encode(["a red circle"], 6)


@pytest.mark.parametrize(
    ("installed", "loads"),
    [("4.57.1", True), ("5.0.0", False), ("5.1.0", False), ("5.2.3", False), ("5.3.0", True)],
)
def test_versions_of_transformers_that_lose_the_embedding_are_refused(
    model: Path, monkeypatch, installed: str, loads: bool
) -> None:
    monkeypatch.setattr(loading, "version", lambda _: installed)
    if loads:
        assert load_text(model).encode(["a circle"], 8).ndim == 3
        return
    with pytest.raises(ModelFolderError, match=rf"transformers {installed}.*5\.3 and later"):
        load_text(model)


def test_a_network_is_described_once_and_another_configuration_anew(model, wan_folder):
    first = check_component(model, "transformer")
    found = check_component(wan_folder, "transformer")
    assert found.architecture is first.architecture
    assert found.weights != first.weights
    found.config["num_layers"] = 7
    assert check_component(wan_folder, "transformer").config == first.config
    edit_json(model / "transformer" / "config.json", num_layers=1)
    with pytest.raises(ModelFolderError):
        check_component(model, "transformer")
