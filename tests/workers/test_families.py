"""Truths that every model family has to meet; a new one meets them all or fails here by name."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sgmd_core.errors import ConfigError, ModelFolderError, ShapeError
from sgmd_core.schedule import FlowMatchSchedule
from tests.helpers import tiny_ltx, tiny_wan
from tests.helpers.families import installed_family
from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.ranks import on_ranks
from tests.helpers.toy_family import write_toy
from workers.compute import prepare_network
from workers.models.content import fingerprint, model_digests
from workers.models.families import families, family_named, family_of, load_family
from workers.models.family import Denoiser, ModelFamily
from workers.models.sampling import EulerSampler, SampleRequest
from workers.models.wan_transition import write_transition
from workers.network_settings import ComputeSettings
from workers.sharding import full_tensor, is_sharded, shard

CAPTIONS = ("a red circle moves left", "a circle", "")
TEXT_LENGTH = 6


@dataclass(frozen=True)
class Case:
    """A tiny model of a family, and a clip that it can make.

    `family` is its name where the case has another one.
    """

    write: Callable[[Path], Path]
    clip: tuple[int, int, int] = (9, 16, 16)
    family: str = ""


def write_transition_of_tiny_wan(folder: Path) -> Path:
    base = tiny_wan.write_tiny_wan(folder.parent / "base", CAPTIONS[0].split())
    write_transition(folder, base, num_layers=1, num_steps=2, shift=10.0)
    return folder


CASES = {
    "wan": Case(lambda folder: tiny_wan.write_tiny_wan(folder, CAPTIONS[0].split())),
    "wan22-5b": Case(
        lambda folder: tiny_wan.write_tiny_wan22_5b(folder, CAPTIONS[0].split()),
        clip=(9, 32, 64),
        family="wan",
    ),
    "wan-experts": Case(lambda folder: tiny_wan.write_tiny_experts(folder, CAPTIONS[0].split())),
    "wan-transition": Case(write_transition_of_tiny_wan),
    "ltx": Case(
        lambda folder: tiny_ltx.write_tiny_ltx(folder, CAPTIONS[0].split()), clip=(9, 32, 64)
    ),
    "toy": Case(write_toy),
}
ALL = pytest.mark.parametrize("case", CASES.items(), ids=CASES, indirect=True)


@dataclass(frozen=True)
class Model:
    """What the tests of a family share; nobody changes its folder."""

    name: str
    folder: Path
    family: ModelFamily
    clip: tuple[int, int, int]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return self.family.inspect(self.folder).latent_shape(*self.clip)

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x_t = torch.randn(2, *self.latent_shape, generator=generator).to(dtype)
        text = self.family.load_text(self.folder).encode(CAPTIONS[:2], TEXT_LENGTH)
        return x_t, torch.tensor([0.3, 0.8], dtype=dtype), text.to(dtype)


@pytest.fixture(scope="module")
def toy_is_installed(tmp_path_factory):
    with installed_family(tmp_path_factory.mktemp("site")):
        yield


@pytest.fixture(scope="module")
def case(request, tmp_path_factory, toy_is_installed) -> Model:
    name, made = request.param
    folder = made.write(tmp_path_factory.mktemp(name) / "model")
    return Model(made.family or name, folder, family_of(folder), made.clip)


@pytest.fixture
def broken(case: Model, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(case.folder, tmp_path / "model")


def weights_of(latent_shape: Sequence[int]) -> Tensor:
    """Weights of a loss that is linear in two velocities."""
    return torch.linspace(-1, 1, 2 * math.prod(latent_shape)).reshape(2, *latent_shape)


def gradients(denoiser: Denoiser, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    x_t, sigma, text = inputs
    x_t = x_t.clone().requires_grad_()
    denoiser.zero_grad()
    velocity = denoiser(x_t, sigma, text)
    (velocity * weights_of(x_t.shape[1:])[: len(x_t)]).sum().backward()
    # Of two experts, the one without a sample gets no gradient.
    found = {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in denoiser.named_parameters()
    }
    assert x_t.grad is not None
    return found | {"x_t": x_t.grad}


def weight_file(case: Model, folder: Path, component: str) -> Path:
    return folder / component / f"{case.family.traits.layout.weights[component]}.safetensors"


def change_one_value(file: Path) -> None:
    weights = load_file(file)
    name = min(weights)
    weights[name].view(-1)[0] += 0.25
    save_file(weights, file)


def test_every_family_has_a_tiny_model_in_these_tests(toy_is_installed):
    covered = {case.family or name for name, case in CASES.items()}
    missing = {family.name for family in families()} - covered
    assert not missing, f"give them a case in {Path(__file__).name}"


@ALL
def test_a_folder_is_of_its_family_with_and_without_its_index(case, broken):
    assert isinstance(case.family, ModelFamily)
    assert case.family.name == case.name
    assert family_named(case.name) is case.family
    (broken / "model_index.json").unlink()
    assert family_of(broken) is case.family


@ALL
def test_what_is_inspected_is_what_is_loaded(case):
    checked, layout = case.family.inspect(case.folder), case.family.traits.layout
    denoiser = case.family.load_denoiser(case.folder)
    text, codec = case.family.load_text(case.folder), case.family.load_autoencoder(case.folder)
    found = {layout.denoisers: denoiser, (layout.autoencoder,): codec.network}
    found[layout.text[:1]] = text.network
    names = {name for part in found for name in part}
    assert set(layout.weights) == set(checked.num_parameters) == names
    for part, network in found.items():
        # Tied tensors count once, and statistics that a file holds count too.
        tensors = network.state_dict(keep_vars=True).values()
        parameters = {id(value): value.numel() for value in tensors}
        total = sum(checked.num_parameters[name] for name in part)
        assert total == sum(parameters.values()), part
        assert not network.training
    assert checked.family == case.name
    embeddings = text.encode(CAPTIONS, TEXT_LENGTH)
    assert embeddings.shape == (3, TEXT_LENGTH, checked.text_width)
    assert not embeddings.requires_grad
    assert not any(value.requires_grad for value in codec.network.parameters())


@ALL
def test_a_velocity_depends_on_latents_noise_level_and_caption(case):
    denoiser = case.family.load_denoiser(case.folder)
    x_t, sigma, text = case.inputs()
    with torch.no_grad():
        velocity = denoiser(x_t, sigma, text)
        assert torch.equal(denoiser(x_t, sigma, text), velocity)
        others = [denoiser(x_t.flip(0), sigma, text), denoiser(x_t, sigma.flip(0), text)]
        others.append(denoiser(x_t, sigma, text.flip(0)))
    assert velocity.shape == x_t.shape
    assert velocity.dtype == torch.float32
    for other in others:
        assert (other - velocity).abs().max() > 1e-3
    with pytest.raises(ShapeError):
        denoiser(x_t[0], sigma, text)


@ALL
def test_captions_end_in_zeros_and_tokens_are_counted(case):
    text, tokenizer = case.family.load_text(case.folder), case.family.load_tokenizer(case.folder)
    counts = tokenizer.count_tokens(CAPTIONS)
    embeddings = text.encode(CAPTIONS, 9)
    for row, count in zip(embeddings, counts, strict=True):
        assert row[:count].abs().sum(dim=1).gt(0).all()
        assert not row[count:].any()
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-3
    assert tokenizer.unknown_words(CAPTIONS).num_affected == 0


@ALL
def test_clips_have_the_latents_that_are_announced_and_come_back_in_range(case):
    codec = case.family.load_autoencoder(case.folder)
    frames, height, width = case.clip
    video = torch.rand(2, 3, *case.clip, generator=torch.Generator().manual_seed(1))
    latents = codec.encode(video)
    assert latents.shape == (2, *case.latent_shape)
    assert torch.equal(codec.encode(video), latents)
    assert (latents[0] - latents[1]).abs().max() > 1e-3
    again = codec.decode(5 * latents)
    assert again.shape == video.shape
    assert again.dtype == torch.float32
    assert 0 <= float(again.min()) < float(again.max()) <= 1
    checked = case.family.inspect(case.folder)
    for size in ((frames, height + 1, width), (frames, height, width + 1), (0, height, width)):
        with pytest.raises(ShapeError, match="multiple"):
            checked.latent_shape(*size)


@ALL
def test_the_gradient_at_the_input_is_that_of_finite_differences(case):
    denoiser = case.family.load_denoiser(case.folder, torch.float64).requires_grad_(False)
    x_t, sigma, text = case.inputs(torch.float64)
    generator = torch.Generator().manual_seed(2)
    cotangent, direction = torch.randn(2, *x_t.shape, generator=generator, dtype=torch.float64)

    def loss(at: Tensor) -> Tensor:
        return (denoiser(at, sigma, text).double() * cotangent).sum()

    leaf = x_t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    along = float((gradient * direction).sum())
    step = 1e-3
    with torch.no_grad():
        expected = float(loss(x_t + step * direction) - loss(x_t - step * direction)) / (2 * step)
    # Velocities are rounded to float32, about 1e-4 of this difference.
    assert abs(expected) > 0.1
    assert along == pytest.approx(expected, rel=3e-3)


@pytest.mark.slow
@ALL
def test_checkpointing_repeats_every_bit_and_keeps_less(case):
    inputs = case.inputs()
    kept: list[int] = []
    found: list[dict[str, Tensor]] = []
    denoiser = case.family.load_denoiser(case.folder).requires_grad_(True)
    for enabled in (False, True, False):
        denoiser.set_checkpointing(enabled)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            denoiser(*inputs)
        kept.append(sum(sizes))
        found.append(gradients(denoiser, inputs))
    x_t, sigma, text = inputs
    assert_moves(found[0], gradients(denoiser, (x_t.flip(0), sigma, text)), 1e-3)
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])
    assert kept[1] < kept[0] == kept[2]


def sharded_gradients(rank: int, size: int, folders: dict[str, Path]) -> dict[str, Tensor]:
    """Gradients of one sample a rank, summed over the ranks, as `FAMILY/PARAMETER`."""
    found: dict[str, Tensor] = {}
    for name, folder in folders.items():
        model = Model(name, folder, family_of(folder), CASES[name].clip)
        denoiser = model.family.load_denoiser(folder).requires_grad_(True)
        shard(denoiser, denoiser.blocks)
        assert all(is_sharded(part) for part in (denoiser, *denoiser.blocks))
        own = tuple(value[rank : rank + 1] for value in model.inputs())
        velocity = denoiser(*own)
        (velocity * weights_of(model.latent_shape)[rank : rank + 1]).sum().backward()
        for key, value in denoiser.named_parameters():
            assert value.grad is not None
            found[f"{name}/{key}"] = full_tensor(value.grad)
    return found


@pytest.mark.slow
def test_two_ranks_make_the_gradients_of_one_in_every_family(toy_is_installed, tmp_path):
    folders = {name: case.write(tmp_path / name) for name, case in CASES.items()}
    (tmp_path / "ranks").mkdir()
    expected: dict[str, Tensor] = {}
    halves: dict[str, Tensor] = {}
    for name, folder in folders.items():
        model = Model(name, folder, family_of(folder), CASES[name].clip)
        denoiser = model.family.load_denoiser(folder).requires_grad_(True)
        inputs = model.inputs()
        for found, samples in ((expected, slice(0, 2)), (halves, slice(0, 1))):
            x_t, sigma, text = (value[samples] for value in inputs)
            part = gradients(denoiser, (x_t, sigma, text))
            part.pop("x_t")
            found.update({f"{name}/{key}": value for key, value in part.items()})
    assert_moves(expected, halves, 1e-5)
    for found in on_ranks(2, sharded_gradients, tmp_path / "ranks", folders):
        assert relative_error(found, expected) < 1e-5


@ALL
def test_bf16_rounds_products_and_leaves_weights_in_float32(case):
    x_t, sigma, text = case.inputs()
    plain = case.family.load_denoiser(case.folder)
    rounded = case.family.load_denoiser(case.folder)
    prepare_network(rounded, ComputeSettings(precision="bf16"))
    with torch.no_grad():
        exact, found = plain(x_t, sigma, text), rounded(x_t, sigma, text)
    error = float((found - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.1
    assert {value.dtype for value in rounded.parameters()} == {torch.float32}
    assert found.dtype == torch.float32


@pytest.mark.slow
@ALL
def test_arithmetic_is_that_of_the_network(case):
    shape, denoiser = (
        case.family.read_shape(case.folder),
        case.family.load_denoiser(case.folder).requires_grad_(True),
    )
    costs = shape.denoiser
    assert shape.geometry.latent_shape(*case.clip) == case.latent_shape
    assert costs.num_parameters == sum(value.numel() for value in denoiser.parameters())
    assert costs.num_layers == len(denoiser.blocks)
    layer = sum(value.numel() for value in denoiser.blocks[0].parameters())
    assert costs.parameters_per_layer == layer
    for name, sizes in costs.projections.items():
        projection = denoiser.blocks[0].get_submodule(name)
        assert isinstance(projection, torch.nn.Linear)
        assert (projection.in_features, projection.out_features) == sizes, name
    x_t, sigma, text = (value[:1] for value in case.inputs())
    assert costs.text_width == text.shape[2]
    expected = costs.pass_flops(case.latent_shape, TEXT_LENGTH)
    # The fused attention of a CPU is not counted, the plain one is.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = denoiser(x_t.requires_grad_(), sigma, text).sum()
        with FlopCounterMode(display=False) as to_input:
            torch.autograd.grad(loss, x_t, retain_graph=True)
        with FlopCounterMode(display=False) as to_parameters:
            loss.backward(inputs=list(denoiser.parameters()))
    assert forward.get_total_flops() == expected.forward
    assert forward.get_total_flops() == costs.forward_flops(case.latent_shape, TEXT_LENGTH)
    assert to_input.get_total_flops() == expected.to_input
    assert to_parameters.get_total_flops() == expected.to_parameters


@ALL
def test_bytes_grow_with_the_clip_and_shrink_with_checkpointing(case):
    costs, sizes = case.family.read_shape(case.folder).denoiser, case.latent_shape
    larger = (*sizes[:3], 2 * sizes[3])
    for bf16 in (False, True):
        kept = costs.graph_bytes(sizes, TEXT_LENGTH, bf16=bf16, checkpointing=False)
        again = costs.graph_bytes(sizes, TEXT_LENGTH, bf16=bf16, checkpointing=True)
        assert again < kept
        assert costs.layer_graph_bytes(sizes, TEXT_LENGTH, bf16=bf16) <= kept
        assert kept < costs.graph_bytes(larger, TEXT_LENGTH, bf16=bf16, checkpointing=False)
        few = costs.transient_bytes(sizes, bf16=bf16)
        assert 0 < few < costs.transient_bytes(larger, bf16=bf16)


@pytest.mark.slow
@ALL
def test_an_export_is_reloaded_to_the_last_bit(case, tmp_path):
    generator = case.family.load_denoiser(case.folder)
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in generator.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=drawn))
    x_t, sigma, text = case.inputs()
    out = tmp_path / "out"
    for _ in range(2):  # A second time replaces the first.
        weights = dict(generator.named_parameters())
        case.family.export(out, case.folder, weights, flow_shift=3.0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert family_of(out) is case.family
    reloaded, base = case.family.load_denoiser(out), case.family.load_denoiser(case.folder)
    for name, value in generator.named_parameters():
        assert torch.equal(reloaded.get_parameter(name), value), name
    with torch.no_grad():
        velocity = generator(x_t, sigma, text)
        assert torch.equal(reloaded(x_t, sigma, text), velocity)
        assert (base(x_t, sigma, text) - velocity).abs().max() > 1e-3
    digests, before = model_digests(out), model_digests(case.folder)
    layout = case.family.traits.layout
    for name in layout.denoisers:
        assert digests[name] != before[name], name
    for name in (*layout.text, layout.autoencoder):
        assert digests[name] == before[name], name


@pytest.mark.slow
@ALL
def test_the_content_changes_with_one_value_of_any_component(case, broken):
    before = model_digests(case.folder)
    assert model_digests(broken) == before
    assert fingerprint(broken) == fingerprint(case.folder)
    for name in case.family.traits.layout.weights:
        change_one_value(weight_file(case, broken, name))
        after = model_digests(broken)
        assert {part for part in after if after[part] != before[part]} == {name}
        before = after
    assert fingerprint(broken) != fingerprint(case.folder)


@ALL
def test_missing_torn_and_foreign_weights_are_refused_by_name(case, broken, tmp_path):
    for name in case.family.traits.layout.weights:
        file = weight_file(case, broken, name)
        whole = file.read_bytes()
        file.write_bytes(whole[:-40])
        with pytest.raises(ModelFolderError, match=file.name):
            case.family.inspect(broken)
        weights = load_file(weight_file(case, case.folder, name))
        save_file({key: value for key, value in list(weights.items())[1:]}, file)
        with pytest.raises(ModelFolderError, match="missing"):
            case.family.inspect(broken)
        file.unlink()
        layout = case.family.traits.layout
        if name in layout.dispensable:
            # Runs on stored embeddings, or without validations, need none; nothing else does.
            load = case.family.load_text
            load = case.family.load_autoencoder if name == layout.autoencoder else load
            with pytest.raises(ModelFolderError, match=r"no weights|no such file|missing"):
                load(broken)
        else:
            with pytest.raises(ModelFolderError, match="no weights"):
                case.family.inspect(broken)
        file.write_bytes(whole)
    case.family.inspect(broken)


@pytest.mark.slow
@ALL
def test_a_seed_is_a_clip(case):
    frames, height, width = case.clip
    sampler = case.family.open_sampler(case.folder, "cpu")
    steps: list[int] = []

    def sample(seed: int, flow_shift: float = 3.0, prompt: str = CAPTIONS[0]):
        request = SampleRequest(
            prompt=prompt,
            seed=seed,
            num_steps=2,
            guidance_scale=2.0,
            schedule=FlowMatchSchedule(shift=flow_shift),
            text_length=TEXT_LENGTH,
            negative_prompt="",
            num_frames=frames,
            height=height,
            width=width,
        )
        return sampler.sample(request, steps.append)

    clip = sample(0)
    assert clip.shape == (*case.clip, 3)
    assert clip.dtype.name == "uint8"
    assert steps == [1, 2]
    assert (sample(0) == clip).all()
    for other in (sample(1), sample(0, flow_shift=1.0), sample(0, prompt=CAPTIONS[1])):
        assert (other != clip).any()


@pytest.mark.slow
@ALL
def test_an_export_is_sampled_as_the_generator_was_trained(case, tmp_path):
    frames, height, width = case.clip
    weights = dict(case.family.load_denoiser(case.folder).named_parameters())
    out = tmp_path / "out"
    case.family.export(out, case.folder, weights, flow_shift=3.0)
    networks = (case.family.load_denoiser(out), case.family.load_text(out))
    codec, checked = case.family.load_autoencoder(out), case.family.inspect(out)
    request = SampleRequest(
        prompt=CAPTIONS[0],
        seed=0,
        num_steps=4,
        guidance_scale=2.0,
        schedule=FlowMatchSchedule(shift=3.0),
        text_length=TEXT_LENGTH,
        negative_prompt=CAPTIONS[1],
        num_frames=frames,
        height=height,
        width=width,
    )
    theirs = case.family.open_sampler(out, "cpu").sample(request).astype(int)
    ours = EulerSampler(*networks, codec, checked.latent_shape)
    found, other_seed, other_shift = (
        ours.sample(one).astype(int)
        for one in (
            request,
            replace(request, seed=1),
            replace(request, schedule=FlowMatchSchedule(shift=1.0)),
        )
    )
    apart = abs(found - theirs).mean()
    # Wan's scheduler rounds noise levels, by up to 0.001.
    assert apart < 0.1 * abs(other_seed - theirs).mean()
    assert apart < 0.2 * abs(other_shift - theirs).mean()


@pytest.mark.slow
@ALL
def test_a_sampler_of_diffusers_renoises_as_ours_does_and_only_where_it_is_asked_to(case):
    frames, height, width = case.clip
    networks = (case.family.load_denoiser(case.folder), case.family.load_text(case.folder))
    codec, checked = (
        case.family.load_autoencoder(case.folder),
        case.family.inspect(case.folder),
    )
    plain = SampleRequest(
        prompt=CAPTIONS[0],
        seed=0,
        num_steps=3,
        guidance_scale=1.0,
        schedule=FlowMatchSchedule(shift=3.0),
        text_length=TEXT_LENGTH,
        negative_prompt="",
        num_frames=frames,
        height=height,
        width=width,
    )
    anew = replace(plain, schedule=FlowMatchSchedule(shift=3.0, renoise=True))
    sampler = case.family.open_sampler(case.folder, "cpu")
    before = sampler.sample(plain).astype(int)
    theirs, again = (sampler.sample(anew).astype(int) for _ in range(2))
    ours = EulerSampler(*networks, codec, checked.latent_shape).sample(anew).astype(int)
    assert (before != theirs).any()
    # The pipeline of LTX packs its latents, so the noise of its steps has another order.
    if case.family.name == "wan":
        assert abs(ours - theirs).mean() < 0.1 * abs(before - theirs).mean()
    assert (again == theirs).all()
    assert (sampler.sample(plain) == before).all()


class TestUnknownFolders:
    @pytest.mark.parametrize(
        ("index", "words"),
        [
            ({"_class_name": "HunyuanVideoPipeline"}, "HunyuanVideoPipeline"),
            ({"_class_name": "LTXImageToVideoPipeline"}, "an image-to-video model"),
            ({"_class_name": "HunyuanVideoImageToVideoPipeline"}, "an image-to-video model"),
            ({"_class_name": "WanImageToVideoPipeline"}, "an image-to-video model"),
            ({}, "_class_name is 'None'"),
        ],
    )
    def test_another_family_is_refused_with_the_families_that_are_known(
        self, toy_is_installed, tmp_path, index, words
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ModelFolderError, match=words) as caught:
            family_of(tmp_path)
        for name in ("wan (_class_name 'WanPipeline'", "toy (_class_name 'ToyPipeline'"):
            assert name in str(caught.value)
        assert "install the package of its family" in str(caught.value)

    def test_a_folder_without_an_index_says_what_it_is_where_that_is_known(self, tmp_path):
        with pytest.raises(ModelFolderError, match=r"no model_index.json.*WanPipeline"):
            family_of(tmp_path)
        (tmp_path / "Wan2.1_VAE.pth").touch()
        with pytest.raises(ModelFolderError, match=r"original release.*sgmd import FILE"):
            family_of(tmp_path)
        with pytest.raises(ModelFolderError, match="no such folder"):
            family_of(tmp_path / "nowhere")

    def test_an_unknown_name_lists_the_names(self, toy_is_installed):
        with pytest.raises(ConfigError, match="one of wan-experts, wan-transition, wan, ltx, toy"):
            family_named("hunyuan")


class TestFamiliesFromOutside:
    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ("no_such_package.x:Y", "No module named 'no_such_package'"),
            ("sgmd_core.schedule:FlowMatchSchedule", "without name, traits"),
            ("workers.models.wan_family:WanFamily", "wan for WanPipeline, which is taken"),
        ],
    )
    def test_one_that_cannot_be_used_is_refused_by_name(self, value, words):
        from importlib.metadata import EntryPoint

        with pytest.raises(ConfigError, match=words) as caught:
            load_family(EntryPoint("other", value, "sgmd.families"))
        assert "uninstall the package" in str(caught.value)

    def test_a_broken_one_does_not_stop_a_model_of_ours(self, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
        with installed_family(tmp_path / "site", "no_such_package.x:Y"):
            assert family_of(tmp_path / "model").name == "wan"
            assert "wan" in {family.name for family in families()}
            with pytest.raises(ConfigError, match=r"left out.*no_such_package.*one of wan"):
                family_named("toy")
            (tmp_path / "model" / "model_index.json").write_text('{"_class_name": "ToyPipeline"}')
            with pytest.raises(ModelFolderError, match=r"left out.*toy \(.*no_such_package"):
                family_of(tmp_path / "model")
