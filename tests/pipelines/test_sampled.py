"""A model with LoRAs merged in holds their sum, and says how it is sampled."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.exporting.sampled import LoraSource, sampled_folder
from pipelines.media.inference import read_inference_settings
from sgmd_core.errors import ConfigError, ModelFolderError
from tests.helpers.tiny_wan import HEIGHT, NUM_FRAMES, WIDTH, write_tiny_experts, write_tiny_wan
from workers.models.families import family_of

LAYER = "blocks.1.attn2.to_v"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny_wan(tmp_path_factory.mktemp("wan") / "model", ["a", "circle"])


def lora(path: Path, seed: int = 0) -> torch.Tensor:
    """Writes a LoRA of one layer; returns the change of its weight at strength 1."""
    draw = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, 32, generator=draw), torch.randn(32, 2, generator=draw)
    path.parent.mkdir(exist_ok=True)
    tensors = {"lora_A": down, "lora_B": up}
    save_file({f"transformer.{LAYER}.{key}.weight": value for key, value in tensors.items()}, path)
    return up @ down


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(family_of(folder).load_denoiser(folder).state_dict())


@pytest.mark.slow
def test_files_are_merged_with_their_strengths_and_the_rest_is_the_base(base, tmp_path) -> None:
    first, second = lora(tmp_path / "a.safetensors"), lora(tmp_path / "b@2.safetensors", 1)
    texts = [f"{tmp_path}/a.safetensors@-0.5", f"{tmp_path}/b@2.safetensors"]
    loras = [LoraSource.parse(text) for text in texts]
    assert [each.strength for each in loras] == [-0.5, 1.0]
    before, name = weights(base), f"transformer.{LAYER}.weight"
    with sampled_folder(base, loras=loras) as folder:
        after = weights(folder)
        assert read_inference_settings(folder) == read_inference_settings(base)
    change = -0.5 * first + second
    assert change.abs().max() > 1
    torch.testing.assert_close(after[name], before[name] + change, rtol=0, atol=1e-5)
    assert all(torch.equal(after[other], before[other]) for other in before.keys() - {name})


def test_a_strength_that_is_no_number_is_refused() -> None:
    for text in ("mine.safetensors@strong", "mine.safetensors@nan", "mine.safetensors@"):
        with pytest.raises(ConfigError, match=r"mine\.safetensors@0\.8"):
            LoraSource.parse(text)


def test_one_lora_may_say_how_to_sample_and_two_that_agree(base, tmp_path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        lora(place / "lora.safetensors")
        (place / "sgmd.json").write_text(json.dumps({"num_steps": 3}))
    with sampled_folder(base, loras=[LoraSource(places[0])]) as folder:
        assert read_inference_settings(folder).num_steps == 3
    with sampled_folder(base, loras=[LoraSource(place, 0.5) for place in places]) as folder:
        assert read_inference_settings(folder).num_steps == 3
    (places[1] / "sgmd.json").write_text(json.dumps({"num_steps": 4, "flow_shift": 5.0}))
    words = r"sgmd\.json in .*one and in .*two differ: num_steps 3 and 4\. Expected one way"
    with (
        pytest.raises(ConfigError, match=words),
        sampled_folder(base, loras=[LoraSource(place) for place in places]),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("lora-high_noise", "lora-low_noise"),
        ("flow_slow_HIGH_v2", "flow_slow_LOW_v2"),
        ("lowpoly_HighNoise", "lowpoly_LowNoise"),
    ],
)
def test_the_files_of_experts_are_told_by_their_names(tmp_path, high: str, low: str) -> None:
    folder = write_tiny_experts(tmp_path / "model", ["a"])
    before = weights(folder)
    changes = {
        "high": lora(tmp_path / "loras" / f"{high}.safetensors", 2),
        "low": lora(tmp_path / "loras" / f"{low}.safetensors", 3),
    }
    apart = [LoraSource(path) for path in (tmp_path / "loras").iterdir()]
    for loras in ([LoraSource(tmp_path / "loras")], apart):
        with sampled_folder(folder, loras=loras) as merged:
            after = weights(merged)
        for expert, change in changes.items():
            name = f"{expert}.transformer.{LAYER}.weight"
            torch.testing.assert_close(after[name], before[name] + change, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "lora_high_low", "flow", "lora_high_noise_low_noise"])
def test_a_file_of_no_expert_is_refused_with_the_names_that_tell(tmp_path, name: str) -> None:
    folder = write_tiny_experts(tmp_path / "model", ["a"])
    lora(tmp_path / f"{name}.safetensors")
    with (
        pytest.raises(ModelFolderError, match="high_noise or low_noise in its name"),
        sampled_folder(folder, loras=[LoraSource(tmp_path / f"{name}.safetensors")]),
    ):
        pass


@pytest.mark.slow
def test_generate_takes_several_files(base, tmp_path) -> None:
    for name in ("a", "b"):
        lora(tmp_path / f"{name}.safetensors")
    size = ["--num-frames", str(NUM_FRAMES), "--height", str(HEIGHT), "--width", str(WIDTH)]
    given = ["generate", str(base), "--prompt", "a circle", "--num-steps", "1", *size, "--json"]
    first, second = f"{tmp_path}/a.safetensors", f"{tmp_path}/b.safetensors"
    clips: dict[str, bytes] = {}
    for name, texts in {
        "neither": [f"{first}@0", f"{second}@0"],
        "second": [f"{first}@0", f"{second}@1"],
        "alone": [second],
    }.items():
        loras = [word for text in texts for word in ("--lora", text)]
        out = ["--output", str(tmp_path / name), "--guidance-scale", "1"]
        said = CliRunner().invoke(app, [*given, *loras, *out])
        assert said.exit_code == 0, said.output
        clips[name] = next((tmp_path / name).glob("*.gif")).read_bytes()
    assert clips["second"] == clips["alone"] != clips["neither"]
