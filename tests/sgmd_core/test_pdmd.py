"""PDMD: what the projection takes away, from whom, and how much of a step that is."""

import dataclasses

import pytest
import torch

from sgmd_core.objectives.dmd import DmdObjective, matching_direction, without_component
from sgmd_core.objectives.pdmd import PdmdObjective, query_residual, random_direction
from sgmd_core.types import NoisedBatch, detached
from sgmd_core.worlds.gaussian import gaussian_velocity
from tests.helpers.queries import make_query
from tests.helpers.small_network import SmallNetwork, predict, random_query, with_leaf

ERROR = 0.33


def generator_gradient(objective: DmdObjective, query: NoisedBatch, fake, teacher) -> torch.Tensor:
    loss = objective.generator_loss(query, fake, teacher)
    return torch.autograd.grad(loss.value, query.x0)[0]


def velocities(query: NoisedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    fake, teacher = (predict(SmallNetwork(seed), detached(query)) for seed in (1, 2))
    return fake, teacher


def dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one * other).flatten(1).sum(dim=1)


def test_no_step_is_left_along_the_residual_and_the_rest_is_dmds():
    query = with_leaf(random_query())
    fake, teacher = velocities(query)
    residual = query_residual(query, fake)
    own = generator_gradient(PdmdObjective(), query, fake, teacher)
    plain = generator_gradient(DmdObjective(), query, fake, teacher)
    lengths = dot(own, own).sqrt() * dot(residual, residual).sqrt()
    assert (dot(plain, residual).abs() / lengths).min() > 1e-3
    assert (dot(own, residual).abs() / lengths).max() < 1e-14
    # Orthogonal parts: what was taken is along the residual alone, and divided as DMD divides.
    taken = plain - own
    cosine = dot(taken, residual).abs() / (dot(taken, taken) * dot(residual, residual)).sqrt()
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def test_the_residual_is_that_of_x0_and_the_noise_level_cancels():
    query = random_query()
    fake, teacher = velocities(query)
    sigma = query.sigma.reshape(-1, 1, 1, 1, 1)
    x0_fake, x0_teacher = query.x_t - sigma * fake, query.x_t - sigma * teacher
    torch.testing.assert_close(sigma * query_residual(query, fake), x0_fake - query.x0)
    gap = without_component(x0_fake - x0_teacher, x0_fake - query.x0)
    scale = (query.x0 - x0_teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    found = matching_direction(query, fake, teacher, removed=query_residual(query, fake))
    torch.testing.assert_close(found, gap / scale)


def test_without_a_residual_it_is_dmd_to_the_bit():
    query = with_leaf(random_query(torch.float32))
    exact = query.velocity.detach()
    teacher = predict(SmallNetwork(2, torch.float32), detached(query))
    gradients = [
        generator_gradient(objective, query, exact, teacher)
        for objective in (DmdObjective(), PdmdObjective())
    ]
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_a_gap_along_the_residual_moves_nothing():
    query = with_leaf(random_query())
    fake, _ = velocities(query)
    teacher = fake + 0.7 * query_residual(query, fake)
    assert generator_gradient(DmdObjective(), query, fake, teacher).abs().max() > 1e-3
    assert generator_gradient(PdmdObjective(), query, fake, teacher).abs().max() < 1e-14


def exact_query(num_elements: int, num_samples: int = 256):
    """Samples of N(0, 1) under the exact fake score, and a teacher of N(1, 1)."""
    stream = torch.Generator().manual_seed(num_elements)
    shape = (num_samples, 1, 1, 1, num_elements)
    x0, noise = torch.randn(2, *shape, generator=stream, dtype=torch.float64)
    sigma = torch.full((num_samples,), 0.5, dtype=torch.float64)
    query = make_query(x0, noise, sigma)
    one = torch.ones_like(sigma)
    fake = gaussian_velocity(query.x_t, sigma, 0 * one, one)
    return query, fake, gaussian_velocity(query.x_t, sigma, one, one)


@pytest.mark.parametrize(("num_elements", "kept"), [(2, 0.5), (16, 15 / 16), (256, 255 / 256)])
def test_with_an_exact_fake_score_the_step_loses_one_dimension_of_all(num_elements, kept):
    query, fake, teacher = exact_query(num_elements)
    gap, residual = teacher - fake, query_residual(query, fake)
    projected = without_component(gap, residual)
    share = (dot(projected, projected) / dot(gap, gap)).mean().item()
    assert share == pytest.approx(kept, abs=0.06 / num_elements**0.5)


def test_the_residual_is_an_unbiased_estimate_of_the_fake_scores_error():
    query, fake, _ = exact_query(256)
    wrong = fake + ERROR
    assert query_residual(query, wrong).mean().item() == pytest.approx(-ERROR, abs=0.01)
    assert query_residual(query, fake).mean().item() == pytest.approx(0, abs=0.01)


def test_it_damps_a_constant_error_and_does_not_remove_it():
    """The residual also holds noise that cannot be predicted: here three quarters stay and more."""
    query, fake, _ = exact_query(4096, num_samples=64)
    error = torch.full_like(fake, ERROR)
    left = without_component(error, query_residual(query, fake - error))
    share = (dot(left, error) / dot(error, error)).mean().item()
    # Of a residual of variance V = 1 / 2 beside the error e, e^2 / (e^2 + V) is taken.
    variance = query_residual(query, fake).square().mean().item()
    assert share == pytest.approx(variance / (variance + ERROR**2), abs=0.01)
    assert 0.7 < share < 0.99


def test_the_control_takes_out_another_direction_of_each_sample_and_the_same_one_again():
    query = with_leaf(random_query())
    fake, teacher = velocities(query)
    control = PdmdObjective(removed="random")
    own = generator_gradient(control, query, fake, teacher)
    drawn = random_direction(query)
    assert (dot(own, drawn).abs() / dot(own, own).sqrt()).max() < 1e-14
    assert torch.equal(own, generator_gradient(control, query, fake, teacher))
    for index in range(len(query.x0)):
        own = slice(index, index + 1)
        one = dataclasses.replace(
            query,
            x0=query.x0[own],
            sigma=query.sigma[own],
            noise=query.noise[own],
            text=query.text[own],
        )
        assert torch.equal(random_direction(one)[0], drawn[index])
    assert not torch.equal(drawn[0], drawn[1])


def test_the_control_keeps_of_the_step_what_the_projection_keeps():
    query, fake, teacher = exact_query(16)
    gap = teacher - fake
    kept = []
    for removed in (query_residual(query, fake), random_direction(query)):
        left = without_component(gap, removed)
        kept.append((dot(left, left) / dot(gap, gap)).mean().item())
    assert kept[0] == pytest.approx(kept[1], abs=0.02)


def test_a_floor_bounds_the_denominator_in_latent_units():
    query = with_leaf(random_query())
    fake, teacher = velocities(query)
    sigma = query.sigma.reshape(-1, 1, 1, 1, 1)
    scale = (sigma * (teacher - query.velocity)).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    floor = float(scale.detach().median())
    assert (scale < floor).any()
    found = matching_direction(query, fake, teacher, normalizer_min=floor)
    torch.testing.assert_close(found, sigma * (teacher - fake) / scale.clamp_min(floor))
    untouched = matching_direction(
        query, fake, teacher, normalizer_min=float(scale.detach().min()) / 2
    )
    torch.testing.assert_close(untouched, matching_direction(query, fake, teacher))
