"""CDM, Phased DMD and the diversity loss against a plain reading of the released trainer.

Everything below `plain_` is written from its description alone, in x0 space and one graph, with no
function of ours: only networks and drawn numbers are shared.
"""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from pipelines.config.recipe import load_recipe
from sgmd_core.objectives import first_exit_of, looks_of
from sgmd_core.objectives.cdm import CdmObjective
from sgmd_core.objectives.diversity import anchor_velocity
from sgmd_core.objectives.dmd2 import Dmd2Objective
from sgmd_core.objectives.phased import PhasedObjective
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.schedule import FlowMatchSchedule, RandomSteps
from sgmd_core.seeds import RolloutRule, draw, exit_step, rollout_steps
from sgmd_core.types import Draws, MicroBatchKey, Purpose, TextBatch
from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.small_network import SmallNetwork
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.generator_task import GeneratorTask
from workers.network_settings import OptimizerSettings
from workers.score_teacher import ScoreTeacher
from workers.settings import (
    DiversitySettings,
    FakeScoreSettings,
    GeneratorSettings,
    TeacherSettings,
)

LATENT_SHAPE, SEED, SCALE = (1, 2, 2, 2), 3, 3.5
TEXT, NEGATIVE = TextBatch(torch.ones(3, 1, 1), (0, 1, 2)), torch.zeros(1, 1, 1)
UPDATE = OptimizerSettings(lr=1e-3)


class Captioned(nn.Module):
    """A network whose answer depends on the caption."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.network = SmallNetwork(seed, torch.float32)

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return self.network(x_t, sigma, text) + text.reshape(-1, 1, 1, 1, 1) * x_t.flip(1).tanh()


class Pair(nn.Module):
    """Two networks, one for the first two steps of a grid and one for the rest."""

    def __init__(self, seed: int, boundary: float) -> None:
        super().__init__()
        self.high, self.low = (SmallNetwork(seed + k, torch.float32) for k in (0, 1))
        self.boundary = boundary

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        own = self.high if bool((sigma >= self.boundary).all()) else self.low
        return own(x_t, sigma, text)


def wide(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1, 1)


def plain_shift(u: float | Tensor, shift: float) -> Tensor:
    u = torch.as_tensor(u)
    return shift / (shift + 1 / u - 1)


def plain_sigmas(raw: Sequence[int], shift: float) -> list[float]:
    return [*(float(plain_shift(each / 1000, shift)) for each in raw), 0.0]


def plain_guided(teacher: nn.Module, x_t: Tensor, sigma: Tensor, norm: str = "none") -> Tensor:
    """Guided velocity; rows of pixels get the conditional length under `layer_norm`."""
    with torch.no_grad():
        cond = teacher(x_t, sigma, TEXT.text)
        uncond = teacher(x_t, sigma, NEGATIVE.expand_as(TEXT.text))
    guided = uncond + SCALE * (cond - uncond)
    if norm == "layer_norm":
        guided = guided * cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    return guided


def plain_dmd_loss(x0: Tensor, x0_fake: Tensor, x0_teacher: Tensor, floor: float) -> Tensor:
    length = (x0 - x0_teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp(min=floor)
    step = ((x0_fake - x0_teacher) / length).nan_to_num()
    return 0.5 * (x0 - (x0 - step).detach()).square().mean()


def plain_state(
    generator: nn.Module, noise: Tensor, sigmas: Sequence[Tensor], steps: int
) -> Tensor:
    """State after some steps of Euler's, of levels that each sample has its own of."""
    x = noise
    with torch.no_grad():
        for here, after in pairwise(sigmas[: steps + 1]):
            x = x + wide(after - here) * generator(x, here, TEXT.text)
    return x


def gathered(network: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, 0 where there is none."""
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in network.named_parameters()
    }


def derived(loss: Tensor, network: nn.Module) -> dict[str, Tensor]:
    named = dict(network.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    pairs = zip(named.items(), found, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


def signalled(
    generator: GeneratorLearner, fake: FakeScoreTracker, teacher: ScoreTeacher, iteration: int
) -> None:
    query = generator.rollout(MicroBatchKey(iteration, 0), TEXT)
    generator.learn(fake.signal(query, teacher.denoise(query, NEGATIVE), 1.0))


class TestCdm:
    """The image trainer: rollouts of 2 to 16 steps, and its loss off the trajectory."""

    STEPS = RandomSteps(2, 16, stratified=True)
    SCHEDULE = FlowMatchSchedule(
        shift=5.0, score_shift=5.0, score_law="renoise", score_sigma_max=1.0
    )
    WARMUP = 4
    OBJECTIVE = CdmObjective(guidance="joint", normalizer_min=0.0, off_trajectory_warmup=WARMUP)

    def roles(self) -> tuple[list[nn.Module], GeneratorLearner, FakeScoreTracker, ScoreTeacher]:
        networks = [SmallNetwork(4, torch.float32), SmallNetwork(1, torch.float32), Captioned(2)]
        generator = GeneratorLearner(
            networks[0],
            self.SCHEDULE,
            GeneratorSettings(random_steps=self.STEPS, ema_decay=0.0, optimizer=UPDATE),
            LATENT_SHAPE,
            SEED,
            task=GeneratorTask(looks_of(self.OBJECTIVE, SCALE)),
        )
        fake = FakeScoreTracker(networks[1], self.OBJECTIVE, FakeScoreSettings("fresh", UPDATE))
        settings = TeacherSettings(guidance_scale=SCALE, cfg_norm="layer_norm")
        return networks, generator, fake, ScoreTeacher(networks[2], settings)

    def track(self, iteration: int, update: int) -> MicroBatchKey:
        return MicroBatchKey(iteration, update, Purpose.TRACK)

    def draws(self, iteration: int) -> Draws:
        return draw(
            SEED,
            MicroBatchKey(iteration, 0),
            (0, 1, 2),
            LATENT_SHAPE,
            self.SCHEDULE,
            4,
            RolloutRule(random_steps=self.STEPS),
            looks_of(self.OBJECTIVE, SCALE),
        )

    def plain_loss(self, networks: list[nn.Module], draws: Draws, weight: float) -> Tensor:
        generator, fake, teacher = networks
        assert draws.grid is not None
        assert draws.off is not None
        sigmas, e = list(draws.grid.T), draws.exit_step
        x_e, sigma_e = plain_state(generator, draws.initial_noise, sigmas, e), sigmas[e]
        v_e = generator(x_e, sigma_e, TEXT.text)
        x0 = x_e - wide(sigma_e) * v_e

        def looked(sample: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
            return ((1 - wide(sigma)) * sample + wide(sigma) * noise).detach()

        def x0_of(velocity: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
            return x_t - wide(sigma) * velocity

        x_t, sigma = looked(x0, draws.sigma, draws.noise), draws.sigma
        x0_fake = x0_of(fake(x_t, sigma, TEXT.text), x_t, sigma)
        x0_teacher = x0_of(plain_guided(teacher, x_t, sigma, "layer_norm"), x_t, sigma)
        loss = plain_dmd_loss(x0, x0_fake, x0_teacher, 0.0)
        # Off the trajectory, where the teacher has no guidance.
        sigma_s = draws.off.start
        assert sigma_s is not None
        beside = (x_e + wide(sigma_s - sigma_e) * v_e).detach()
        own = x0_of(generator(beside, sigma_s, TEXT.text), beside, sigma_s)
        sigma_t, noise = draws.off.sigma, draws.off.noise
        x_t = looked(own, sigma_t, noise)
        scores = [x0_of(each(x_t, sigma_t, TEXT.text), x_t, sigma_t) for each in (fake, teacher)]
        return loss + weight * plain_dmd_loss(own, scores[0], scores[1], 0.1)

    def test_iterations_of_a_warm_up_are_those_of_the_image_trainer(self) -> None:
        networks, generator, fake, teacher = self.roles()
        for iteration in range(2):
            draws, weight = self.draws(iteration), iteration / self.WARMUP
            expected = derived(self.plain_loss(networks, draws, weight), networks[0])
            # The first iteration leaves the loss off the trajectory out altogether.
            for other in (1.0, 0.5):
                wrong = derived(self.plain_loss(networks, draws, other), networks[0])
                assert_moves(wrong, expected, 1e-5)
            signalled(generator, fake, teacher, iteration)
            assert relative_error(gathered(networks[0]), expected) < 1e-5
            generator.gradient_report(iteration)
            generator.step(iteration)
            for update in range(self.OBJECTIVE.fake_updates):
                fake.track(generator.sample(self.track(iteration, update), TEXT), 1.0)
                fake.gradient_report(iteration)
                fake.step(iteration)

    @pytest.mark.parametrize("num_steps", [2, 3, 9, 16])
    def test_a_drawn_schedule_is_stratified_then_shifted_then_sorted(self, num_steps: int) -> None:
        u = torch.rand(4, num_steps - 1, generator=torch.Generator().manual_seed(num_steps))
        found = self.STEPS.grid(u, 5.0)
        for row, levels in zip(u.tolist(), found, strict=True):
            parts = num_steps - 1
            raw = [0.02 + 0.96 * (part + each) / parts for part, each in enumerate(row)]
            inner = sorted((float(plain_shift(each, 5.0)) for each in raw), reverse=True)
            torch.testing.assert_close(levels, torch.tensor([1.0, *inner, 0.0]))

    def test_lengths_are_uniform_from_2_to_16_and_exits_over_their_steps(self) -> None:
        lengths, shares = torch.zeros(17), list[float]()
        for iteration in range(1500):
            key = MicroBatchKey(iteration, 0)
            steps = rollout_steps(SEED, key, self.STEPS)
            lengths[steps] += 1
            leaves_at = exit_step(SEED, key, steps)
            assert 0 <= leaves_at < steps
            shares.append((leaves_at + 0.5) / steps)
        assert lengths[:2].sum() == 0
        # Fifteen lengths, 100 of each: a standard deviation is 10.
        assert (lengths[2:] - 100).abs().max() < 45
        assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.03)


class TestPhased:
    """In turns, as the trainer takes them; its two fake scores are one here."""

    SHIFT, BOUNDARY, FLOOR = 7.0, 0.91, 1e-4
    RAW = (1000, 750, 500, 250)
    OBJECTIVE = PhasedObjective(order="alternate", fake_updates=1)
    SCHEDULE = FlowMatchSchedule(shift=SHIFT)

    def roles(self) -> tuple[list[nn.Module], GeneratorLearner, FakeScoreTracker, ScoreTeacher]:
        networks: list[nn.Module] = [
            Pair(4, self.BOUNDARY),
            SmallNetwork(1, torch.float32),
            Captioned(2),
        ]
        phases = self.OBJECTIVE.phases(self.SCHEDULE, 4)
        generator = GeneratorLearner(
            networks[0],
            self.SCHEDULE,
            GeneratorSettings(ema_decay=0.0, optimizer=UPDATE),
            LATENT_SHAPE,
            SEED,
            task=GeneratorTask(phases=phases),
        )
        fake = FakeScoreTracker(networks[1], self.OBJECTIVE, FakeScoreSettings("fresh", UPDATE))
        teacher = ScoreTeacher(networks[2], TeacherSettings(guidance_scale=SCALE))
        return networks, generator, fake, teacher

    def draws(self, key: MicroBatchKey, samples: int = 3) -> Draws:
        phase = self.OBJECTIVE.phases(self.SCHEDULE, 4).at(key.iteration)
        return draw(
            SEED, key, range(samples), LATENT_SHAPE, self.SCHEDULE, 4, RolloutRule(phase=phase)
        )

    def plain_levels(self, iteration: int, *, tracking: bool) -> tuple[int, int]:
        """Raw levels, both ends included."""
        if iteration % 2 == 0:
            return 520, 980
        if tracking:
            return 20, 980
        return (520, 980) if iteration // 2 % 2 == 0 else (20, 499)

    def plain_look(
        self, anchor: Tensor, sigma_s: float, sigma: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """State of the interval, and its velocity."""
        alpha = (1 - sigma) / max(1 - sigma_s, 1e-8)
        beta = (sigma**2 - alpha**2 * sigma_s**2).clamp(min=1e-8).sqrt()
        slope = (sigma + (1 - sigma) * sigma_s**2 / (1 - sigma_s) ** 2) / beta
        x_t = wide(alpha) * anchor + wide(beta) * noise
        return x_t, wide(slope) * noise - anchor / (1 - sigma_s)

    def plain_generator_loss(
        self, networks: list[nn.Module], iteration: int, draws: Draws, floor: float, on: str
    ) -> Tensor:
        generator, fake, teacher = networks
        levels, high = plain_sigmas(self.RAW, self.SHIFT), iteration % 2 == 0
        sigmas, e = [torch.full((3,), each) for each in levels], draws.exit_step
        assert e in ((0, 1) if high else (2, 3))
        x_e = plain_state(generator, draws.initial_noise, sigmas, e)
        v_e = generator(x_e, sigmas[e], TEXT.text)
        x0 = x_e - levels[e] * v_e
        sigma_s = levels[2] if high else 0.0
        anchor = x_e + (sigma_s - levels[e]) * v_e
        x_t, _ = self.plain_look(anchor.detach(), sigma_s, draws.sigma, draws.noise)
        x0_fake = x_t - wide(draws.sigma) * fake(x_t, draws.sigma, TEXT.text)
        x0_teacher = x_t - wide(draws.sigma) * plain_guided(teacher, x_t, draws.sigma)
        return plain_dmd_loss(x0 if on == "x0" else anchor, x0_fake, x0_teacher, floor)

    def plain_tracking_loss(
        self, networks: list[nn.Module], iteration: int, draws: Draws
    ) -> Tensor:
        generator, fake, _ = networks
        levels, high = plain_sigmas(self.RAW, self.SHIFT), iteration % 2 == 0
        sigmas = [torch.full((3,), each) for each in levels]
        anchor = plain_state(generator, draws.initial_noise, sigmas, 2 if high else 4)
        sigma_s = levels[2] if high else 0.0
        x_t, velocity = self.plain_look(anchor, sigma_s, draws.sigma, draws.noise)
        return (fake(x_t, draws.sigma, TEXT.text) - velocity).square().mean()

    def test_four_iterations_in_turns_make_both_gradients_of_the_trainer(self) -> None:
        networks, generator, fake, teacher = self.roles()
        trained = list[str]()
        for iteration in range(4):
            draws = self.draws(MicroBatchKey(iteration, 0))
            expected = derived(
                self.plain_generator_loss(networks, iteration, draws, self.FLOOR, "x0"), networks[0]
            )
            for floor, on in ((10.0, "x0"), (self.FLOOR, "anchor")):
                other = self.plain_generator_loss(networks, iteration, draws, floor, on)
                if floor == 10.0 or iteration % 2 == 0:
                    assert_moves(derived(other, networks[0]), expected)
            signalled(generator, fake, teacher, iteration)
            assert relative_error(gathered(networks[0]), expected) < 1e-5
            moved = {name.split(".")[0] for name, each in expected.items() if each.abs().max() > 0}
            trained += sorted(moved)
            generator.gradient_report(iteration)
            generator.step(iteration)
            # Its own batch, by the updated generator, to the end of the phase.
            key = MicroBatchKey(iteration, 0, Purpose.TRACK)
            loss = self.plain_tracking_loss(networks, iteration, self.draws(key))
            report = fake.track(generator.sample(key, TEXT), 1.0)
            assert report.metrics["tracking"] == pytest.approx(loss.item(), rel=1e-5)
            assert relative_error(gathered(networks[1]), derived(loss, networks[1])) < 1e-5
            fake.gradient_report(iteration)
            fake.step(iteration)
        assert trained == ["high", "low"] * 2

    @pytest.mark.slow
    @pytest.mark.parametrize("tracking", [False, True])
    def test_levels_are_whole_thousandths_of_the_table_and_fill_their_range(
        self, tracking: bool
    ) -> None:
        purpose = Purpose.TRACK if tracking else Purpose.GENERATE
        for iteration in range(4):
            first, last = self.plain_levels(iteration, tracking=tracking)
            sigma = self.draws(MicroBatchKey(iteration, 0, purpose), 4000).sigma.double()
            raw = 1000 * sigma / (self.SHIFT - (self.SHIFT - 1) * sigma)
            torch.testing.assert_close(raw, raw.round(), atol=2e-3, rtol=0)
            drawn = set(raw.round().int().tolist())
            assert (min(drawn), max(drawn)) == pytest.approx((first, last), abs=2)
            assert min(drawn) >= first
            assert max(drawn) <= last


class TestDiversity:
    """A loss of the first step, and where rollouts leave while it is on."""

    @pytest.mark.parametrize(("steps", "anchor_step"), [(6, 2), (3, 3)])
    def test_the_first_step_learns_the_mean_velocity_of_the_teachers_way(
        self, steps: int, anchor_step: int
    ) -> None:
        networks, shift = [SmallNetwork(4, torch.float32), Captioned(2)], 5.0
        settings = DiversitySettings(0.05, steps, anchor_step)
        generator = GeneratorLearner(
            networks[0],
            FlowMatchSchedule(shift=shift),
            GeneratorSettings(diversity=settings, ema_decay=0.0, optimizer=UPDATE),
            LATENT_SHAPE,
            SEED,
        )
        teacher = ScoreTeacher(networks[1], TeacherSettings(guidance_scale=SCALE))
        start = generator.start(MicroBatchKey(0, 0), TEXT)
        generator.diversify(start, teacher.anchor(start, NEGATIVE), 1.0)
        noise = draw(
            SEED, MicroBatchKey(0, 0), (0, 1, 2), LATENT_SHAPE, FlowMatchSchedule(), 4
        ).initial_noise
        u = torch.linspace(1, 1 / steps, steps)
        levels = [*plain_shift(u, shift).tolist(), 0.0]
        x = noise
        for here, after in pairwise(levels[: anchor_step + 1]):
            x = x + (after - here) * plain_guided(networks[1], x, torch.full((3,), here))
        target = (noise - x) / max(1 - levels[anchor_step], 1e-8)

        def plain_loss(wanted: Tensor) -> Tensor:
            velocity = networks[0](noise, torch.ones(3), TEXT.text)
            return 0.05 * (velocity - wanted).square().mean()

        expected = derived(plain_loss(target), networks[0])
        first = plain_guided(networks[1], noise, torch.ones(3))
        assert_moves(derived(plain_loss(first), networks[0]), expected)
        assert relative_error(gathered(networks[0]), expected) < 1e-5

    def test_the_divisor_has_a_floor(self) -> None:
        noise = torch.ones(1, 1, 1, 1, 1)
        assert anchor_velocity(noise, noise, 1.0).abs().max() == 0
        assert anchor_velocity(noise, 0 * noise, 1.0) == pytest.approx(1e8)

    @pytest.mark.parametrize(
        ("objective", "first"), [(Dmd2Objective(), 0), (SgmdObjective(fake_updates=1), 1)]
    )
    def test_dmds_fake_score_sees_what_the_first_step_makes_and_sgmds_does_not(
        self, objective: Dmd2Objective | SgmdObjective, first: int
    ) -> None:
        settings, passes = DiversitySettings(weight=0.05), list[int]()
        network = SmallNetwork(4, torch.float32)
        network.register_forward_pre_hook(lambda *_: passes.append(1))
        tracked = first_exit_of(objective, settings.first_exit, Purpose.TRACK)
        assert tracked == first
        generator = GeneratorLearner(
            network,
            FlowMatchSchedule(),
            GeneratorSettings(diversity=settings, ema_decay=0.0, optimizer=UPDATE),
            LATENT_SHAPE,
            SEED,
            task=GeneratorTask(first_tracked=tracked),
        )
        for purpose, shortest in ((Purpose.GENERATE, 2), (Purpose.TRACK, first + 1)):
            lengths = set[int]()
            for micro_batch in range(60):
                passes.clear()
                generator.sample(MicroBatchKey(0, micro_batch, purpose), TEXT)
                lengths.add(len(passes))
            assert lengths == set(range(shortest, 5))

    @pytest.mark.parametrize(("tracking", "first"), [("fresh", 0), ("shared", 1)])
    def test_lag_is_measured_on_rollouts_that_the_fake_score_learns_from(
        self, tracking: str, first: int
    ) -> None:
        settings = ["objective.method=dmd", "generator.diversity.weight=0.05"]
        config = load_recipe("tiny", [*settings, f"fake_score.tracking={tracking}"])
        assert config.first_exit(Purpose.GENERATE) == 1
        assert {config.first_exit(each) for each in (Purpose.TRACK, Purpose.LAG)} == {first}
