"""CPU seconds of one iteration by part: ours in both tracking modes, and the authors' beside them.

    python benchmarks/iteration_parts.py --output iteration_parts.json

Runs the iterations of `against_authors.py` with a clock around the functions of each part. What a
part calls of another one counts there alone, and `rest` is what no clock is around: calls of the
roles, Euler steps, records and their checks, and the clocks.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import one_process
import torch
from against_authors import AUTHORS, AuthorsStand
from authors_iteration import Network
from diffusers import WanTransformer3DModel
from documents import write_document
from one_process import NUM_STEPS, SIZES, TRACKING, Iterations, Size
from torch import nn

import workers.finite
from sgmd_core.objectives.sgmd import SgmdObjective
from workers.ema import AveragedWeights
from workers.optimizer import RoleOptimizer

PARTS: dict[str, Sequence[tuple[Any, str]]] = {
    "networks, forward": [(WanTransformer3DModel, "forward")],
    "networks, backward": [(torch.autograd, "backward"), (torch.autograd, "grad")],
    "losses": [(SgmdObjective, "generator_loss"), (SgmdObjective, "tracking_loss")],
    "gradient norm": [(RoleOptimizer, "gradient_report"), (nn.utils, "clip_grad_norm_")],
    "update": [(RoleOptimizer, "step"), (Network, "step")],
    "dropped gradients": [(Network, "zero_grad")],
    "averaged weights": [(AveragedWeights, "update")],
    "finite numbers": [(workers.finite, "require_finite")],
    "draws": [(one_process, "draw")],
}
"""Functions of each part, by where they are looked up."""
_REST = "rest"


class Clocks:
    """CPU nanoseconds by part, each without those of the parts inside it."""

    def __init__(self) -> None:
        self.spent = defaultdict[str, int](int)
        self._open: list[str] = []
        self._since = 0

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, with a clock around it."""

        def timed(*args: Any, **keywords: Any) -> Any:  # noqa: ANN401 - those of the function
            self._turn()
            self._open.append(part)
            try:
                return function(*args, **keywords)
            finally:
                self._turn()
                self._open.pop()

        return timed

    def _turn(self) -> None:
        """Ends the time of the part that is open, and begins that of the next one."""
        now = time.process_time_ns()
        if self._open:
            self.spent[self._open[-1]] += now - self._since
        self._since = now


def measure(size: Size, rounds: int, clocks: Clocks) -> dict[str, dict[str, float]]:
    """Median CPU seconds of an iteration by stand and part; the first round warms up."""
    torch.set_num_threads(1)
    stands: dict[str, Callable[[int], None]] = {AUTHORS: AuthorsStand(size).run}
    stands |= {tracking: Iterations(tracking, size).run for tracking in TRACKING}
    stands = {name: clocks.around(_REST, run) for name, run in stands.items()}
    found: dict[str, list[dict[str, int]]] = {name: [] for name in stands}
    for number in range(rounds + 1):
        made = {name: defaultdict[str, int](int) for name in stands}
        for place in range(NUM_STEPS):
            for name, run in stands.items():
                clocks.spent.clear()
                run(number * NUM_STEPS + place)
                for part, spent in clocks.spent.items():
                    made[name][part] += spent
        for name in stands:
            found[name] += [made[name]] if number else []
    return {
        name: {
            part: statistics.median(one.get(part, 0) for one in each) / NUM_STEPS / 1e9
            for part in (*PARTS, _REST)
            if any(part in one for one in each)
        }
        for name, each in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, measures, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--rounds", type=int, default=12, help="of four iterations each")
    parser.add_argument("--output", type=Path, help="file for the JSON; standard output without")
    given = parser.parse_args(arguments)
    clocks = Clocks()
    for part, functions in PARTS.items():
        for owner, name in functions:
            setattr(owner, name, clocks.around(part, getattr(owner, name)))
    results = {name: measure(SIZES[name], given.rounds, clocks) for name in given.sizes}
    write_document("iteration_parts", {"rounds": given.rounds, "results": results}, given.output)


if __name__ == "__main__":
    main()
