"""Second moments in 8 bits: on the grid, right in the mean, and at rest where nothing changes."""

import pytest
import torch
from torch import Tensor

from workers.moment_codes import (
    BLOCK,
    BYTES_PER_ENTRY,
    PER_OCTAVE,
    MomentCodes,
    decode_moments,
    encode_moments,
    has_codes,
)

STEP = 2 ** (1 / PER_OCTAVE)
DECAY = 0.999


def moments(rows: int = 8, row: int = 300, spread: float = 1e3) -> Tensor:
    stream = torch.Generator().manual_seed(1)
    return 1e-9 * spread ** torch.rand(rows, row, generator=stream)


@pytest.mark.slow
def test_a_code_is_one_of_the_two_next_to_the_moment_and_right_in_the_mean():
    values = moments()
    found = [decode_moments(encode_moments(values, draw)) for draw in range(400)]
    ratios = torch.stack(found) / values
    assert 1 / STEP - 1e-5 <= ratios.min() < 1 / STEP**0.9
    assert STEP**0.9 < ratios.max() <= STEP + 1e-5
    # 400 draws of a step of 7 % leave 0.2 % of noise; rounding to the nearest would leave 2 %.
    assert ratios.mean() == pytest.approx(1, abs=2e-4)
    assert (ratios.mean(dim=0) - 1).abs().max() < 0.01


def test_a_moment_on_the_grid_stays_where_it_is_whatever_is_drawn():
    once = decode_moments(encode_moments(moments(), 0))
    for draw in range(5):
        assert torch.equal(decode_moments(encode_moments(once, draw)), once)


def test_zero_is_zero_and_what_is_too_small_for_its_block_goes_up():
    values = torch.tensor([[0.0, 1.0, 1e-30, *[1e-3] * 97]])
    found = decode_moments(encode_moments(values, 0))[0]
    assert found[0] == 0
    assert 1e-30 < found[2] < 1e-7
    assert torch.equal(decode_moments(encode_moments(torch.zeros(3, 40))), torch.zeros(3, 40))


def averaged(squares: list[Tensor], rounds: bool) -> Tensor:
    """Moments after some updates; `rounds` to the nearest of linear codes, as others do."""
    kept = torch.zeros_like(squares[0])
    codes = encode_moments(kept)
    for update, square in enumerate(squares):
        if rounds:
            kept = kept.lerp(square, 1 - DECAY)
            largest = kept.amax(dim=1, keepdim=True)
            kept = (255 * kept / largest).round() / 255 * largest
        else:
            codes = encode_moments(decode_moments(codes).lerp(square, 1 - DECAY), update)
    return kept if rounds else decode_moments(codes)


@pytest.mark.slow
def test_averages_decay_and_rise_as_in_32_bits():
    """Rounded to the nearest code they would be stuck: that is what the odds are for."""
    stream = torch.Generator().manual_seed(2)
    squares = [1e-6 * torch.randn(16, 256, generator=stream) ** 2 for _ in range(1500)]
    quiet = torch.zeros(16, 256)
    quiet[:, 0] = 1e-6
    squares += [quiet] * 1500
    exact = torch.zeros(16, 256)
    for square in squares:
        exact.lerp_(square, 1 - DECAY)
    ratio = averaged(squares, rounds=False)[:, 1:] / exact[:, 1:]
    assert ratio.mean() == pytest.approx(1, abs=0.02)
    assert ratio.std() < 0.5
    stuck = averaged(squares, rounds=True)[:, 1:] / exact[:, 1:]
    assert (stuck.mean() - 1).abs() > 0.5


def test_rows_are_coded_alone_so_that_any_ranks_can_share_them():
    values = moments(rows=6)
    whole = encode_moments(values, 3)
    assert whole.bases.shape == (6, -(-300 // BLOCK))
    assert whole.codes.shape == values.shape
    part = MomentCodes(whole.codes[2:4], whole.bases[2:4])
    assert torch.equal(decode_moments(part), decode_moments(whole)[2:4])
    none = encode_moments(values[:0])
    assert decode_moments(none).shape == (0, 300)


def test_what_is_kept_is_a_quarter_and_short_rows_are_left_alone():
    kept = encode_moments(torch.ones(64, 1024))
    assert sum(part.nbytes for part in kept) == pytest.approx(BYTES_PER_ENTRY * 64 * 1024)
    assert has_codes(torch.empty(2, 4, 8))
    assert not has_codes(torch.empty(2, 4, 4))
    assert not has_codes(torch.empty(4096))
