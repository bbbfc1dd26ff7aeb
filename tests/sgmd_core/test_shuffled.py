"""The shuffled teacher: who learns from whom, and what the losses then are."""

import pytest
import torch

from sgmd_core.errors import ShapeError
from sgmd_core.objectives.dmd import DmdObjective
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.objectives.shuffled import neighbours, shuffled_teacher
from sgmd_core.types import detached
from sgmd_core.worlds.gaussian import gaussian_velocity
from tests.helpers.queries import make_query
from tests.helpers.small_network import SmallNetwork, predict, random_query


@pytest.mark.parametrize("count", [2, 4, 6, 10, 64, 126])
def test_nobody_is_their_own_neighbour_and_everybody_is_one(count: int):
    found = neighbours(count)
    places = torch.arange(count)
    assert (found != places).all()
    assert torch.equal(found.sort().values, places)
    assert torch.equal(found[found], places)


def test_every_even_part_of_a_batch_keeps_its_pairs():
    whole = neighbours(24)
    for size in (2, 4, 6, 8, 12):
        parts = [start + neighbours(size) for start in range(0, 24, size)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("count", [0, 1, 3, 15])
def test_a_sample_without_a_neighbour_is_refused(count: int):
    with pytest.raises(ShapeError, match="even number"):
        neighbours(count)


def gaussian_pair():
    """Four samples of N(0, 1) under their exact fake score, and a teacher of N(1, 0.5)."""
    stream = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 2, 1, 3, 3, generator=stream, dtype=torch.float64)
    sigma = torch.tensor([0.2, 0.4, 0.6, 0.9], dtype=torch.float64)
    query, one = make_query(x0, noise, sigma), torch.ones_like(sigma)
    fake = gaussian_velocity(query.x_t, sigma, 0 * one, one)
    return query, fake, gaussian_velocity(query.x_t, sigma, one, 0.5 * one)


def test_the_gap_is_the_neighbours_and_the_fake_score_stays():
    _, fake, teacher = gaussian_pair()
    found = shuffled_teacher(fake, teacher)
    for own, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        torch.testing.assert_close(found[own] - fake[own], teacher[other] - fake[other])
    assert (found - teacher).abs().max() > 0.1
    # Their lengths are those of the batch: only whose they are has changed.
    lengths = [(each - fake).square().sum(dim=(1, 2, 3, 4)) for each in (found, teacher)]
    torch.testing.assert_close(lengths[0].sort().values, lengths[1].sort().values)


def test_a_gap_that_all_samples_share_is_left_as_it_is():
    _, fake, _ = gaussian_pair()
    torch.testing.assert_close(shuffled_teacher(fake, fake + 0.3), fake + 0.3)


def test_dmds_step_is_along_the_neighbours_gap():
    query, fake, teacher = gaussian_pair()
    shuffled = shuffled_teacher(fake, teacher)
    x0 = query.x0.clone().requires_grad_()
    loss = DmdObjective().generator_loss(detached(query, x0), fake, shuffled)
    (found,) = torch.autograd.grad(loss.value, x0)
    scale = (shuffled - query.velocity).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    expected = (teacher - fake)[[1, 0, 3, 2]] / scale / x0.numel()
    torch.testing.assert_close(found, expected)


def test_sgmds_gradient_goes_through_the_samples_own_fake_score():
    """Linear in the gap: J of each sample at its own place, times the neighbour's gap."""
    base = random_query()
    even = 2 * (len(base.x0) // 2)
    query = make_query(*(each[:even] for each in (base.x0, base.noise, base.sigma, base.text)))
    fake, teacher = SmallNetwork(1), SmallNetwork(2)
    x0 = query.x0.clone().requires_grad_()
    leaf = detached(query, x0)
    velocity = predict(fake, leaf)
    answered = shuffled_teacher(velocity, predict(teacher, detached(query)))
    objective = SgmdObjective(form="paper", lambda_nr=0.0)
    loss = objective.generator_loss(leaf, velocity, answered)
    (found,) = torch.autograd.grad(loss.value, x0)
    alone = []
    for index in range(even):
        own = slice(index, index + 1)
        one = make_query(query.x0[own], query.noise[own], query.sigma[own], query.text[own])
        leaf_of_one = one.x0.clone().requires_grad_()
        at_one = detached(one, leaf_of_one)
        loss = objective.generator_loss(at_one, predict(fake, at_one), answered[own])
        alone.append(torch.autograd.grad(loss.value, leaf_of_one)[0] / even)
    torch.testing.assert_close(found, torch.cat(alone))
