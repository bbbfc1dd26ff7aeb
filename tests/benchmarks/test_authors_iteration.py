"""The authors' iteration that ours is timed against: it is one, and makes their passes."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.seeds import draw
from sgmd_core.types import Draws, MicroBatchKey, Purpose, TextBatch
from tests.helpers.moves import assert_moves, relative_error
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.models.wan import WanVelocity
from workers.network_settings import OptimizerSettings
from workers.score_teacher import ScoreTeacher
from workers.settings import FakeScoreSettings, GeneratorSettings, TeacherSettings

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import authors_iteration

SHAPE = (4, 2, 4, 4)
SAMPLES, MICRO_BATCHES, NUM_STEPS, SCALE, RATES = 2, 2, 4, 3.0, (1e-3, 2e-3)


def make_network() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        ffn_dim=32,
        text_dim=8,
        freq_dim=16,
        in_channels=SHAPE[0],
        out_channels=SHAPE[0],
    )


@pytest.fixture
def texts() -> list[TextBatch]:
    drawn = torch.randn(MICRO_BATCHES, SAMPLES, 3, 8, generator=torch.Generator().manual_seed(1))
    return [TextBatch(text, (2 * place, 2 * place + 1)) for place, text in enumerate(drawn)]


@pytest.fixture
def negative() -> Tensor:
    return torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(2))


def drawn(key: MicroBatchKey, text: TextBatch) -> Draws:
    return draw(0, key, text.sample_indices, SHAPE, FlowMatchSchedule(), NUM_STEPS)


class OurIteration:
    """The same with the roles, and fresh tracking."""

    def __init__(self, texts: list[TextBatch], negative: Tensor) -> None:
        self.generator = GeneratorLearner(
            WanVelocity(make_network()),
            FlowMatchSchedule(),
            GeneratorSettings(num_steps=NUM_STEPS, optimizer=OptimizerSettings(lr=RATES[0])),
            SHAPE,
            0,
        )
        self.fake_score = FakeScoreTracker(
            WanVelocity(make_network()),
            SgmdObjective(),
            FakeScoreSettings(tracking="fresh", optimizer=OptimizerSettings(lr=RATES[1])),
        )
        self._teacher = ScoreTeacher(WanVelocity(make_network()), TeacherSettings(SCALE))
        self._texts, self._negative = texts, negative

    def run(self, iteration: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        generator, fake_score, share = self.generator, self.fake_score, 1 / MICRO_BATCHES
        for place, text in enumerate(self._texts):
            query = generator.rollout(MicroBatchKey(iteration, place), text)
            prediction = self._teacher.denoise(query, self._negative)
            learned = generator.learn(fake_score.signal(query, prediction, share))
            figures |= {name: learned.metrics[name] for name in ("generator", "fisher")}
        figures["generator_norm"] = generator.gradient_report(iteration).grad_norm
        generator.step(iteration)
        for place, text in enumerate(self._texts):
            query = generator.sample(MicroBatchKey(iteration, place, Purpose.TRACK), text)
            figures["v_pred"] = fake_score.track(query, share).metrics["residual_contraction"]
        figures["fake_score_norm"] = fake_score.gradient_report(iteration).grad_norm
        fake_score.step(iteration)
        return figures


@pytest.mark.slow
def test_three_iterations_update_both_networks_as_fresh_tracking_does(
    texts: list[TextBatch], negative: Tensor
) -> None:
    ours = OurIteration(texts, negative)
    theirs = authors_iteration.AuthorsIteration(
        make_network, FlowMatchSchedule().generator_grid(NUM_STEPS), SCALE, RATES
    )
    batches = [authors_iteration.Batch(text.text, negative.expand_as(text.text)) for text in texts]
    for iteration in range(3):
        expected = ours.run(iteration)

        def as_ours(phase: str, place: int, now: int = iteration) -> Draws:
            return drawn(MicroBatchKey(now, place, Purpose(phase)), texts[place])

        figures = theirs.run(batches, batches, as_ours)
        assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    start = {name: value.detach() for name, value in make_network().named_parameters()}
    for own, their in (
        (ours.generator, theirs.generator),
        (ours.fake_score, theirs.fake_score),
    ):
        weights = own.snapshot().weights.items()
        found = {name.removeprefix("transformer."): value for name, value in weights}
        expected = {name: value.detach() for name, value in their.network.named_parameters()}
        assert_moves(expected, start, 1e-4)
        assert relative_error(found, expected) < 1e-4


@pytest.mark.slow
def test_an_iteration_makes_the_twelve_forward_passes_of_theirs(
    texts: list[TextBatch], negative: Tensor
) -> None:
    passes = 0

    def counted() -> WanTransformer3DModel:
        network = make_network()

        def count(*_: object) -> None:
            nonlocal passes
            passes += 1

        network.register_forward_hook(count)
        return network

    theirs = authors_iteration.AuthorsIteration(
        counted, FlowMatchSchedule().generator_grid(NUM_STEPS), SCALE
    )
    batch = authors_iteration.Batch(texts[0].text, negative.expand_as(texts[0].text))
    for exits_at in range(NUM_STEPS):
        made = drawn(MicroBatchKey(0, 0), texts[0])
        at = Draws(made.initial_noise, exits_at, made.sigma, made.noise)
        theirs.run([batch], [batch], lambda _phase, _place, at=at: at)
    assert passes / NUM_STEPS == 12
