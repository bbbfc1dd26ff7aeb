"""A single file in original or ComfyUI names becomes a model folder with the same bits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.importing import import_file
from sgmd_core.errors import ConfigError, ModelFolderError
from tests.helpers.tiny_wan import write_tiny_experts, write_tiny_wan
from workers.models.content import component_digest, model_digests
from workers.models.families import family_of
from workers.models.wan_exchange import original_name
from workers.models.weights import DIFFUSERS_STEM

Weights = dict[str, Tensor]
FILE = Path("transformer") / f"{DIFFUSERS_STEM}.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_wan(tmp_path_factory.mktemp("base"), ["a", "circle"], seed=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return write_tiny_wan(tmp_path_factory.mktemp("trained"), ["a", "circle"], seed=2)


def single_file(trained: Path, path: Path, prefix: str = "", dtype=torch.float32) -> Path:
    """The trained denoiser in the names of the original release."""
    weights = load_file(trained / FILE)
    named = {prefix + original_name(name): value.to(dtype) for name, value in weights.items()}
    assert not set(weights) <= set(named)
    save_file(named, path)
    return path


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_of_other_names_has_the_bits_of_the_folder_it_came_from(
    base: Path, trained: Path, tmp_path: Path, prefix: str
) -> None:
    file = single_file(trained, tmp_path / "wan.safetensors", prefix)
    said = CliRunner().invoke(
        app, ["import", str(file), str(tmp_path / "out"), "--base", str(base)]
    )
    assert said.exit_code == 0, said.output
    made = model_digests(tmp_path / "out")
    others = model_digests(base)
    assert made["transformer"] == component_digest(trained / "transformer", DIFFUSERS_STEM)
    assert made["transformer"] != others["transformer"]
    assert all(made[name] == others[name] for name in ("vae", "text_encoder", "tokenizer"))
    assert family_of(tmp_path / "out").load_denoiser(tmp_path / "out")


def test_the_type_of_the_file_is_kept(base: Path, trained: Path, tmp_path: Path) -> None:
    file = single_file(trained, tmp_path / "wan.safetensors", dtype=torch.bfloat16)
    assert import_file(file, base, tmp_path / "out").dtype == "BF16"
    made, exact = load_file(tmp_path / "out" / FILE), load_file(trained / FILE)
    assert {value.dtype for value in made.values()} >= {torch.bfloat16}
    for name, value in exact.items():
        assert torch.equal(made[name].to(torch.bfloat16), value.to(torch.bfloat16)), name


def without_one(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if name != "head.modulation"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_one, "1 tensors are missing, such as head.modulation"),
        (
            lambda w: w | {"blocks.0.cross_attn.k_img.bias": torch.zeros(32)},
            "k_img.bias: a denoiser that takes an image or a video besides the text",
        ),
        (
            lambda w: (
                w | {"patch_embedding.weight": w["patch_embedding.weight"].repeat(1, 2, 1, 1, 1)}
            ),
            r"patch_embedding.weight is .*, where the base has .*: a denoiser that takes an image",
        ),
        (
            lambda w: w | {"head.head.bias": w["head.head.bias"].repeat(2)},
            r"head.head.bias is \d+, where the base has \d+",
        ),
        (lambda w: w | {"head.head.bias": w["head.head.bias"] * torch.nan}, "NaN or infinity"),
        (
            lambda w: w | {"head.head.bias": w["head.head.bias"].to(torch.int8)},
            "head.head.bias in I8",
        ),
    ],
)
def test_a_file_of_another_network_is_refused_and_leaves_no_folder(
    base: Path, trained: Path, tmp_path: Path, change: Callable[[Weights], Weights], words: str
) -> None:
    file = single_file(trained, tmp_path / "wan.safetensors")
    save_file(change(load_file(file)), file)
    with pytest.raises(ModelFolderError, match=words):
        import_file(file, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pickled_file_is_never_opened_and_a_component_of_other_names_is_told_the_command(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "wan.pth").write_bytes(b"pickle")
    with pytest.raises(ModelFolderError, match=r"\.pth, which is never opened"):
        import_file(tmp_path / "wan.pth", base, tmp_path / "out")
    folder = write_tiny_wan(tmp_path / "model", ["a", "circle"])
    single_file(trained, folder / FILE)
    with pytest.raises(ModelFolderError, match="sgmd import FILE DST --base FOLDER"):
        family_of(folder).inspect(folder)


def test_no_folder_of_something_else_is_replaced_and_components_are_checked(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    file = single_file(trained, tmp_path / "wan.safetensors")
    (tmp_path / "work").mkdir()
    (tmp_path / "work/notes.txt").touch()
    for target in (base, base / "vae", tmp_path, tmp_path / "work"):
        with pytest.raises(ConfigError, match="replaced whole"):
            import_file(file, base, target)
    with pytest.raises(ConfigError, match="--components none"):
        import_file(file, base, tmp_path / "new", "none")
    assert (tmp_path / "work/notes.txt").exists()
    for _ in range(2):
        import_file(file, base, tmp_path / "new")


@pytest.mark.parametrize("extra", ["scaled_fp8", "blocks.0.self_attn.q.scale_weight"])
def test_weights_in_8_bits_are_refused_by_name(base, trained, tmp_path, extra: str) -> None:
    file = single_file(trained, tmp_path / "wan.safetensors", "model.diffusion_model.")
    scaled = {
        name: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value
        for name, value in load_file(file).items()
    }
    save_file(scaled, file)
    with pytest.raises(ModelFolderError, match="F8_E4M3"):
        import_file(file, base, tmp_path / "out")
    save_file(scaled | {f"model.diffusion_model.{extra}": torch.ones(1)}, file)
    with pytest.raises(ModelFolderError, match=f"{extra}: scaled weights in 8 bits.*bf16"):
        import_file(file, base, tmp_path / "out")


def test_a_lora_and_its_base_become_a_model_folder(base: Path, tmp_path: Path) -> None:
    name, draw = "blocks.0.attn1.to_q", torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 32, generator=draw), torch.randn(32, 2, generator=draw)
    file = tmp_path / "style.safetensors"
    stem = f"diffusion_model.{original_name(name)}"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(tensors | {f"{stem}.alpha": torch.tensor(1.0)}, file)
    given = ["import", f"{file}@0.5", str(tmp_path / "out"), "--base", str(base)]
    said = CliRunner().invoke(app, given)
    assert said.exit_code == 0, said.output
    before, after = load_file(base / FILE), load_file(tmp_path / "out" / FILE)
    change = 0.5 * 0.5 * up @ down
    assert change.abs().max() > 0.5
    torch.testing.assert_close(
        after[f"{name}.weight"], before[f"{name}.weight"] + change, rtol=0, atol=1e-6
    )
    others = before.keys() - {f"{name}.weight"}
    assert all(torch.equal(after[other], before[other]) for other in others)
    assert family_of(tmp_path / "out").load_denoiser(tmp_path / "out")
    with pytest.raises(ConfigError, match="a strength of 2 for a file of weights"):
        import_file(single_file(base, file), base, tmp_path / "x", strength=2.0)


def test_the_two_files_of_experts_are_imported_one_after_the_other(
    trained: Path, tmp_path: Path
) -> None:
    folder = write_tiny_experts(tmp_path / "base", ["a", "circle"], seed=5)
    single_file(trained, tmp_path / "wan.safetensors")
    with pytest.raises(ModelFolderError, match="high_noise or low_noise in its name"):
        import_file(tmp_path / "wan.safetensors", folder, tmp_path / "x")
    start, before = folder, model_digests(folder)
    for name in ("wan2.2_high_noise", "wan2.2_low_noise"):
        file = (tmp_path / "wan.safetensors").rename(tmp_path / f"{name}.safetensors")
        start = import_file(file, start, tmp_path / name).folder
        file.rename(tmp_path / "wan.safetensors")
        made = model_digests(start)
        expected = load_file(trained / FILE)
        part = "transformer" if "high" in name else "transformer_2"
        assert made[part] != before[part]
        found = load_file(start / part / FILE.name)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        if part == "transformer":
            assert made["transformer_2"] == before["transformer_2"]
