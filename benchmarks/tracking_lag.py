"""Measured lag of the fake score beside its exact error, where the generator's score is known.

    python benchmarks/tracking_lag.py --seeds 5

One Gaussian, exact teacher, affine generator (so what it makes is a Gaussian, whose velocity is
known), fake score of a few thousand parameters. Generators learn at 3e-3, fake scores at three
rates. Prints a Markdown table: error against the exact velocity over the tracking loss, of the fake
score and of a settled copy; the lag as a run measures it (`sgmd_core.metrics.lag`), which is a
lower limit of the latter; the same by a copy at the fake score's own rate alone; and their rank
correlation with the settled copy's over all runs.
"""

import argparse
import statistics
from collections.abc import Sequence

import torch
from known_lag import KnownLag, known_lags

from pipelines.config.gaussian_study import GaussianStudyConfig, GaussianVariant, MixtureSettings
from pipelines.config.lag import LagSettings
from pipelines.config.recipe_files import load
from pipelines.study.gaussians.distilling import GaussianDistillation, Member
from sgmd_core.worlds.shapes import spearman

FAKE_RATES = (1e-3, 3e-3, 1e-2)
GENERATOR_RATE = 3e-3
WORLDS = {4: 512, 16: 128}
"""Dimensions, and samples of a batch."""
PLACES = (100, 200)
UPDATES = (16, 64)


def measured(
    dim: int, batch_size: int, num_seeds: int
) -> dict[tuple[int, int], list[list[KnownLag]]]:
    """Lags by (iterations, extra updates), a list for each rate of the fake score."""
    settings = [f"batch_size={batch_size}", "networks.generator_layers=0"]
    config = load(GaussianStudyConfig, "gaussians", settings)
    world = MixtureSettings(dim=dim, modes=1, spread=0.5, num_steps=1)
    members = [
        Member(seed, GENERATOR_RATE, rate) for rate in FAKE_RATES for seed in range(num_seeds)
    ]
    run = GaussianDistillation(config, world, GaussianVariant(), members)
    found: dict[tuple[int, int], list[list[KnownLag]]] = {}
    for iteration in range(max(PLACES)):
        run.iterate(iteration)
        if iteration + 1 not in PLACES:
            continue
        for updates in UPDATES:
            lags = known_lags(run, iteration + 1, LagSettings(updates=updates))
            starts = range(0, len(lags), num_seeds)
            found[iteration + 1, updates] = [lags[at : at + num_seeds] for at in starts]
    return found


def percent(values: Sequence[float | None]) -> str:
    """Mean and standard deviation of shares, in percent."""
    numbers = [100 * value for value in values if value is not None]
    return f"{statistics.fmean(numbers):.2f} ± {statistics.stdev(numbers):.2f}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    num_seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    heads = ("dim", "iterations", "rate", "error, %", "settled, %")
    heads += ("measured, % (16)", "(64)", "own rate alone (64)")
    print(f"| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}")
    pairs: dict[str, list[tuple[float, float]]] = {}
    for dim, batch_size in WORLDS.items():
        found = measured(dim, batch_size, num_seeds)
        for place in PLACES:
            for which, rate in enumerate(FAKE_RATES):
                few, many = (found[place, updates][which] for updates in UPDATES)
                columns = {
                    "16": [each.measured for each in few],
                    "64": [each.measured for each in many],
                    "own rate alone": [each.own_rate for each in many],
                }
                exact = [each.exact for each in many]
                cells = [percent([each.error for each in many]), percent(exact)]
                cells += [percent(values) for values in columns.values()]
                print(f"| {dim} | {place} | {rate:g} | {' | '.join(cells)} |")
                for name, values in columns.items():
                    own = zip(values, exact, strict=True)
                    pairs.setdefault(name, []).extend((v, e) for v, e in own if v is not None)
    for name, values in pairs.items():
        first, second = (torch.tensor(column) for column in zip(*values, strict=True))
        above = sum(v > e for v, e in values)
        print(
            f"\n{name}: rank correlation with the exact share {spearman(first, second):.2f} over "
            f"{len(values)} runs; above it in {above}"
        )


if __name__ == "__main__":
    main()
