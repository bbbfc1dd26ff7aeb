"""Clips depend on weights, captions, seed and index alone; figures are measured on them."""

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sgmd_core.errors import CheckpointError
from sgmd_core.metrics.frechet import clip_features, fit_gaussian, frechet_distance
from sgmd_core.metrics.jackknife import influences, standard_error
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.worlds import WorldName
from sgmd_core.worlds.readings import motion_of, read_clips
from tests.helpers.roles import same_bits, weights
from tests.helpers.tiny_wan import LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, tiny_velocity
from workers.clip_sets import ClipRequest, sample_clip_set
from workers.evaluator import Evaluator, SampledNetworks, to_pixels
from workers.measures import CLIP_MEASURES, MOTION_MEASURES, measure_clip_figures
from workers.samplings import Sampling
from workers.set_measures import motion_figures
from workers.text_encoder import TextEncoder
from workers.validation_evaluator import ValidationEvaluator

CAPTIONS = (
    "a red circle moves left",
    "a blue bar moves right quickly",
    "a green triangle moves up slowly",
    "a white circle moves down",
)


class LetterEmbedder:
    """Embeds a caption by its words' letters; "" is all zeros."""

    def encode(self, captions, max_length) -> Tensor:
        text = torch.zeros(len(captions), max_length, TEXT_DIM)
        for row, caption in enumerate(captions):
            for place, word in enumerate(caption.split()[:max_length]):
                seed = sum(ord(letter) for letter in word)
                generator = torch.Generator().manual_seed(seed)
                text[row, place] = torch.randn(TEXT_DIM, generator=generator)
        return text


class PlainDecoder:
    """Three latent channels as red, green and blue, each cell 4 x 4 pixels, each frame twice."""

    def decode(self, latents: Tensor) -> Tensor:
        video = torch.sigmoid(latents[:, :3])
        return video.repeat_interleave(2, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)


def _evaluator(chunk_clips: int = 2, seed: int = 3) -> Evaluator:
    return Evaluator(
        SampledNetworks(tiny_velocity(seed)),
        TextEncoder(LetterEmbedder(), TEXT_LENGTH),
        PlainDecoder(),
        FlowMatchSchedule(),
        LATENT_SHAPE,
        negative_prompt="bad",
        chunk_clips=chunk_clips,
    )


def test_clips_are_float32_in_the_unit_interval_one_a_caption():
    video = _evaluator().sample(CAPTIONS[:3], 0, 7, 2, 1.0)
    assert video.shape == (3, 3, 6, 16, 16)
    assert video.dtype == torch.float32
    assert not video.requires_grad
    assert 0 <= video.min() < video.max() <= 1


def test_noise_is_counted_by_caption_index_however_the_captions_are_split():
    evaluator = _evaluator(chunk_clips=2)
    whole = evaluator.sample(CAPTIONS, 0, 7, 2, 2.0)
    halves = [
        evaluator.sample(CAPTIONS[:2], 0, 7, 2, 2.0),
        evaluator.sample(CAPTIONS[2:], 2, 7, 2, 2.0),
    ]
    assert torch.equal(whole, torch.cat(halves))
    # Other chunks batch the matrix products differently: rounding, nothing more.
    torch.testing.assert_close(_evaluator(chunk_clips=3).sample(CAPTIONS, 0, 7, 2, 2.0), whole)


def test_seed_index_steps_and_guidance_each_change_the_clip():
    evaluator = _evaluator()
    usual = evaluator.sample(CAPTIONS[:1], 0, 7, 2, 2.0)
    for other in [(0, 8, 2, 2.0), (1, 7, 2, 2.0), (0, 7, 3, 2.0), (0, 7, 2, 1.0)]:
        assert not torch.equal(evaluator.sample(CAPTIONS[:1], *other), usual)


def test_other_weights_act_as_if_loaded_and_leave_the_base_alone():
    evaluator, other = _evaluator(seed=3), tiny_velocity(4)
    before = evaluator.sample(CAPTIONS, 0, 7, 2, 2.0)
    found = evaluator.sample(CAPTIONS, 0, 7, 2, 2.0, weights(other))
    assert torch.equal(found, _evaluator(seed=4).sample(CAPTIONS, 0, 7, 2, 2.0))
    assert not torch.equal(found, before)
    assert torch.equal(evaluator.sample(CAPTIONS, 0, 7, 2, 2.0), before)


class Moves(TorchFunctionMode):
    """Notes when storages of a network are moved, and what else is alive then; on CPUs, too.

    Attributes:
        others: Tensors that are to be gone when the network comes back.
        there: Numbers of them that were alive, one for each parameter that was put aside.
        back: The same, one for each that was moved back.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._own = {one.data_ptr() for one in network.parameters()}
        self.others: list[weakref.ref[Tensor]] = []
        self.there: list[int] = []
        self.back: list[int] = []

    def alive(self) -> int:
        return sum(one() is not None for one in self.others)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in (Tensor.cpu, Tensor.to) and isinstance(args[0], Tensor):
            if args[0].data_ptr() in self._own:
                (self.there if func is Tensor.cpu else self.back).append(self.alive())
            elif func is Tensor.to and isinstance(args[0], Handed):
                self.others.append(weakref.ref(made))
        return made


class Handed(Tensor):
    """A weight that is handed over."""


@pytest.mark.parametrize("fails", [False, True])
def test_weights_in_place_of_the_base_are_gone_before_it_comes_back(fails):
    evaluator = _evaluator()
    network = evaluator._network
    # In another type, so that placing them makes tensors on a CPU as well.
    handed = {
        name: value.double().as_subclass(Handed)
        for name, value in weights(tiny_velocity(4)).items()
    }
    moves, while_sampling = Moves(network), []
    layer = next(one for one in network.modules() if isinstance(one, nn.Linear))

    def within(activations: Tensor) -> Tensor:
        while_sampling.append(moves.alive())
        moves.others.append(weakref.ref(activations))
        if fails:
            raise RuntimeError("out of memory")
        return nn.Linear.forward(layer, activations)

    layer.forward = within  # pyright: ignore[reportAttributeAccessIssue]
    with moves:
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                evaluator.sample(CAPTIONS[:1], 0, 7, 2, 1.0, handed)
        else:
            evaluator.sample(CAPTIONS[:1], 0, 7, 2, 1.0, handed)
    count = len(handed)
    assert while_sampling[0] == count
    assert moves.there == [0] * count
    assert moves.back == [0] * count


def test_the_base_weights_handed_in_change_nothing():
    evaluator = _evaluator(seed=3)
    handed = evaluator.sample(CAPTIONS[:1], 0, 7, 2, 2.0, weights(tiny_velocity(3)))
    assert torch.equal(handed, evaluator.sample(CAPTIONS[:1], 0, 7, 2, 2.0))


def test_incomplete_weights_are_refused():
    handed = weights(tiny_velocity(4))
    name, _ = handed.popitem()
    with pytest.raises(CheckpointError, match=f"{name} is missing where it comes from"):
        _evaluator().sample(CAPTIONS[:1], 0, 7, 2, 1.0, handed)


def test_progress_counts_the_steps_of_all_chunks():
    heard: list[tuple[int, int]] = []
    _evaluator(chunk_clips=3).sample(
        CAPTIONS, 0, 7, 2, 1.0, on_progress=lambda done, total: heard.append((done, total))
    )
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]


REFERENCE = Sampling(3, 2.0, seed=0)


def _request(**changes) -> ClipRequest:
    settings = {
        "captions": CAPTIONS,
        "sampling": Sampling(2, 1.0, seed=1),
        "batch_size": 2,
        "fps": 8,
        "world": WorldName.SHAPES,
        "shown": (0, 1),
    }
    return ClipRequest(**(settings | changes))


@pytest.mark.slow
def test_validation_measures_the_clips_it_shows():
    evaluator, other = _evaluator(), tiny_velocity(4)
    report = ValidationEvaluator(evaluator, _request(), REFERENCE).validate(weights(other))
    video = evaluator.sample(CAPTIONS, 0, 1, 2, 1.0, weights(other))
    reference = evaluator.sample(CAPTIONS, 0, 0, 3, 2.0)
    partner = evaluator.sample(CAPTIONS, 0, 1, 3, 2.0)
    own, far, near = (clip_features(clips) for clips in (video, reference, partner))
    moments = [fit_gaussian(features) for features in (own, far, near)]
    assert report.figures["frechet"] == frechet_distance(*moments[0], *moments[1])
    assert report.figures["frechet_floor"] == frechet_distance(*moments[2], *moments[1])
    measured, teachers = (measure_clip_figures(clips, fps=8) for clips in (video, partner))
    for name in CLIP_MEASURES:
        value = report.figures[name]
        assert value == pytest.approx(float(measured[name].mean()))
        low, high = report.intervals[name]
        assert low <= value <= high
        # What is 0 in some resample has no ratio; of frames that come twice no motion is smooth.
        if name not in ("dynamic", "smoothness"):
            ratio = report.figures[f"{name}_ratio"]
            assert ratio == pytest.approx(value / float(teachers[name].mean()))
    assert all(math.isfinite(value) for value in report.figures.values())
    # What the clips do as a whole, to clips from other noise; ratios to the teacher's own others.
    own, far, near = (
        motion_of(read_clips(WorldName.SHAPES, clips)) for clips in (video, reference, partner)
    )
    of_sets, below = motion_figures(own, far), motion_figures(near, far)
    assert {"speed_distance", "direction_entropy", "still_share"} <= of_sets.keys()
    for name in of_sets.keys() & report.figures.keys():
        assert report.figures[name] == of_sets[name]
        if f"{name}_ratio" in report.figures:
            assert report.figures[f"{name}_ratio"] == of_sets[name] / below[name]
    assert "speed_distance" in report.figures
    assert len(report.shown) == 2
    assert np.array_equal(report.shown[1], to_pixels(video)[1])
    assert np.array_equal(report.teacher_shown[1], to_pixels(partner)[1])


@pytest.mark.slow
def test_every_figure_has_an_interval_and_those_that_rank_the_influence_of_each_clip():
    evaluator, other = _evaluator(), tiny_velocity(4)
    scores = ("frechet", "speed_spearman", "sharpness", "flow_ratio")
    report = ValidationEvaluator(evaluator, _request(), REFERENCE, scores).validate(weights(other))
    assert report.intervals.keys() == report.figures.keys()
    assert report.influences.keys() == set(scores)
    for name, influence in report.influences.items():
        low, high = report.intervals[name]
        assert low <= report.figures[name] <= high
        assert len(influence) == len(CAPTIONS)
        assert sum(influence) == pytest.approx(0, abs=1e-9)
    low, high = report.intervals["frechet"]
    assert high - low == pytest.approx(2 * 1.96 * standard_error(report.influences["frechet"]))
    # A ratio of means is linear enough for its influences to be those of leaving clips out.
    own, partner = (
        measure_clip_figures(clips, fps=8)["flow"].double()
        for clips in (
            evaluator.sample(CAPTIONS, 0, 1, 2, 1.0, weights(other)),
            evaluator.sample(CAPTIONS, 0, 1, 3, 2.0),
        )
    )
    left_out = influences(lambda kept: float(own[kept].mean() / partner[kept].mean()), len(own))
    torch.testing.assert_close(
        torch.tensor(report.influences["flow_ratio"]).double(), left_out, rtol=0.5, atol=1e-3
    )


def test_two_clips_are_too_few_to_leave_one_out():
    request = _request(captions=CAPTIONS[:2])
    report = ValidationEvaluator(_evaluator(), request, REFERENCE, ("frechet",)).validate(
        weights(tiny_velocity(4))
    )
    assert "frechet" in report.figures
    assert "frechet" not in report.intervals
    assert not report.influences


@pytest.mark.slow
def test_diversity_is_how_far_the_two_clips_of_a_caption_are_apart():
    evaluator, other = _evaluator(), tiny_velocity(4)
    figures = ValidationEvaluator(evaluator, _request(), REFERENCE).validate(weights(other)).figures
    first, second = (
        clip_features(evaluator.sample(CAPTIONS, 0, seed, 2, 1.0, weights(other)))
        for seed in (0, 1)
    )
    expected = (first.double() - second.double()).norm(dim=1).mean()
    assert figures["diversity"] == pytest.approx(float(expected))
    assert figures["diversity_ratio"] > 0


@pytest.mark.slow
def test_a_generator_that_is_its_teacher_keeps_everything_and_is_on_the_floor():
    evaluator = _evaluator(seed=3)
    request = _request(sampling=Sampling(3, 2.0, seed=1))
    report = ValidationEvaluator(evaluator, request, REFERENCE).validate(weights(tiny_velocity(3)))
    assert report.figures["frechet"] == report.figures["frechet_floor"]
    ratios = {name: value for name, value in report.figures.items() if name.endswith("_ratio")}
    assert {"flow_ratio", "saturation_ratio", "diversity_ratio"} <= ratios.keys()
    assert set(ratios.values()) == {1.0}


@pytest.mark.slow
def test_the_teacher_is_sampled_once():
    evaluator = _evaluator()
    calls: list[int] = []
    evaluator._network.register_forward_hook(lambda *_: calls.append(1))
    judge, handed = ValidationEvaluator(evaluator, _request(), REFERENCE), weights(tiny_velocity(4))
    judge.validate(handed)
    first = len(calls)
    judge.validate(handed)
    # Two chunks, two seeds each: the generator's two steps, the teacher's three.
    assert first == 2 * 2 * 2 + 2 * 2 * 3
    assert len(calls) - first == 2 * 2 * 2


def test_captions_of_another_world_are_measured_without_exact_readings():
    request = _request(captions=("anything", "at all"), world=None)
    report = ValidationEvaluator(_evaluator(), request, REFERENCE).validate(
        weights(tiny_velocity(4))
    )
    assert not {"colour", *MOTION_MEASURES} & report.figures.keys()
    assert "flow_ratio" in report.figures
    assert len(report.shown) == 2


def test_measuring_in_chunks_changes_nothing():
    request = _request(sampling=Sampling(2, 1.0, 7))
    whole, parts = (
        sample_clip_set(_evaluator(chunk_clips=size), replace(request, batch_size=size))
        for size in (4, 3)
    )
    # Other chunks batch the matrix products differently: rounding, nothing more.
    torch.testing.assert_close(parts.clips.features, whole.clips.features, atol=1e-4, rtol=1e-4)
    assert len(parts.seconds) == 2
    assert len(parts.clips.measures["flow"]) == len(CAPTIONS)


def test_pixels_are_whole_numbers_with_channels_last():
    video = torch.zeros(1, 3, 2, 4, 5)
    video[0, 1, 1, 2, 3] = 0.5
    (clip,) = to_pixels(video)
    assert clip.shape == (2, 4, 5, 3)
    assert clip.dtype == np.uint8
    assert clip[1, 2, 3].tolist() == [0, 128, 0]


def test_sampling_keeps_the_network_frozen():
    network = tiny_velocity(3)
    before = weights(network)
    evaluator = _evaluator()
    evaluator.sample(CAPTIONS[:1], 0, 7, 2, 1.0)
    assert same_bits(weights(evaluator._network), before)
    assert not any(value.requires_grad for value in evaluator._network.parameters())


@pytest.mark.slow
def test_an_evaluator_samples_by_the_schedule_that_it_is_given():
    """A study measures each generator by the schedule of its own run."""
    own, other = _evaluator(), _evaluator()
    renoised = FlowMatchSchedule(renoise=True)
    found = own.scheduled(renoised).sample(CAPTIONS, 0, 7, 4, 1.0)
    plain = own.sample(CAPTIONS, 0, 7, 4, 1.0)
    assert torch.equal(plain, other.sample(CAPTIONS, 0, 7, 4, 1.0))
    assert (found - plain).abs().max() > 0.01
