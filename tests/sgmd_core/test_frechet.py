import pytest
import torch

from sgmd_core.errors import NonFiniteError, ShapeError
from sgmd_core.metrics.frechet import (
    NUM_CLIP_FEATURES,
    clip_features,
    fit_gaussian,
    frechet_distance,
)

FRAMES, SIDE = 12, 32
MOTION, LEFTOVER, COLOURS, JERK = slice(40, 46), slice(46, 49), slice(0, 24), 39


def moving_square(right_px: float, down_px: float, width_px: float = 8.0) -> torch.Tensor:
    """A clip (3, t, h, w): a white soft-edged square on grey, centred in the middle frame."""
    frame = torch.arange(FRAMES) - (FRAMES - 1) / 2
    pixel = torch.arange(SIDE) + 0.5 - SIDE / 2
    covers = []
    for speed in (down_px, right_px):
        distance = (pixel[None] - speed * frame[:, None]).abs() - width_px / 2
        covers.append((0.5 - distance).clamp(0, 1))
    cover = covers[0][:, :, None] * covers[1][:, None, :]
    return (0.3 + 0.6 * cover).expand(3, -1, -1, -1)


def random_squares(seed: int, num_clips: int, speed: float = 1.0) -> torch.Tensor:
    velocities = torch.randn(num_clips, 2, generator=torch.Generator().manual_seed(seed)) / 2
    return torch.stack([moving_square(*(speed * v).tolist()) for v in velocities])


def test_distance_of_gaussians_with_commuting_covariances_is_known():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    mean1, mean2, std1, std2 = torch.rand(4, 6, generator=generator, dtype=torch.float64)
    cov1, cov2 = basis @ torch.diag(std1**2) @ basis.T, basis @ torch.diag(std2**2) @ basis.T
    expected = (mean1 - mean2).square().sum() + (std1 - std2).square().sum()
    distance = frechet_distance(mean1, cov1, mean2, cov2)
    assert distance == pytest.approx(expected.item(), rel=1e-10)
    assert frechet_distance(mean2, cov2, mean1, cov1) == pytest.approx(distance, rel=1e-10)


def test_distance_of_gaussians_that_do_not_commute_agrees_with_the_plain_matrix_root():
    # tr (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of C1 C2, which are real.
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)
    cov1, cov2 = factors @ factors.mT
    mean = torch.zeros(5, dtype=torch.float64)
    overlap = torch.linalg.eigvals(cov1 @ cov2).real.sqrt().sum()
    expected = (cov1.trace() + cov2.trace() - 2 * overlap).item()
    assert frechet_distance(mean, cov1, mean, cov2) == pytest.approx(expected, rel=1e-9)


def test_distance_to_itself_is_zero_even_for_a_singular_covariance():
    features = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    gaussian = fit_gaussian(features)
    assert frechet_distance(*gaussian, *gaussian) == pytest.approx(0, abs=1e-7)


def test_distance_to_a_point_is_variance_and_squared_shift():
    mean, cov = torch.tensor([1.0, 2.0]), torch.diag(torch.tensor([0.5, 0.25]))
    distance = frechet_distance(mean, cov, torch.zeros(2), torch.zeros(2, 2))
    assert distance == pytest.approx(1 + 4 + 0.75)


@pytest.mark.slow
def test_fit_agrees_with_the_textbook_estimates():
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    mean, cov = fit_gaussian(features)
    assert mean.dtype == cov.dtype == torch.float64
    torch.testing.assert_close(mean, features.double().mean(dim=0))
    torch.testing.assert_close(cov, torch.cov(features.double().T))


def test_one_clip_has_no_covariance():
    with pytest.raises(ShapeError, match="1 clips"):
        fit_gaussian(torch.zeros(1, 4))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_clips_that_are_not_finite_are_counted_instead_of_measured(value: float):
    features = torch.randn(5, 4)
    features[1, 2] = features[3, 0] = value
    with pytest.raises(NonFiniteError, match="2 of 5 clips"):
        fit_gaussian(features)


def test_a_still_plain_clip_has_its_colour_and_nothing_else():
    colour = torch.tensor([0.2, 0.5, 0.8])
    features = clip_features(colour.view(1, 3, 1, 1, 1).expand(2, 3, FRAMES, SIDE, SIDE))
    assert features.shape == (2, NUM_CLIP_FEATURES)
    torch.testing.assert_close(features[0, COLOURS], colour.repeat_interleave(8))
    torch.testing.assert_close(
        features[0, 24:], torch.zeros(NUM_CLIP_FEATURES - 24), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(("right", "down"), [(0.5, 0.0), (-0.8, 0.0), (0.0, 1.0), (0.6, -0.6)])
def test_the_drift_of_a_moving_square_is_read_in_frames_crossed_a_clip(right, down):
    features = clip_features(moving_square(right, down)[None])[0]
    truth = torch.tensor([right] * 3 + [down] * 3) * (FRAMES - 1) / SIDE
    torch.testing.assert_close(features[MOTION], truth, atol=0.03, rtol=0.1)
    assert features[LEFTOVER].max() < 0.15


def test_motion_does_not_depend_on_the_resolution():
    small = moving_square(0.7, 0.3)[None]
    large = small.repeat_interleave(4, dim=3).repeat_interleave(4, dim=4)
    torch.testing.assert_close(clip_features(large)[:, MOTION], clip_features(small)[:, MOTION])


def test_stutter_shows_as_jerk():
    smooth = moving_square(1.0, 0.0)[None]
    stutter = smooth[:, :, torch.arange(FRAMES) // 2 * 2]
    assert clip_features(stutter)[0, JERK] > 1.3 * clip_features(smooth)[0, JERK]


def test_features_of_a_clip_do_not_depend_on_its_neighbours():
    clips = random_squares(0, 70)
    together = clip_features(clips)
    torch.testing.assert_close(together[65:66], clip_features(clips[65:66]))


@pytest.mark.slow
def test_slowed_clips_are_farther_than_the_floor_and_the_farther_the_slower():
    reference = fit_gaussian(clip_features(random_squares(0, 128)))
    distances = [
        frechet_distance(*reference, *fit_gaussian(clip_features(random_squares(1, 128, speed))))
        for speed in (1.0, 0.6, 0.3, 0.0)
    ]
    assert distances == sorted(distances)
    assert distances[2] > 2 * distances[0]


@pytest.mark.parametrize("shape", [(2, 3, 3, 32, 32), (2, 3, 12, 32, 3)])
def test_clips_too_short_or_too_small_are_refused(shape):
    with pytest.raises(ShapeError, match="at least 4 frames"):
        clip_features(torch.zeros(shape))
