"""Samples in other numbers of steps than a generator was trained on, where the truth is known.

    python benchmarks/step_counts.py --seeds 4

Ring of eight Gaussians in two dimensions, exact teacher, small networks on top of it. Three ways of
training, each on the same seeds and as many updates:

    fixed   dmd on the equally spaced grid of four steps
    random  dmd on random grids of 1 to 8 steps
    cdm     the same, and the loss off the trajectory

Energy distance of 2,048 averaged-weight samples to as many of the truth, by number of steps.
"""

import argparse
import statistics

import torch
from torch import Tensor, nn

from sgmd_core.metrics.energy import energy_distance
from sgmd_core.objectives.cdm import CdmObjective
from sgmd_core.objectives.dmd import DmdObjective
from sgmd_core.rollout import RolloutExit, euler_sample, extrapolated, rollout_exit
from sgmd_core.schedule import NUM_SCORE_LEVELS, FlowMatchSchedule, RandomSteps
from sgmd_core.types import NoisedBatch, per_sample
from sgmd_core.worlds.mixture import GaussianMixture, mixture_centres

STEP_COUNTS = (1, 2, 3, 4, 6, 8)
WAYS = ("fixed", "random", "cdm")
BATCH, SAMPLES, WIDTH = 256, 2048, 128
SCHEDULE, RANDOM = FlowMatchSchedule(shift=1.0), RandomSteps(1, 8)
RING = GaussianMixture(mixture_centres(2, 8, 2.0, torch.Generator()), 0.25)


class Corrected(nn.Module):
    """The exact velocity of the ring, and a correction that is learned; at first there is none."""

    def __init__(self) -> None:
        super().__init__()
        inner = [nn.Linear(5, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()]
        self.layers = nn.Sequential(*inner, nn.Linear(WIDTH, 2))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Predicts the velocity at `x_t`."""
        level = sigma[:, None]
        seen = torch.cat([x_t.flatten(1), level, level.sqrt(), level.square()], dim=1)
        return RING(x_t, sigma, text) + self.layers(seen).reshape(x_t.shape)


class Distillation:
    """One run.

    Args:
        way: One of `WAYS`.
        seed: Of networks and draws.
    """

    def __init__(self, way: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.stream = torch.Generator().manual_seed(seed)
        self.way = way
        self.objective = CdmObjective() if way == "cdm" else DmdObjective()
        self.generator, self.fake, self.average = Corrected(), Corrected(), Corrected()
        betas = (0.0, 0.999)
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=rate, betas=betas)
            for network, rate in ((self.generator, 1e-3), (self.fake, 2e-3))
        ]

    def iterate(self) -> None:
        """Updates the generator once, then the fake score twice."""
        left = self._rollout(keep_graph=True)
        loss = self._matching(left.x0)
        if self.way == "cdm":
            start = self._levels()
            x_t = extrapolated(left.x_t, left.velocity, left.sigma, start)
            velocity = self.generator(x_t, start, no_text(BATCH))
            loss = loss + self._matching(x_t - per_sample(start, x_t) * velocity)
        self._update(0, loss)
        with torch.no_grad():
            pairs = zip(self.average.parameters(), self.generator.parameters(), strict=True)
            for average, value in pairs:
                average.lerp_(value, 0.01)
        for _ in range(2):
            query = self._query(self._rollout(keep_graph=False).x0.detach())
            velocity = self.fake(query.x_t, query.sigma, query.text)
            self._update(1, self.objective.tracking_loss(query, velocity).value)

    def distance(self, num_steps: int) -> float:
        """Energy distance of samples in so many steps."""
        stream = torch.Generator().manual_seed(99)
        noise = torch.randn(SAMPLES, 2, 1, 1, 1, generator=stream)
        grid = SCHEDULE.few_step_grid(num_steps)
        samples = euler_sample(self.average, grid, noise, no_text(SAMPLES))
        return energy_distance(samples.flatten(1), RING.sample(SAMPLES, stream)).item()

    def _rollout(self, *, keep_graph: bool) -> RolloutExit:
        num_steps = 4 if self.way == "fixed" else self._integer(1, RANDOM.max_steps + 1)
        grid = SCHEDULE.few_step_grid(4)
        if self.way != "fixed":
            grid = RANDOM.grid(torch.rand(BATCH, num_steps - 1, generator=self.stream), 1.0)
        noise = torch.randn(BATCH, 2, 1, 1, 1, generator=self.stream)
        exits_at = self._integer(0, num_steps)
        return rollout_exit(
            self.generator, grid, noise, no_text(BATCH), exits_at, keep_graph=keep_graph
        )

    def _matching(self, x0: Tensor) -> Tensor:
        query = self._query(x0)
        with torch.no_grad():
            asked = (query.x_t, query.sigma, query.text)
            velocities = self.fake(*asked), RING(*asked)
        return self.objective.generator_loss(query, *velocities).value

    def _query(self, x0: Tensor) -> NoisedBatch:
        noise = torch.randn(x0.shape, generator=self.stream)
        return NoisedBatch(x0, self._levels(), noise, no_text(BATCH))

    def _levels(self) -> Tensor:
        return SCHEDULE.score_sigma(
            torch.randint(NUM_SCORE_LEVELS, (BATCH,), generator=self.stream)
        )

    def _integer(self, first: int, end: int) -> int:
        return int(torch.randint(first, end, (), generator=self.stream))

    def _update(self, which: int, loss: Tensor) -> None:
        self.optimizers[which].zero_grad()
        loss.backward()
        self.optimizers[which].step()


def no_text(count: int) -> Tensor:
    """Captions of a world without any."""
    return torch.zeros(count, 1, 1)


def main() -> None:
    """Trains every way with every seed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=600)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("steps", *STEP_COUNTS, sep="\t")
    for way in WAYS:
        rows: list[list[float]] = []
        for seed in range(given.seeds):
            run = Distillation(way, seed)
            for _ in range(given.iterations):
                run.iterate()
            rows.append([run.distance(count) for count in STEP_COUNTS])
        cells = [
            f"{statistics.fmean(each):.4f} ± {statistics.stdev(each):.4f}"
            for each in zip(*rows, strict=True)
        ]
        print(way, *cells, sep="\t", flush=True)


if __name__ == "__main__":
    main()
