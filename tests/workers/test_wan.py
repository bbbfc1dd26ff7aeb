"""The Wan adapter: what it loads equals diffusers' pipeline, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from sgmd_core.errors import ModelFolderError, ShapeError
from sgmd_core.worlds.shapes import labels_from_captions, measure_clips, score_clips
from tests.helpers.tiny_wan import (
    HEIGHT,
    LATENT_CHANNELS,
    LATENT_SHAPE,
    NUM_FRAMES,
    TEXT_DIM,
    TEXT_LENGTH,
    WIDTH,
    tiny_velocity,
    write_tiny_wan,
)
from workers.models.wan import load_transformer, load_vae, save_generator_pipeline
from workers.models.wan_text import clean_caption, load_text

WORDS = ("a", "red", "circle", "moves", "left")
CAPTIONS = ("a red circle moves left", "a circle", "")


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_wan(tmp_path_factory.mktemp("wan") / "model", WORDS)


@pytest.fixture
def broken(wan_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(wan_folder, tmp_path / "model")


@pytest.fixture(scope="module")
def pipeline(wan_folder: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(wan_folder)


def test_velocity_is_the_transformer_at_a_thousand_sigma(
    wan_folder: Path, pipeline: WanPipeline
) -> None:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *LATENT_SHAPE, generator=generator)
    text = torch.randn(2, TEXT_LENGTH, TEXT_DIM, generator=generator)
    sigma = torch.tensor([0.25, 0.9])
    with torch.no_grad():
        found = load_transformer(wan_folder)(x_t, sigma, text)
        expected = pipeline.transformer(
            hidden_states=x_t,
            timestep=torch.tensor([250.0, 900.0]),
            encoder_hidden_states=text,
            return_dict=False,
        )[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_reach_the_transformer_in_its_own_type_which_no_pass_looks_up(
    wan_folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_transformer(wan_folder, dtype)
    # Some modules stay in float32: the type is not that of just any parameter.
    kept = {value.dtype for value in network.parameters()}
    assert kept == {torch.float32, dtype}
    handed: list[torch.dtype] = []
    network.transformer.patch_embedding.register_forward_pre_hook(
        lambda _module, inputs: handed.append(inputs[0].dtype)
    )
    expected = network.transformer.dtype
    monkeypatch.delattr(ModelMixin, "dtype")
    with torch.no_grad():
        network(torch.zeros(1, *LATENT_SHAPE), torch.ones(1), torch.zeros(1, 3, TEXT_DIM))
    assert handed == [expected] == [dtype]


@pytest.mark.parametrize("max_length", [2, TEXT_LENGTH, 40])
def test_captions_are_embedded_as_the_pipeline_does(
    wan_folder: Path, pipeline: WanPipeline, max_length: int
) -> None:
    found = load_text(wan_folder).encode(CAPTIONS, max_length)
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(
            list(CAPTIONS), do_classifier_free_guidance=False, max_sequence_length=max_length
        )
    assert found.shape == (len(CAPTIONS), max_length, TEXT_DIM)
    # The pipeline attends over padding before it is masked; sums differ in the last digits.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "caption",
    [
        "a red circle",
        "  two \t lines\n\nof\u00a0text\u2003\x1c ",
        "escaped &amp;amp; twice, once &lt;b&gt; and not &nosuch;",
        "\u00e2\u0080\u0099mended\u00e2\u0080\u0099 ï¬\u0081ne",
        "fullwidth \uff21\uff22 and \u2018quotes\u2019",
        "&nbsp;&#32;&#x3000;",
        "",
    ],
)
def test_captions_are_cleaned_as_the_pipeline_does(caption: str) -> None:
    assert clean_caption(caption) == prompt_clean(caption)


def test_nothing_follows_the_end_of_a_caption(wan_folder: Path) -> None:
    found = load_text(wan_folder).encode(["a circle"], 10)
    assert found[0, :3].abs().sum(dim=1).gt(0).all()
    assert not found[0, 3:].any()


@pytest.mark.slow
def test_latents_are_normalised_with_the_stored_statistics(broken: Path) -> None:
    config_file = broken / "vae" / "config.json"
    config = json.loads(config_file.read_text())
    mean, std = [0.5, -1.0, 0.0, 2.0], [2.0, 0.5, 1.0, 4.0]
    raw = load_vae(broken)
    config_file.write_text(json.dumps(config | {"latents_mean": mean, "latents_std": std}))
    vae = load_vae(broken)
    video = torch.rand(1, 3, NUM_FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    shape = (1, LATENT_CHANNELS, 1, 1, 1)
    expected = (raw.encode(video) - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    torch.testing.assert_close(vae.encode(video), expected)
    # The decoder amplifies the last digit that normalising and back may change.
    again = raw.decode(raw.encode(video))
    torch.testing.assert_close(vae.decode(expected), again, rtol=0, atol=1e-4)


def test_videos_have_the_announced_latent_shape_and_return_to_unit_range(wan_folder: Path) -> None:
    vae = load_vae(wan_folder)
    assert vae.latent_shape(NUM_FRAMES, HEIGHT, WIDTH) == LATENT_SHAPE
    latents = vae.encode(torch.rand(1, 3, NUM_FRAMES, HEIGHT, WIDTH))
    assert latents.shape == (1, *LATENT_SHAPE)
    video = vae.decode(3 * latents)
    assert video.shape == (1, 3, NUM_FRAMES, HEIGHT, WIDTH)
    assert float(video.min()) >= 0
    assert float(video.max()) <= 1


@pytest.mark.parametrize("size", [(12, 16, 16), (9, 15, 16), (9, 16, 18), (0, 16, 16)])
def test_a_size_that_does_not_divide_is_refused(
    wan_folder: Path, size: tuple[int, int, int]
) -> None:
    with pytest.raises(ShapeError, match="multiple of 4, height and width multiples of 4"):
        load_vae(wan_folder).latent_shape(*size)


@pytest.mark.parametrize("shape", [(1, 3, 3, 4, 4), (1, 4, 3, 5, 4), (4, 3, 4, 4)])
def test_latents_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="denoising"):
        tiny_velocity()(torch.zeros(shape), torch.ones(1), torch.zeros(1, TEXT_LENGTH, TEXT_DIM))


@pytest.mark.slow
def test_a_saved_generator_is_a_whole_pipeline(wan_folder: Path, tmp_path: Path) -> None:
    generator = tiny_velocity(seed=5)
    for _ in range(2):  # A second time replaces the first.
        weights = dict(generator.named_parameters())
        save_generator_pipeline(tmp_path / "out", wan_folder, weights, flow_shift=3.5)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    saved = WanPipeline.from_pretrained(tmp_path / "out")
    assert saved.scheduler.config.flow_shift == 3.5
    for name, value in generator.transformer.state_dict().items():
        assert torch.equal(saved.transformer.state_dict()[name], value), name
    torch.testing.assert_close(
        load_text(tmp_path / "out").encode(CAPTIONS, 6), load_text(wan_folder).encode(CAPTIONS, 6)
    )


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no such folder"):
        load_transformer(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
def test_a_missing_file_is_named(broken: Path, name: str) -> None:
    (broken / name).unlink()
    with pytest.raises(ModelFolderError, match=name):
        load_transformer(broken)


def test_missing_weights_are_named(broken: Path) -> None:
    next((broken / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(ModelFolderError, match=r"no weights: no \*.safetensors file in .*vae"):
        load_vae(broken)


@pytest.mark.parametrize(
    ("part", "load"),
    [("transformer", load_transformer), ("vae", load_vae), ("text_encoder", load_text)],
)
def test_truncated_weights_are_named(broken: Path, part: str, load) -> None:
    weights = next((broken / part).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ModelFolderError, match=weights.name):
        load(broken)


def test_broken_json_is_named(broken: Path) -> None:
    (broken / "transformer" / "config.json").write_text("{")
    with pytest.raises(ModelFolderError, match=r"config.json is not JSON"):
        load_transformer(broken)


def test_a_missing_tokenizer_is_named(broken: Path) -> None:
    (broken / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(ModelFolderError, match=r"tokenizer_config.json is missing"):
        load_text(broken)


def test_another_family_is_refused(broken: Path) -> None:
    (broken / "model_index.json").write_text(json.dumps({"_class_name": "LTXPipeline"}))
    with pytest.raises(ModelFolderError, match="LTXPipeline"):
        load_transformer(broken)


ASSETS = Path(__file__).parents[2] / "assets" / "tiny-wan"


@pytest.mark.slow
def test_the_embedded_teacher_loads_in_diffusers_and_shows_what_captions_say() -> None:
    pipeline = WanPipeline.from_pretrained(ASSETS)
    pipeline.set_progress_bar_config(disable=True)
    captions = ["a red circle moves left quickly", "a blue bar moves up", "a white bar moves right"]
    frames = pipeline(
        captions,
        height=32,
        width=32,
        num_frames=13,
        num_inference_steps=12,
        guidance_scale=2.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    assert frames.shape == (3, 13, 3, 32, 32)
    scores = score_clips(measure_clips(frames.transpose(1, 2)), labels_from_captions(captions))
    assert (scores.colour, scores.direction) == (1.0, 1.0)


def test_the_embedded_teacher_is_small_enough_for_git() -> None:
    size_bytes = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    assert size_bytes <= 12_000_000


def test_latents_with_more_patches_than_positions_are_refused_by_name() -> None:
    network = tiny_velocity()
    network.require_latents(torch.zeros(1, 4, 3, 32, 32))
    with pytest.raises(ShapeError, match="at most 16 along each axis"):
        network.require_latents(torch.zeros(1, 4, 3, 32, 34))
