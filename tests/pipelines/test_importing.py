"""A single file in original or ComfyUI names becomes a model folder with the same bits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.importing import finite_and_narrowed, import_file
from pipelines.media.inference import read_inference_settings, write_inference_settings
from sgmd_core.errors import ConfigError, ModelFolderError
from tests.helpers.tiny_wan import write_tiny_experts, write_tiny_wan
from workers.models.content import component_digest, model_digests
from workers.models.families import family_of
from workers.models.wan_exchange import original_name
from workers.models.wan_family import WAN_TRAITS
from workers.models.weight_changes import ChangedWeights, Product
from workers.models.weight_digests import SETTINGS_FILE
from workers.models.weights import DIFFUSERS_STEM

Weights = dict[str, Tensor]
SCHEDULER = Path("scheduler") / "scheduler_config.json"
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


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
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
    # Its solver and its shift are the base's.
    for name in (SCHEDULER, Path("model_index.json")):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    words = "the base's FlowMatchEulerDiscreteScheduler with flow shift 5"
    assert words in " ".join(said.output.split())


@pytest.mark.slow
def test_a_shorter_prefix_is_read_in_8_bits_too_and_a_weight_under_two_prefixes_is_refused(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    tensors, _ = in_8_bits(trained, "old", torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "long.safetensors")
    short = {name.removeprefix("model."): value for name, value in tensors.items()}
    save_file(short, tmp_path / "short.safetensors")
    for name in ("long", "short"):
        import_file(tmp_path / f"{name}.safetensors", base, tmp_path / name)
    one, other = (load_file(tmp_path / name / FILE) for name in ("long", "short"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    short_names = single_file(trained, tmp_path / "once.safetensors", "diffusion_model.")
    once, file = load_file(short_names), tmp_path / "twice.safetensors"
    for other in ("", "model.diffusion_model."):
        save_file(once | {f"{other}head.modulation": torch.zeros(1, 2, 32)}, file)
        names = " and as ".join(
            sorted((f"{other}head.modulation", "diffusion_model.head.modulation"), key=len)
        )
        with pytest.raises(ModelFolderError, match=f"head.modulation is there twice, as {names}"):
            import_file(file, base, tmp_path / "twice")


def test_a_base_without_a_scheduler_gets_one_and_the_import_says_so(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(base, tmp_path / "bare", ignore=lambda *_: ["scheduler"])
    file = single_file(trained, tmp_path / "wan.safetensors")
    made = import_file(file, bare, tmp_path / "out")
    assert made.scheduler == "UniPCMultistepScheduler"
    assert not made.is_scheduler_of_base
    assert read_inference_settings(made.folder).flow_shift == made.flow_shift == 1


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


@pytest.mark.slow
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


COMFYUI = "model.diffusion_model."


def in_8_bits(trained: Path, form: str, kind: torch.dtype) -> tuple[Weights, dict[str, str]]:
    """The layers of a denoiser quantised as ComfyUI does it: tensors, and the header's metadata."""
    tensors: Weights = {}
    layers = []
    for own, value in load_file(trained / FILE).items():
        name = COMFYUI + original_name(own)
        if value.ndim != 2 or not name.endswith(".weight"):
            tensors[name] = value.to(torch.bfloat16)
            continue
        layer = name.removesuffix(".weight")
        most = value.abs().amax(1, keepdim=True) if form == "rows" else value.abs().amax()
        scale = most / torch.finfo(kind).max if form != "plain" else torch.tensor(1.0)
        tensors[name] = (value * (1.0 / scale)).to(kind)
        layers.append(layer)
        if form == "plain":
            continue
        ending = "weight_scale" if form in ("header", "markers") else "scale_weight"
        tensors[f"{layer}.{ending}"] = scale
        if form == "old":
            tensors[f"{layer}.scale_input"] = torch.tensor(7.0)
        if form == "markers":
            words = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(words), dtype=torch.uint8)
    if form in ("old", "rows"):
        tensors[f"{COMFYUI}scaled_fp8"] = torch.zeros(2, dtype=kind)
    formats = {layer.removeprefix(COMFYUI): {"format": "float8_e4m3fn"} for layer in layers}
    stated = {"_quantization_metadata": json.dumps({"layers": formats})}
    return tensors, stated if form == "header" else {}


@pytest.mark.parametrize(
    ("form", "kind"),
    [
        ("old", torch.float8_e4m3fn),
        ("rows", torch.float8_e5m2),
        ("header", torch.float8_e4m3fn),
        ("markers", torch.float8_e4m3fn),
        ("plain", torch.float8_e4m3fn),
    ],
)
def test_weights_in_8_bits_are_imported_as_their_numbers_times_their_scales_in_bf16(
    base: Path, trained: Path, tmp_path: Path, form: str, kind: torch.dtype
) -> None:
    tensors, header = in_8_bits(trained, form, kind)
    save_file(tensors, tmp_path / "wan.safetensors", header)
    given = ["import", str(tmp_path / "wan.safetensors"), str(tmp_path / "out")]
    said = CliRunner().invoke(app, [*given, "--base", str(base)])
    assert said.exit_code == 0, said.output
    made, exact = load_file(tmp_path / "out" / FILE), load_file(trained / FILE)
    moved, numbers = 0.0, 0
    for own, value in exact.items():
        stored = tensors[name := COMFYUI + original_name(own)]
        expected = stored.double()
        if stored.dtype == kind:
            numbers += 1
            scales = (f"{name.removesuffix('weight')}{end}" for end in ENDINGS)
            for scale in (tensors[each] for each in scales if each in tensors):
                expected = expected * scale.double()
                moved = max(moved, (stored.double() - expected).abs().max().item())
            assert (value - expected).abs().max() < 0.2 * value.abs().max(), name
        wide = WAN_TRAITS.keep_fp32.intersection(own.split("."))
        expected = expected.to(torch.float32 if wide else torch.bfloat16)
        assert made[own].dtype == expected.dtype, own
        assert torch.equal(made[own], expected), own
    assert numbers > 10
    assert f"{numbers} of them from 8 bits" in " ".join(said.output.split())
    assert moved > 100 or form == "plain"


ENDINGS = ("scale_weight", "weight_scale")
QUERY = f"{COMFYUI}blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("change", "header", "words"),
    [
        ({f"{QUERY}.scale_weight": torch.ones(2, 3)}, {}, r"q.scale_weight is \(2, 3\) beside"),
        ({f"{QUERY}.scale_weight": torch.ones(32)}, {}, r"q.scale_weight is \(32,\) beside"),
        ({f"{QUERY}.scale_weight": torch.tensor(0.0)}, {}, "q.scale_weight has 0"),
        ({f"{QUERY}.scale_weight": None}, {}, "q.weight in F8_E4M3 without a scale"),
        ({f"{QUERY}.weight": torch.ones(32, 32)}, {}, "q.scale_weight beside a weight in F32"),
        ({f"{QUERY}.weight": torch.ones(32, 32).to(torch.int8)}, {}, "q.weight in I8"),
        ({f"{QUERY}.weight_scale": torch.tensor(1.0)}, {}, "q.scale_weight and .*q.weight_scale"),
        ({f"{QUERY}.pre_quant_scale": torch.ones(32)}, {}, "not in the network.*pre_quant_scale"),
        ({}, {"blocks.0.self_attn.q": {"format": "nvfp4"}}, "self_attn.q in the format nvfp4"),
        ({}, {"blocks.9.ffn.0": {"format": "float8_e4m3fn"}}, "blocks.9.ffn.0 with no weight"),
        ({}, {"blocks.0.ffn.0": {"format": "float8_e5m2"}}, "blocks.0.ffn.0 with F8_E4M3"),
        (
            {},
            {"blocks.0.ffn.0": {"format": "float8_e4m3fn", "hadamard": 64}},
            "blocks.0.ffn.0 with hadamard",
        ),
        ({f"{QUERY}.scale_weight": torch.tensor([[1.0], [float("inf")]] * 16)}, {}, "has inf"),
    ],
)
def test_weights_in_8_bits_that_are_not_understood_are_refused_by_name(
    base: Path,
    trained: Path,
    tmp_path: Path,
    change: dict[str, Tensor | None],
    header: dict[str, object],
    words: str,
) -> None:
    tensors: dict[str, Tensor | None] = dict(in_8_bits(trained, "old", torch.float8_e4m3fn)[0])
    tensors |= change
    stated = {"_quantization_metadata": json.dumps({"layers": header})} if header else {}
    whole = {name: value for name, value in tensors.items() if value is not None}
    save_file(whole, tmp_path / "wan.safetensors", stated)
    with pytest.raises(ModelFolderError, match=words):
        import_file(tmp_path / "wan.safetensors", base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
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
    assert (tmp_path / "out" / SCHEDULER).read_bytes() == (base / SCHEDULER).read_bytes()
    assert not (tmp_path / "out" / SETTINGS_FILE).exists()
    # Few steps of the base hold for the merged model, too, and those of the LoRA come first.
    few = read_inference_settings(base).model_copy(update={"num_steps": 4, "flow_shift": 3.0})
    few_step = shutil.copytree(base, tmp_path / "few")
    write_inference_settings(few_step, few)
    made = import_file(file, few_step, tmp_path / "x")
    assert made.is_scheduler_of_base
    assert read_inference_settings(made.folder) == few
    (file.parent / SETTINGS_FILE).write_text('{"num_steps": 2, "flow_shift": 8}')
    made = import_file(file, few_step, tmp_path / "x")
    assert (made.scheduler, made.flow_shift) == ("UniPCMultistepScheduler", 8)
    assert read_inference_settings(made.folder).num_steps == 2
    (file.parent / SETTINGS_FILE).unlink()
    with pytest.raises(ConfigError, match="a strength of 2 for a file of weights"):
        import_file(single_file(base, file), base, tmp_path / "x", strength=2.0)


def test_a_weight_is_merged_once_and_a_change_beyond_the_files_type_is_refused(
    base: Path, tmp_path: Path
) -> None:
    asked: list[str] = []

    class Counted(Product):
        def values(self, device: torch.device) -> Tensor:
            asked.append("blocks.0.attn1.to_q.weight")
            return super().values(device)

    weights = load_file(base / FILE)
    change = Counted(torch.ones(32, 1), torch.ones(1, 32))
    merged = ChangedWeights(weights, {"blocks.0.attn1.to_q.weight": [change]})
    made = finite_and_narrowed(tmp_path, merged, torch.bfloat16, ())
    assert asked == ["blocks.0.attn1.to_q.weight"]
    expected = (weights[asked[0]] + 1).to(torch.bfloat16)
    assert torch.equal(made[asked[0]], expected)
    huge = ChangedWeights(weights, {asked[0]: [Counted(change.up, change.down, 1e5)]})
    assert finite_and_narrowed(tmp_path, huge, torch.float32, ())
    with pytest.raises(ModelFolderError, match=r"to_q.weight, in torch.float16"):
        finite_and_narrowed(tmp_path, huge, torch.float16, ())


@pytest.mark.slow
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
