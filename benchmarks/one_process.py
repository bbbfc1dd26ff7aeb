"""CPU seconds of one iteration of the three roles in one process, at a size that others can repeat.

    python benchmarks/one_process.py --output one_process.json

Latents (1, 16, 5, 16, 16), a Wan of 2 layers with 4 heads of 32, feed-forward 512, text of 32 x 64,
guidance 3, four steps, float32, AdamW, one thread; random weights. Both tracking modes take turns.
The exit step of a rollout is drawn, so iterations differ in length: every one of the four is taken
equally often, and the mean is reported.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from documents import write_document

from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.seeds import draw
from sgmd_core.types import Draws, MicroBatchKey, Purpose, TextBatch
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.models.wan import WanVelocity
from workers.models.wan_arithmetic import WanShape
from workers.score_teacher import ScoreTeacher
from workers.settings import FakeScoreSettings, GeneratorSettings, TeacherSettings

LATENT_SHAPE = (16, 5, 16, 16)
TEXT_LENGTH, TEXT_WIDTH = 32, 64
NUM_STEPS = 4
TRACKING = ("shared", "fresh")


class Iterations:
    """The three roles, and one iteration after another.

    Args:
        tracking: `shared` or `fresh`.
    """

    def __init__(self, tracking: str) -> None:
        self._fresh = tracking == "fresh"
        self._schedule = FlowMatchSchedule()
        self._generator = GeneratorLearner(
            make_network(), self._schedule, GeneratorSettings(num_steps=NUM_STEPS), LATENT_SHAPE, 0
        )
        settings = FakeScoreSettings(tracking="fresh" if self._fresh else "shared")
        self._fake_score = FakeScoreTracker(make_network(), SgmdObjective(), settings)
        self._teacher = ScoreTeacher(make_network(), TeacherSettings(guidance_scale=3.0))
        self._text = TextBatch(torch.randn(1, TEXT_LENGTH, TEXT_WIDTH), (0,))
        self._negative = torch.randn(1, TEXT_LENGTH, TEXT_WIDTH)

    def run(self, iteration: int) -> None:
        """One update of both networks."""
        generator, fake_score = self._generator, self._fake_score
        key = MicroBatchKey(iteration, 0)
        query = generator.rollout(key, self._text, self._draws(key))
        prediction = self._teacher.denoise(query, self._negative)
        signal = fake_score.signal(query, prediction, 1.0)
        if not self._fresh:
            fake_score.track(query, 1.0)
        generator.learn(signal)
        generator.gradient_report(iteration)
        generator.step(iteration)
        if self._fresh:
            again = MicroBatchKey(iteration, 0, Purpose.TRACK)
            fake_score.track(generator.sample(again, self._text, self._draws(again)), 1.0)
        fake_score.gradient_report(iteration)
        fake_score.step(iteration)

    def _draws(self, key: MicroBatchKey) -> Draws:
        """Returns the draws of the key with every exit step in turn."""
        drawn = draw(0, key, (0,), LATENT_SHAPE, self._schedule, NUM_STEPS)
        return replace(drawn, exit_step=key.iteration % NUM_STEPS)


def make_network() -> WanVelocity:
    """The denoiser, with random weights."""
    torch.manual_seed(0)
    return WanVelocity(
        WanTransformer3DModel(
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=32,
            ffn_dim=512,
            text_dim=TEXT_WIDTH,
            in_channels=LATENT_SHAPE[0],
            out_channels=LATENT_SHAPE[0],
        )
    )


def measure(rounds: int) -> dict[str, Any]:
    """Means over whole rounds of the exit steps; the first round warms up."""
    torch.set_num_threads(1)
    stands = {tracking: Iterations(tracking) for tracking in TRACKING}
    seconds: dict[str, list[float]] = {tracking: [] for tracking in TRACKING}
    for number in range(rounds + 1):
        for tracking, stand in stands.items():
            spent = _cpu_seconds(stand.run, range(number * NUM_STEPS, (number + 1) * NUM_STEPS))
            if number:
                seconds[tracking].append(spent / NUM_STEPS)
    shape = WanShape.from_config(make_network().transformer.config)
    return {
        "cpu_s": {name: statistics.median(found) for name, found in seconds.items()},
        "fastest_cpu_s": {name: min(found) for name, found in seconds.items()},
        "forward_flops": shape.forward_flops(LATENT_SHAPE, TEXT_LENGTH),
        "parameters": shape.num_parameters,
    }


def _cpu_seconds(run: Callable[[int], None], iterations: range) -> float:
    started = time.process_time()
    for iteration in iterations:
        run(iteration)
    return time.process_time() - started


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, measures, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=25, help="of four iterations each")
    parser.add_argument("--output", type=Path, help="file for the JSON; standard output without")
    given = parser.parse_args(arguments)
    measured = {
        "rounds": given.rounds,
        "results": measure(given.rounds),
    }
    write_document("one_process", measured, given.output)


if __name__ == "__main__":
    main()
