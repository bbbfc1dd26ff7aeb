"""Looks, diversity and intervals: known answers, and the coverage that an interval promises."""

import pytest
import torch

from sgmd_core.errors import ShapeError
from sgmd_core.metrics.appearance import contrast, saturation, sharpness
from sgmd_core.metrics.bootstrap import (
    mean_interval,
    median_interval,
    median_ratio_interval,
    ratio_interval,
    resampled_rows,
)
from sgmd_core.metrics.comparison import compare_sets
from sgmd_core.metrics.diversity import seed_diversity
from sgmd_core.worlds.shapes import (
    ClipReading,
    clip_answers,
    labels_from_captions,
    score_clips,
)


def plain(*colour: float) -> torch.Tensor:
    return torch.tensor(colour).reshape(1, 3, 1, 1, 1).expand(1, 3, 4, 8, 8).clone()


def noise(seed: int = 0, side: int = 16) -> torch.Tensor:
    return torch.rand(1, 3, 4, side, side, generator=torch.Generator().manual_seed(seed))


def test_grey_has_no_saturation_and_pure_red_has_all_of_it():
    assert saturation(plain(0.4, 0.4, 0.4)).item() == 0
    assert saturation(plain(1.0, 0.0, 0.0)).item() == 1
    assert saturation(plain(0.7, 0.2, 0.3)).item() == pytest.approx(0.5)


def test_a_frame_that_is_half_black_and_half_white_has_a_contrast_of_one_half():
    clip = plain(0.0, 0.0, 0.0)
    assert contrast(clip).item() == 0
    clip[..., :4] = 1.0
    assert contrast(clip).item() == pytest.approx(0.5)


def test_contrast_is_within_frames_and_does_not_see_flashes():
    clip = plain(0.0, 0.0, 0.0)
    clip[:, :, ::2] = 1.0
    assert contrast(clip).item() == 0


def test_plain_frames_and_even_ramps_have_no_sharpness():
    assert sharpness(plain(0.1, 0.5, 0.9)).item() == pytest.approx(0, abs=1e-6)
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 4, 16, 16)
    assert sharpness(ramp).item() == pytest.approx(0, abs=1e-6)


def test_a_chessboard_is_as_sharp_as_a_picture_can_be():
    # A pixel and its neighbours differ by 1, so the Laplacian over 4 is 1 in every inner pixel.
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    clip = board.float().expand(1, 3, 4, 8, 8)
    assert sharpness(clip).item() == pytest.approx(1.0)


def test_looks_scale_as_they_say_and_blur_takes_sharpness_away():
    clip = noise()
    for measure in (saturation, contrast, sharpness):
        assert measure(0.5 * clip).item() == pytest.approx(0.5 * measure(clip).item(), rel=1e-5)
    blurred = torch.nn.functional.avg_pool3d(clip, (1, 3, 3), stride=1)
    assert sharpness(blurred) < 0.5 * sharpness(clip)


def test_sharpness_of_a_line_is_refused():
    with pytest.raises(ShapeError, match="2 x 8"):
        sharpness(torch.zeros(1, 3, 4, 2, 8))


def test_clips_that_are_alike_have_no_diversity_and_known_distances_are_found():
    first = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    other_seed = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
    assert seed_diversity(first, other_seed).tolist() == [5.0, 0.0]
    assert seed_diversity(other_seed, first).tolist() == [5.0, 0.0]


def test_a_set_against_itself_has_a_ratio_of_one_without_width():
    figures = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 1
    found = ratio_interval(figures, figures, resampled_rows(50, seed=0))
    assert found is not None
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_pairing_takes_off_what_the_partners_share():
    random = torch.Generator().manual_seed(0)
    teacher = torch.rand(64, generator=random) * 10
    close = 1.1 * teacher + 0.01 * torch.randn(64, generator=random)
    rows = resampled_rows(64, seed=0)
    paired = ratio_interval(close, teacher, rows)
    shuffled = ratio_interval(close[torch.randperm(64, generator=random)], teacher, rows)
    assert paired.low < 1.1 < paired.high
    assert paired.high - paired.low < 0.05 * (shuffled.high - shuffled.low)


def test_intervals_cover_the_truth_about_as_often_as_they_promise():
    random = torch.Generator().manual_seed(3)
    covered = 0
    for trial in range(200):
        sample = 2.0 + torch.randn(60, generator=random)
        found = mean_interval(sample, resampled_rows(60, seed=trial, num_draws=400))
        covered += found.low <= 2.0 <= found.high
    # 95 % of 200 are 190, with a standard deviation of 3; percentiles are a little narrow.
    assert 178 <= covered <= 199


def test_the_width_is_that_of_the_standard_error():
    sample = torch.randn(400, generator=torch.Generator().manual_seed(5))
    found = mean_interval(sample, resampled_rows(400, seed=0))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 / 20, rel=0.15)


def test_draws_are_those_of_the_seed():
    assert torch.equal(resampled_rows(9, seed=4), resampled_rows(9, seed=4))
    assert not torch.equal(resampled_rows(9, seed=4), resampled_rows(9, seed=5))


def test_nothing_is_divided_by_nothing():
    rows = resampled_rows(4, seed=0)
    assert ratio_interval(torch.ones(4), torch.zeros(4), rows) is None
    assert ratio_interval(torch.ones(4), torch.tensor([1.0, 0.0, 0.0, 0.0]), rows) is None


def test_partners_must_be_as_many():
    with pytest.raises(ShapeError, match="3 figures and 4"):
        ratio_interval(torch.ones(3), torch.ones(4), resampled_rows(3, seed=0))
    with pytest.raises(ShapeError, match="no samples"):
        resampled_rows(0, seed=0)


def test_a_set_has_ratios_to_its_partner_and_values_of_its_own():
    random = torch.Generator().manual_seed(0)
    teacher = torch.rand(32, generator=random) + 1
    own = {"flow": 0.8 * teacher, "only_here": teacher}
    found = compare_sets(own, {"flow": teacher}, seed=0)
    assert found["flow"].value.value == pytest.approx(float(0.8 * teacher.double().mean()))
    ratio = found["flow"].ratio
    assert [ratio.value, ratio.low, ratio.high] == pytest.approx([0.8] * 3)
    assert found["only_here"].ratio is None
    assert compare_sets(own, None, seed=0)["flow"].ratio is None


def test_medians_and_their_ratios_do_not_mind_one_slow_batch():
    seconds = torch.tensor([9.0, 1.0, 1.1, 1.2, 1.3, 1.0, 1.1, 1.2, 1.3])
    rows = resampled_rows(9, seed=0)
    found = median_interval(seconds, rows)
    assert found.value == pytest.approx(1.2)
    assert found.high < 2
    ratio = median_ratio_interval(seconds, 10 * seconds[:5], rows, resampled_rows(5, seed=0))
    assert ratio.value == pytest.approx(0.1)
    assert ratio.low <= ratio.value <= ratio.high


def test_answers_of_single_clips_average_to_the_scores():
    labels = labels_from_captions(["a red circle moves left", "a blue bar moves right quickly"])
    reading = ClipReading(
        colour=labels.colour.flip(0),
        shape=labels.shape,
        direction=torch.stack([labels.direction[0], labels.direction[0]]),
        speed_px_per_frame=torch.tensor([1.0, 2.0]),
        velocity_px_per_frame=torch.zeros(2, 2),
        area_px=torch.ones(2),
        contrast=torch.ones(2),
    )
    scores, answers = score_clips(reading, labels), clip_answers(reading, labels)
    assert answers["direction"].tolist() == [1, 0]
    for name in ("colour", "shape", "direction", "mean_speed_px_per_frame"):
        assert float(answers[name].mean()) == getattr(scores, name)
