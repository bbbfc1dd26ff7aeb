"""The factories make roles that work together from one diffusers folder."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from sgmd_core.errors import ModelFolderError, ShapeError
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.types import GeneratorSignal
from tests.helpers.moves import relative_error
from tests.helpers.roles import key_of, same_bits
from tests.helpers.tiny_wan import HEIGHT, NUM_FRAMES, TEXT_LENGTH, WIDTH, write_tiny_wan
from workers.build import (
    build_denoiser,
    build_evaluator,
    build_fake_score,
    build_generator,
    build_teacher,
    build_text_encoder,
)
from workers.clip_settings import VideoSettings
from workers.evaluator import clips_side_by_side
from workers.models.exporting import DTYPES, narrowed
from workers.models.families import family_of
from workers.models.wan_family import WanFamily
from workers.network_settings import ComputeSettings, OptimizerSettings
from workers.settings import (
    ExportSettings,
    FakeScoreSettings,
    GeneratorSettings,
    ModelSettings,
    TeacherSettings,
)

CAPTIONS = ("a red circle moves left", "a blue bar moves up slowly")
SETTINGS = {"flow_shift": 5.0}
KEPT_IN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
VIDEO = VideoSettings(NUM_FRAMES, HEIGHT, WIDTH, fps=8)
GENERATOR = GeneratorSettings(optimizer=OptimizerSettings(lr=1e-2))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ModelSettings:
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    folder = write_tiny_wan(tmp_path_factory.mktemp("wan"), words)
    return ModelSettings(str(folder), text_length=TEXT_LENGTH)


def test_a_network_that_is_timed_computes_as_its_role_does(model):
    denoiser = build_denoiser(model, ComputeSettings(precision="bf16"), torch.get_num_threads())
    assert denoiser.autocast_dtype is torch.bfloat16
    assert next(denoiser.parameters()).is_cuda == torch.cuda.is_available()


@pytest.mark.slow
def test_a_validator_in_bfloat16_samples_what_the_export_in_bfloat16_does(model, tmp_path):
    threads, schedule = torch.get_num_threads(), FlowMatchSchedule()
    clips: dict[str, Tensor] = {}
    for precision, stored in (("fp32", "fp32"), ("bf16", "bf16")):
        settings = replace(GENERATOR, compute=ComputeSettings(precision=precision))
        generator = build_generator(model, VIDEO, schedule, settings, 0, threads)
        generator._average.average["transformer.proj_out.bias"].add_(1.0)
        folder = tmp_path / precision
        form = ExportSettings(dtype=stored)
        generator.export(str(folder), model.folder, SETTINGS, form=form)
        handed, whole = generator.validated_weights(), generator.final_weights()
        kept = WanFamily.traits.keep_fp32
        assert same_bits(handed, narrowed(whole, DTYPES[precision], kept))
        own = build_evaluator(model, VIDEO, schedule, threads, weights=settings)
        before = own.sample(CAPTIONS, 0, 1, 2, 4.0)
        clips[precision] = own.sample(CAPTIONS, 0, 1, 2, 1.0, handed)
        assert {value.dtype for value in own._replaced.values()} == {
            value.dtype for value in handed.values()
        }
        exported = build_evaluator(
            ModelSettings(str(folder), TEXT_LENGTH), VIDEO, schedule, threads, weights=settings
        )
        assert torch.equal(exported.sample(CAPTIONS, 0, 1, 2, 1.0), clips[precision])
        # The base's own weights are in use again.
        assert torch.equal(own.sample(CAPTIONS, 0, 1, 2, 4.0), before)
        assert not torch.equal(own.sample(CAPTIONS, 0, 1, 2, 1.0), clips[precision])
    assert 1e-4 < (clips["bf16"] - clips["fp32"]).abs().mean() < 0.02


def test_large_clips_are_sampled_one_by_one_and_small_ones_side_by_side():
    assert [clips_side_by_side(16, tokens) for tokens in (64, 2048, 32760, 75600)] == [16, 16, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "most"), [("bf16", 0.03), ("fp8", 0.15)])
def test_a_frozen_teacher_in_few_bits_differs_by_their_rounding_and_has_an_input_gradient(
    model, weights, most
):
    threads = torch.get_num_threads()
    text = build_text_encoder(model, threads)
    query = _generator(model).rollout(key_of(0), text.encode(CAPTIONS, (0, 1)))
    negative = text.encode_negative("")
    found: dict[str, dict[str, Tensor]] = {}
    bytes_of: dict[str, int] = {}
    for kind in ("fp32", weights):
        compute = ComputeSettings(precision="bf16", weights=kind)
        teacher = build_teacher(model, TeacherSettings(compute=compute), threads)
        prediction = teacher.denoise(query, negative)
        ones = torch.ones_like(query.x0)
        signal = GeneratorSignal(query.key, 0 * ones, 0, {}, teacher_cotangent=ones)
        pulled = teacher.pullback(query, negative, signal)
        found[kind] = {"velocity": prediction.velocity, "gradient": pulled.grad_x0}
        blocks = teacher._network.blocks
        bytes_of[kind] = sum(value.nbytes for part in blocks for value in part.parameters())
        # Passes leave the weights in the type that they are kept in.
        assert {value.dtype for value in blocks[0].ffn.parameters()} == {KEPT_IN[kind]}
    assert 1e-4 < relative_error(found[weights], found["fp32"]) < most
    # Norms and modulation keep their digits, and are much of a network as small as this.
    assert bytes_of[weights] < 0.7 * bytes_of["fp32"]


def _generator(model: ModelSettings):
    return build_generator(model, VIDEO, FlowMatchSchedule(), GENERATOR, 0, torch.get_num_threads())


@pytest.mark.slow
def test_built_roles_make_an_iteration_and_the_result_is_a_diffusers_pipeline(model, tmp_path):
    threads = torch.get_num_threads()
    generator = _generator(model)
    fake_score = build_fake_score(model, SgmdObjective(), FakeScoreSettings(), threads)
    teacher = build_teacher(model, TeacherSettings(), threads)
    text_encoder = build_text_encoder(model, threads)
    evaluator = build_evaluator(model, VIDEO, FlowMatchSchedule(), threads)

    query = generator.rollout(key_of(0), text_encoder.encode(CAPTIONS, (0, 1)))
    prediction = teacher.denoise(query, text_encoder.encode_negative(""))
    report = generator.learn(fake_score.signal(query, prediction, share=1.0))
    fake_score.track(query, share=1.0)
    assert report.metrics.keys() >= {"fisher", "negative_residual"}
    for role in (generator, fake_score):
        assert role.gradient_report(0).finite
        assert role.step(0) == 1

    whole = ExportSettings(dtype="fp32")
    generator.export(str(tmp_path / "generator"), model.folder, SETTINGS, form=whole)
    pipeline = WanPipeline.from_pretrained(tmp_path / "generator")
    trained = generator.final_weights()
    for name, value in pipeline.transformer.named_parameters():
        assert torch.equal(value, trained[f"transformer.{name}"])
    assert any(
        not torch.equal(value, trained[f"transformer.{name}"])
        for name, value in WanPipeline.from_pretrained(model.folder).transformer.named_parameters()
    )

    video = evaluator.sample(CAPTIONS, 0, 1, 4, 1.0, trained)
    exported = build_evaluator(
        ModelSettings(str(tmp_path / "generator"), TEXT_LENGTH), VIDEO, FlowMatchSchedule(), threads
    )
    assert video.shape == (2, 3, NUM_FRAMES, HEIGHT, WIDTH)
    assert torch.equal(exported.sample(CAPTIONS, 0, 1, 4, 1.0), video)


def test_exporting_leaves_the_weights_in_training_alone(model, tmp_path):
    generator = _generator(model)
    before = {name: value.clone() for name, value in generator._network.state_dict().items()}
    generator._average.average["transformer.patch_embedding.bias"].add_(1.0)
    generator.export(str(tmp_path / "generator"), model.folder, SETTINGS)
    after = generator._network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_export_is_in_bfloat16_but_for_what_diffusers_keeps_in_float32(model, tmp_path):
    generator = _generator(model)
    generator.export(str(tmp_path / "generator"), model.folder, SETTINGS)
    stored = load_file(tmp_path / "generator/transformer/diffusion_pytorch_model.safetensors")
    trained = generator.final_weights()
    kept = set(WanTransformer3DModel._keep_in_fp32_modules or ())
    assert kept == WanFamily.traits.keep_fp32
    for name, value in stored.items():
        dtype = torch.float32 if kept.intersection(name.split(".")) else torch.bfloat16
        assert value.dtype is dtype, name
        assert torch.equal(value, trained[f"transformer.{name}"].to(dtype)), name
    assert {value.dtype for value in stored.values()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("components", ["link", "copy"])
def test_unchanged_weights_are_linked_or_copied_and_small_files_copied(model, tmp_path, components):
    form = ExportSettings(components=components)
    _generator(model).export(str(tmp_path / "generator"), model.folder, SETTINGS, form=form)
    weights = Path("text_encoder/model.safetensors")
    base, exported = (Path(folder) / weights for folder in (model.folder, tmp_path / "generator"))
    assert base.read_bytes() == exported.read_bytes()
    assert base.samefile(exported) == (components == "link")
    config = Path("text_encoder/config.json")
    assert not (Path(model.folder) / config).samefile(tmp_path / "generator" / config)
    WanPipeline.from_pretrained(tmp_path / "generator")


def test_a_base_of_links_into_a_cache_is_exported_with_links_to_the_files_behind(model, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(model.folder, cache / "snapshot")
    weights = cache / "snapshot/vae/diffusion_pytorch_model.safetensors"
    blob = weights.rename(cache / "blob")
    weights.symlink_to(Path("../../blob"))
    linked = ModelSettings(str(cache / "snapshot"), text_length=TEXT_LENGTH)
    _generator(linked).export(str(tmp_path / "generator"), linked.folder, SETTINGS)
    exported = tmp_path / "generator/vae/diffusion_pytorch_model.safetensors"
    assert not exported.is_symlink()
    assert exported.samefile(blob)
    WanPipeline.from_pretrained(tmp_path / "generator")


def test_an_embedding_does_not_depend_on_the_captions_beside_it(model):
    first, second = (build_text_encoder(model, torch.get_num_threads()) for _ in range(2))
    beside = first.encode(CAPTIONS, (0, 1)).text[0]
    assert torch.equal(beside, second.encode(CAPTIONS[:1], (0,)).text[0])


def test_every_parameter_is_saved_by_name(model):
    # state_dict would also hold persistent buffers; Wan has none, so parameters are all there is.
    network = _generator(model)._network
    assert network.state_dict().keys() == dict(network.named_parameters()).keys()


def test_factories_and_settings_can_be_sent_to_another_process(model):
    sent = (build_generator, (model, VIDEO, FlowMatchSchedule(), GENERATOR, 0, 1))
    factory, settings = pickle.loads(pickle.dumps(sent))
    assert factory is build_generator
    assert settings[0] == model


def test_threads_are_set(model):
    before = torch.get_num_threads()
    try:
        build_teacher(model, TeacherSettings(), 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_missing_folder_and_a_clip_that_does_not_fit_are_named(model, tmp_path):
    nowhere = ModelSettings(str(Path(tmp_path) / "nowhere"))
    with pytest.raises(ModelFolderError, match="nowhere"):
        build_teacher(nowhere, TeacherSettings(), torch.get_num_threads())
    odd = VideoSettings(num_frames=10, height=HEIGHT, width=WIDTH, fps=8)
    with pytest.raises(ShapeError, match="10 frames"):
        build_generator(model, odd, FlowMatchSchedule(), GENERATOR, 0, torch.get_num_threads())


@pytest.mark.slow
def test_frozen_encoders_are_in_bfloat16_unless_asked_for_float32_and_make_float32(model):
    threads = torch.get_num_threads()
    whole = replace(model, encoder_dtype="fp32")
    for settings, dtype in ((model, torch.bfloat16), (whole, torch.float32)):
        text, evaluator = (
            build_text_encoder(settings, threads),
            build_evaluator(settings, VIDEO, FlowMatchSchedule(), threads),
        )
        assert {value.dtype for value in text._embedder.network.parameters()} == {dtype}
        assert {value.dtype for value in evaluator._decoder.network.parameters()} == {dtype}
    narrow, exact = (
        build_text_encoder(settings, threads).encode(CAPTIONS, (0, 1)).text
        for settings in (model, whole)
    )
    assert narrow.dtype is exact.dtype is torch.float32
    assert not torch.equal(narrow, exact)
    torch.testing.assert_close(narrow, exact, atol=0.05, rtol=0.05)


def test_a_hub_cache_is_refused_with_the_folder_of_its_version(tmp_path):
    version = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    version.mkdir(parents=True)
    with pytest.raises(ModelFolderError, match=f"Give {version}"):
        family_of(tmp_path / "models--a--b")
