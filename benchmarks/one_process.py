"""CPU seconds of one iteration of the three roles in one process, at a size that others can repeat.

    python benchmarks/one_process.py --output one_process.json

`small`: latents (1, 16, 5, 16, 16), a Wan of 2 layers with 4 heads of 32, feed-forward 512, text of
32 x 64, random weights. `tiny`: the model and the batch of the recipe of that name, two
micro-batches of 8 samples, latents (16, 4, 4, 4). Both: guidance 3, four steps, float32, AdamW, one
thread, random text, the settings' defaults otherwise. Both tracking modes take turns. The exit step
of a rollout is drawn, so iterations differ in length: every one of the four is taken equally often,
and the mean is reported.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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

NUM_STEPS = 4
GUIDANCE_SCALE = 3.0
TRACKING = ("shared", "fresh")


@dataclass(frozen=True, slots=True)
class Size:
    """A network, and how much goes through it in an iteration.

    Attributes:
        make_network: Makes the network, each time with the same weights.
        latent_shape: Of one sample.
        text_shape: Positions and width of a caption's embedding.
        micro_batches: Parts of the batch.
        samples: Of each of them.
    """

    make_network: Callable[[], WanTransformer3DModel]
    latent_shape: tuple[int, int, int, int]
    text_shape: tuple[int, int]
    micro_batches: int = 1
    samples: int = 1

    def texts(self) -> list[TextBatch]:
        """Random embeddings of the captions of each micro-batch."""
        count = self.samples
        return [
            TextBatch(
                torch.randn(count, *self.text_shape),
                tuple(range(place * count, (place + 1) * count)),
            )
            for place in range(self.micro_batches)
        ]


def _small_network() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=32,
        ffn_dim=512,
        text_dim=64,
        in_channels=16,
        out_channels=16,
    )


def _tiny_network() -> WanTransformer3DModel:
    folder = Path(__file__).parents[1] / "assets" / "tiny-wan"
    return WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")


SIZES = {
    "small": Size(_small_network, (16, 5, 16, 16), (32, 64)),
    "tiny": Size(_tiny_network, (16, 4, 4, 4), (16, 64), micro_batches=2, samples=8),
}


class Iterations:
    """The three roles, and one iteration after another.

    Args:
        tracking: `shared` or `fresh`.
        size: Network and batch.
    """

    def __init__(self, tracking: str, size: Size) -> None:
        self._fresh = tracking == "fresh"
        self._size = size
        self._schedule = FlowMatchSchedule()
        self._generator = GeneratorLearner(
            WanVelocity(size.make_network()),
            self._schedule,
            GeneratorSettings(num_steps=NUM_STEPS),
            size.latent_shape,
            0,
        )
        settings = FakeScoreSettings(tracking="fresh" if self._fresh else "shared")
        self._fake_score = FakeScoreTracker(
            WanVelocity(size.make_network()), SgmdObjective(), settings
        )
        self._teacher = ScoreTeacher(
            WanVelocity(size.make_network()), TeacherSettings(guidance_scale=GUIDANCE_SCALE)
        )
        self._texts = size.texts()
        self._negative = torch.randn(1, *size.text_shape)

    def run(self, iteration: int) -> None:
        """One update of both networks."""
        generator, fake_score = self._generator, self._fake_score
        share = 1 / self._size.micro_batches
        for place, text in enumerate(self._texts):
            key = MicroBatchKey(iteration, place)
            query = generator.rollout(key, text, self._draws(key, text))
            prediction = self._teacher.denoise(query, self._negative)
            signal = fake_score.signal(query, prediction, share)
            if not self._fresh:
                fake_score.track(query, share)
            generator.learn(signal)
        generator.gradient_report(iteration)
        generator.step(iteration)
        if self._fresh:
            for place, text in enumerate(self._texts):
                key = MicroBatchKey(iteration, place, Purpose.TRACK)
                query = generator.sample(key, text, self._draws(key, text))
                fake_score.track(query, share)
        fake_score.gradient_report(iteration)
        fake_score.step(iteration)

    def _draws(self, key: MicroBatchKey, text: TextBatch) -> Draws:
        """Returns the draws of the key with every exit step in turn."""
        drawn = draw(
            0, key, text.sample_indices, self._size.latent_shape, self._schedule, NUM_STEPS
        )
        return replace(drawn, exit_step=key.iteration % NUM_STEPS)


def measure(size: Size, rounds: int) -> dict[str, Any]:
    """Means over whole rounds of the exit steps; the first round warms up."""
    torch.set_num_threads(1)
    stands = {tracking: Iterations(tracking, size) for tracking in TRACKING}
    seconds: dict[str, list[float]] = {tracking: [] for tracking in TRACKING}
    for number in range(rounds + 1):
        for tracking, stand in stands.items():
            iterations = range(number * NUM_STEPS, (number + 1) * NUM_STEPS)
            spent = sum(cpu_seconds(stand.run, iteration) for iteration in iterations)
            if number:
                seconds[tracking].append(spent / NUM_STEPS)
    shape = WanShape.from_config(size.make_network().config)
    return {
        "cpu_s": {name: statistics.median(found) for name, found in seconds.items()},
        "fastest_cpu_s": {name: min(found) for name, found in seconds.items()},
        "forward_flops": shape.forward_flops(size.latent_shape, size.text_shape[0]),
        "parameters": shape.num_parameters,
    }


def cpu_seconds(run: Callable[[int], object], iteration: int) -> float:
    """CPU seconds of one iteration."""
    started = time.process_time()
    run(iteration)
    return time.process_time() - started


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, measures, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=25, help="of four iterations each")
    parser.add_argument("--output", type=Path, help="file for the JSON; standard output without")
    given = parser.parse_args(arguments)
    measured = {
        "size": given.size,
        "rounds": given.rounds,
        "results": measure(SIZES[given.size], given.rounds),
    }
    write_document("one_process", measured, given.output)


if __name__ == "__main__":
    main()
