"""The measured lag in a world where the generator's score is known: a lower limit, and in order."""

import pytest
import torch

from benchmarks.known_lag import exact_velocity, known_lags
from pipelines.config.gaussian_study import GaussianStudyConfig, GaussianVariant, MixtureSettings
from pipelines.config.lag import LagSettings
from pipelines.config.recipe_files import load
from pipelines.study.gaussians.distilling import GaussianDistillation, Member, points
from sgmd_core.metrics.lag import tracking_lag
from tests.helpers.moves import assert_moves

RATES = (1e-3, 3e-3, 1e-2)
SEEDS = 3
ITERATIONS = 100
WORLD = MixtureSettings(dim=4, modes=1, spread=0.5, num_steps=1)
SETTINGS = LagSettings(updates=32, batches=4)


def distillation(tracking: str = "shared") -> GaussianDistillation:
    settings = ["batch_size=512", "networks.generator_layers=0", "networks.width=32"]
    config = load(GaussianStudyConfig, "gaussians", settings)
    members = [Member(seed, 3e-3, rate) for rate in RATES for seed in range(SEEDS)]
    variant = GaussianVariant.model_validate({"tracking": tracking})
    return GaussianDistillation(config, WORLD, variant, members)


@pytest.fixture(scope="module")
def trained() -> GaussianDistillation:
    run = distillation()
    for iteration in range(ITERATIONS):
        run.iterate(iteration)
    return run


def known(figure: float | None) -> float:
    assert figure is not None
    return figure


@pytest.mark.slow
def test_it_orders_runs_by_the_error_against_the_exact_score(trained: GaussianDistillation):
    lags = known_lags(trained, ITERATIONS, SETTINGS)
    by_rate = [lags[at : at + SEEDS] for at in range(0, len(lags), SEEDS)]
    exact = [[lag.exact for lag in group] for group in by_rate]
    measured = [[known(lag.measured) for lag in group] for group in by_rate]
    # Every run of a slower fake score lags more than every run of a faster one, by both.
    for shares in (exact, measured):
        slow, middle, fast = shares
        assert min(slow) > 2 * max(middle)
        assert sum(middle) > 1.3 * sum(fast)
    # It says less than there is, never more, and of next to nothing next to nothing.
    assert all(-2e-3 < known(lag.measured) < lag.exact < lag.error for lag in lags)
    assert all(known(lag.measured) > 0.3 * lag.exact for lag in lags[:SEEDS])


@pytest.mark.slow
def test_a_copy_at_the_own_rate_alone_says_least_of_those_that_lag_most(
    trained: GaussianDistillation,
):
    lags = known_lags(trained, ITERATIONS, SETTINGS)
    assert all(known(lag.own_rate) < 0.5 * known(lag.measured) for lag in lags[:SEEDS])
    assert all(lag.own_rate == lag.measured for lag in lags[2 * SEEDS :])


@pytest.mark.slow
def test_the_loss_is_the_error_and_what_nobody_can_predict(trained: GaussianDistillation):
    held = trained.held_queries(ITERATIONS, 16)
    exact = exact_velocity(trained)
    loss, error = trained.held_loss(held), trained.held_error(held, exact)
    noise = torch.stack(
        [
            (exact(query) - query.velocity).double().square().reshape(len(loss), -1).mean(dim=1)
            for query in held
        ]
    ).mean(dim=0)
    assert (error > 1e-3).all()
    assert torch.allclose(loss, error + noise, rtol=0.01)


@pytest.mark.slow
def test_what_the_generators_make_has_the_mean_and_covariance_that_are_read_off_them(
    trained: GaussianDistillation,
):
    noise = torch.cat([query.x0 for query in trained.held_queries(0, 16)])
    made = points(noise).reshape(16, len(RATES) * SEEDS, -1, WORLD.dim).transpose(0, 1)
    for (mean, covariance), own in zip(trained.affine_laws(), made, strict=True):
        samples = own.reshape(-1, WORLD.dim).double()
        assert torch.allclose(samples.mean(dim=0), mean, atol=0.03)
        assert torch.allclose(torch.cov(samples.T), covariance, atol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("tracking", ["shared", "fresh"])
def test_a_measurement_leaves_no_bit_behind(tracking: str):
    calm, measured = distillation(tracking), distillation(tracking)
    for iteration in range(3):
        calm.iterate(iteration)
        measured.iterate(iteration)
        known_lags(measured, iteration + 1, LagSettings(updates=2, batches=1))
    held = calm.held_queries(3, 2)
    losses = [run.held_loss(held) for run in (calm, measured)]
    untrained = distillation(tracking)
    assert_moves({"loss": losses[0]}, {"loss": untrained.held_loss(held)}, 1e-6)
    assert torch.equal(*losses)
    assert torch.equal(calm.samples(32), measured.samples(32))


def test_a_copy_that_diverges_is_left_out():
    assert tracking_lag(2.0, 1.75, {1.0: 1.5, 10.0: float("nan")}) == (0.125, 1.0)
    assert tracking_lag(2.0, 2.0, {1.0: 2.5, 10.0: 9.0}) == (-0.25, 1.0)
    assert tracking_lag(2.0, 2.0, {1.0: float("inf")}) is None
    assert tracking_lag(2.0, float("nan"), {1.0: 1.0}) is None
    assert tracking_lag(float("nan"), 2.0, {1.0: 1.0}) is None
