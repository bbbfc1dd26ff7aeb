"""CPU seconds of one iteration of ours over those of the authors' trainer, in turns.

    python benchmarks/against_authors.py --output against_authors.json

The authors' iteration is that of `authors_iteration.py`; ours are the two tracking modes of
`one_process.py`, on the same networks, captions and exit steps, with averaged weights and checks of
finite numbers, which theirs has not. The three take turns, one iteration each, and who begins
changes; a pair is a round of four iterations, one for every exit step. One thread, float32, no
checkpointing. Quote the median of the pairs' ratios: on a machine with other work seconds do not
hold, and ratios do.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from authors_iteration import AuthorsIteration, Batch
from documents import write_document
from one_process import GUIDANCE_SCALE, NUM_STEPS, SIZES, TRACKING, Iterations, Size, cpu_seconds

from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.types import Draws

AUTHORS = "authors"


class AuthorsStand:
    """The authors' iteration, ready to be timed.

    Args:
        size: Network and batch.
    """

    def __init__(self, size: Size) -> None:
        self._schedule = FlowMatchSchedule()
        self._shape = (size.samples, *size.latent_shape)
        sigmas = self._schedule.generator_grid(NUM_STEPS)
        self._trainer = AuthorsIteration(size.make_network, sigmas, GUIDANCE_SCALE)
        negative = torch.randn(1, *size.text_shape)
        self._batches = [
            Batch(each.text, negative.expand_as(each.text).contiguous()) for each in size.texts()
        ]

    def run(self, iteration: int) -> None:
        """One update of both networks, leaving rollouts at the exit steps of ours."""

        def drawn(_phase: str, _place: int) -> Draws:
            return Draws(
                initial_noise=torch.randn(self._shape),
                exit_step=iteration % NUM_STEPS,
                sigma=self._schedule.score_sigma(torch.randint(1000, self._shape[:1])),
                noise=torch.randn(self._shape),
            )

        self._trainer.run(self._batches, self._batches, drawn)


def measure(size: Size, rounds: int) -> dict[str, Any]:
    """Medians of the ratios, pair by pair; the first round warms up."""
    torch.set_num_threads(1)
    stands: dict[str, Callable[[int], None]] = {AUTHORS: AuthorsStand(size).run}
    stands |= {tracking: Iterations(tracking, size).run for tracking in TRACKING}
    names = [*stands]
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        spent = dict.fromkeys(names, 0.0)
        for place in range(NUM_STEPS):
            first = (number + place) % len(names)
            for name in names[first:] + names[:first]:
                spent[name] += cpu_seconds(stands[name], number * NUM_STEPS + place)
        for name in names:
            found[name] += [spent[name] / NUM_STEPS] if number else []
    return {
        "cpu_s": {name: statistics.median(seconds) for name, seconds in found.items()},
        "fastest_cpu_s": {name: min(seconds) for name, seconds in found.items()},
        "over_authors": {name: _ratios(found[name], found[AUTHORS]) for name in TRACKING},
    }


def _ratios(own: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    ratios = sorted(mine / other for mine, other in zip(own, theirs, strict=True))
    quarter = len(ratios) // 4
    return {
        "median": statistics.median(ratios),
        "lower_quartile": ratios[quarter],
        "upper_quartile": ratios[-1 - quarter],
        "min": ratios[0],
        "max": ratios[-1],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, measures, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--rounds", type=int, default=25, help="of four iterations each")
    parser.add_argument("--output", type=Path, help="file for the JSON; standard output without")
    given = parser.parse_args(arguments)
    results = {name: measure(SIZES[name], given.rounds) for name in given.sizes}
    write_document("against_authors", {"rounds": given.rounds, "results": results}, given.output)


if __name__ == "__main__":
    main()
