"""Settings of the trainer that SGMD was released in: step lists, score ranges, guidance norms."""

import dataclasses

import pytest
import torch

from pipelines.config.recipe import load_recipe
from sgmd_core.errors import ConfigError
from sgmd_core.rollout import rollout_exit
from sgmd_core.schedule import FlowMatchSchedule, shift_sigma
from sgmd_core.seeds import draw
from sgmd_core.types import MicroBatchKey
from sgmd_core.velocity import Guidance, guided_velocities, guided_velocity, renormalized
from tests.helpers.small_network import SmallNetwork, predict, random_query


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_an_equally_spaced_list_gives_the_usual_grid_back(shift):
    plain = FlowMatchSchedule(shift=shift)
    listed = FlowMatchSchedule(shift=shift, steps=(1000, 750, 500, 250))
    assert torch.equal(listed.generator_grid(4), plain.few_step_grid(4))
    assert torch.equal(plain.generator_grid(4), plain.few_step_grid(4))
    # The teacher's own steps are not the generator's.
    assert torch.equal(listed.few_step_grid(30), plain.few_step_grid(30))


def test_any_falling_list_is_warped_by_the_shift_or_taken_as_it_is():
    warped = FlowMatchSchedule(shift=5.0, steps=(1000, 667, 333)).generator_grid(3)
    expected = [1.0, 5 * 0.667 / (1 + 4 * 0.667), 5 * 0.333 / (1 + 4 * 0.333), 0.0]
    torch.testing.assert_close(warped, torch.tensor(expected))
    taken = FlowMatchSchedule(shift=8.0, steps=(1000, 757, 522), warp_steps=False)
    torch.testing.assert_close(taken.generator_grid(3), torch.tensor([1.0, 0.757, 0.522, 0.0]))


@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_a_list_may_begin_below_pure_noise_and_have_the_data_as_a_step(shift, caplog):
    """The released trainer takes row 1000 - r of its table, and an exact 0 for r = 0."""
    schedule = FlowMatchSchedule(shift=shift, steps=(999, 500, 0))
    expected = torch.tensor([*(shift * u / (1 + (shift - 1) * u) for u in (0.999, 0.5)), 0.0, 0.0])
    torch.testing.assert_close(schedule.generator_grid(3), expected)
    assert schedule.raw_steps(3) == [999, 500, 0, 0]
    load_recipe("tiny", ["schedule.steps=[999, 500, 0]", "generator.num_steps=3"])
    for words in ("steps start at 999", "steps end at 0"):
        assert words in caplog.text
    caplog.clear()
    load_recipe("tiny", ["schedule.steps=[1000, 500, 1]", "generator.num_steps=3"])
    assert caplog.text == ""


def test_a_step_at_the_data_changes_no_sample_and_teaches_nothing():
    network, query = SmallNetwork(5), random_query()
    grid = FlowMatchSchedule(shift=3.0, steps=(1000, 500, 0)).generator_grid(3).double()
    ends = [
        rollout_exit(network, grid, query.noise, query.text, exit_step, keep_graph=True).x0
        for exit_step in (1, 2)
    ]
    assert torch.equal(*ends)
    for end, moves in zip(ends, (True, False), strict=True):
        gradients = torch.autograd.grad(end.sum(), list(network.parameters()), allow_unused=True)
        assert any(each is not None and each.abs().max() > 0 for each in gradients) == moves


@pytest.mark.parametrize(
    "steps", [(), (0,), (1001, 500), (1000, 500, 500), (1000, -1), (1000, 200, 300)]
)
def test_lists_that_are_no_way_down_are_refused(steps):
    with pytest.raises(ConfigError, match="steps"):
        FlowMatchSchedule(steps=steps)


def test_a_list_of_another_length_than_the_generators_is_refused_in_recipe_and_grid():
    with pytest.raises(ConfigError, match=r"num_steps"):
        FlowMatchSchedule(steps=(1000, 500)).generator_grid(3)
    with pytest.raises(ConfigError, match=r"set it to 2"):
        load_recipe("tiny", ["schedule.steps=[1000, 500]"])
    config = load_recipe("tiny", ["schedule.steps=[1000, 400]", "generator.num_steps=2"])
    assert config.schedule.steps == (1000, 400)


@pytest.mark.parametrize(
    ("window", "levels"),
    [("none", (3, 1000)), ("below", (500, 1000)), ("above", (3, 750)), ("both", (500, 750))],
)
def test_score_levels_lie_in_the_window_of_the_exit_step(window, levels):
    schedule = FlowMatchSchedule(score_level_min=3, score_window=window)
    grid = schedule.few_step_grid(4)
    assert schedule.score_levels(grid, 1) == levels
    key = next(
        key for key in (MicroBatchKey(at, 0) for at in range(50)) if draws_at(schedule, key) == 1
    )
    sigma = draw(0, key, range(500), (1, 1, 1, 1), schedule, 4).sigma
    low, high = (schedule.score_sigma(torch.tensor([each]))[0] for each in (levels[0], levels[1]))
    assert low <= sigma.min() < low + 0.05
    assert high - 0.05 < sigma.max() <= high


def draws_at(schedule: FlowMatchSchedule, key: MicroBatchKey) -> int:
    return draw(0, key, (0,), (1, 1, 1, 1), schedule, 4).exit_step


def test_the_last_step_has_a_window_from_zero_and_an_empty_range_has_one_level():
    schedule = FlowMatchSchedule(score_window="both")
    assert schedule.score_levels(schedule.few_step_grid(4), 3) == (0, 250)
    late = FlowMatchSchedule(score_level_min=900, score_window="above")
    assert late.score_levels(late.few_step_grid(4), 1) == (900, 901)


def test_raw_levels_are_found_back_from_shifted_ones():
    schedule = FlowMatchSchedule(shift=7.0)
    raw = torch.arange(0, 1001, 37, dtype=torch.float64)
    sigma = shift_sigma(raw / 1000, 7.0)
    assert [schedule.raw_level(float(each)) for each in sigma] == raw.int().tolist()


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_renoising_levels_are_uniform_thousandths_up_to_pure_noise(shift):
    sigma = FlowMatchSchedule(score_shift=shift).renoise_sigma(torch.arange(1000)).double()
    r = torch.arange(1, 1001, dtype=torch.float64) / 1000
    expected = (shift / (shift + 1 / r - 1)).clamp(0.02, 1.0)
    torch.testing.assert_close(sigma, expected, atol=1e-7, rtol=0)
    assert sigma.max() == 1


def test_the_image_trainers_score_law_is_that_of_renoising():
    """clamp(shift(ceil(1000 r) / 1000), 0.02, 1), of r drawn uniformly."""
    schedule = FlowMatchSchedule(shift=5.0, score_law="renoise", score_sigma_max=1.0)
    r = torch.rand(5000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rounded = ((1000 * r).ceil() / 1000).clamp(1e-7, 1 - 1e-7)
    expected = (5 / (5 + 1 / rounded - 1)).clamp(0.02, 1.0).float()
    sigma = schedule.score_sigma((1000 * r).floor().long())
    torch.testing.assert_close(sigma, expected, atol=1e-7, rtol=0)
    video = FlowMatchSchedule(shift=5.0).score_sigma((1000 * r).floor().long())
    assert (sigma - video).abs().max() > 0.019
    every = schedule.score_sigma(torch.arange(1000))
    assert every.max() == 1
    assert (every == 1).sum() == 1
    assert every.min() == torch.tensor(0.02)
    held = dataclasses.replace(schedule, score_sigma_max=0.98).score_sigma(torch.arange(1000))
    torch.testing.assert_close(held, every.clamp_max(0.98))


def test_draws_follow_the_score_law():
    key, shape = MicroBatchKey(2, 0), (1, 1, 1, 1)
    laws = [
        FlowMatchSchedule(score_law=law, score_sigma_max=high)
        for law, high in (("clamped", 0.98), ("renoise", 1.0))
    ]
    video, image = (draw(0, key, range(400), shape, each, 4) for each in laws)
    assert torch.equal(video.noise, image.noise)
    assert video.sigma.max() == torch.tensor(0.98)
    assert image.sigma.max() > 0.99
    assert (image.sigma >= video.sigma).all()


def test_default_ranges_draw_what_was_drawn_before_there_were_any():
    stream = torch.Generator().manual_seed(0)
    other = torch.Generator().manual_seed(0)
    assert torch.equal(
        torch.randint(1000, (50,), generator=stream), torch.randint(0, 1000, (50,), generator=other)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"score_level_max": 0},
        {"score_level_min": -1},
        {"score_sigma_max": 1.01, "score_law": "renoise"},
    ],
)
def test_ranges_that_mean_nothing_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        FlowMatchSchedule(**settings)


class TestGuidanceNorm:
    def velocities(self):
        query = random_query()
        conditional, guided = (predict(SmallNetwork(seed), query).detach() for seed in (1, 2))
        return conditional, 3 * guided

    def test_layer_norm_gives_every_row_the_conditional_length(self):
        conditional, guided = self.velocities()
        found = renormalized(guided, conditional, "layer_norm")
        torch.testing.assert_close(found.norm(dim=-1), conditional.norm(dim=-1))
        ratio = found / guided
        torch.testing.assert_close(ratio[..., 0], ratio[..., 1])

    def test_scalar_bounds_the_whole_from_above_and_never_lengthens(self):
        conditional, guided = self.velocities()
        found = renormalized(guided, conditional, "scalar")
        assert guided.norm() > conditional.norm()
        torch.testing.assert_close(found.norm(), conditional.norm())
        torch.testing.assert_close(found / guided, (found / guided).mean().expand_as(found))
        short = 0.01 * guided
        assert torch.equal(renormalized(short, conditional, "scalar"), short)

    def test_nothing_is_divided_by_zero(self):
        conditional, guided = self.velocities()
        for norm in ("layer_norm", "scalar"):
            found = renormalized(0 * guided, conditional, norm)
            assert torch.equal(found, torch.zeros_like(guided))

    @pytest.mark.parametrize("batched", [True, False])
    @pytest.mark.parametrize("norm", ["none", "layer_norm", "scalar"])
    def test_it_holds_wherever_a_teacher_is_guided(self, norm, batched):
        query, network = random_query(), SmallNetwork(1)

        def model(x_t, sigma, text):
            return network(x_t, sigma, text) + text.reshape(-1, 1, 1, 1, 1)

        asked = (model, query.x_t, query.sigma, query.text + 1)
        guidance = Guidance(torch.zeros(1, 1, 1), 4.0, batched, norm)
        conditional, guided = guided_velocities(*asked, guidance)
        plain = guided_velocity(*asked, dataclasses.replace(guidance, norm="none"))
        torch.testing.assert_close(guided, renormalized(plain, conditional, norm))
        assert torch.equal(guided_velocity(*asked, guidance), guided)
