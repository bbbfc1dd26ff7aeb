"""Tables of the study in closed-form worlds: one a world for readers, one a seed for programs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipelines.config.gaussian_study import GaussianStudyConfig, MixtureSettings
from pipelines.study.gaussians.measuring import ENERGY, FIGURES, LOST_MODES, ON_MODE, SPREAD
from pipelines.study.gaussians.results import CellResult
from pipelines.study.results import spread
from pipelines.study.tables import csv_table, markdown_table, plus_minus
from sgmd_core.metrics.paired import mean_difference, paired_differences

_HEADINGS = (
    "variant",
    "rates",
    "iterations",
    "energy",
    "median",
    "− baseline (95 %)",
    "lost modes",
    "on mode",
    "spread",
)


@dataclass(frozen=True, slots=True)
class GaussianResults:
    """All cells of a study.

    Attributes:
        config: The recipe.
        cells: World by world, in the recipe's order.
        floors: By world, the figures of the truth's other samples, one value a seed.
    """

    config: GaussianStudyConfig
    cells: tuple[CellResult, ...]
    floors: Mapping[str, Mapping[str, Sequence[float]]]

    def of(self, world: str) -> list[CellResult]:
        """The cells of a world."""
        return [cell for cell in self.cells if cell.world == world]

    def cell(self, world: str, variant: str) -> CellResult:
        """Result of a variant in a world; a variant that was not run there is a StopIteration."""
        return next(cell for cell in self.of(world) if cell.variant == variant)

    def to_json(self) -> dict[str, Any]:
        """As results.json holds it."""
        return {
            "config": self.config.model_dump(mode="json"),
            "cells": [cell.to_json() for cell in self.cells],
            "floors": {name: dict(figures) for name, figures in self.floors.items()},
        }


def gaussian_rows(results: GaussianResults, world: str) -> list[list[str]]:
    """Headings, the floor, and a row a variant."""
    floor = results.floors[world]
    rows = [list(_HEADINGS), ["truth, other samples", "", "", *_cells(floor, "")]]
    baseline = results.cell(world, results.config.baseline)
    for cell in results.of(world):
        rates = f"{cell.rates[0]:g} / {cell.rates[1]:g}"
        name = cell.variant + (f" ({cell.num_broken} broken)" if cell.num_broken else "")
        against = "" if cell is baseline else _difference(cell, baseline)
        rows.append([name, rates, f"{cell.end.iteration:,}", *_cells(cell.end.figures, against)])
    return rows


def gaussian_markdown(results: GaussianResults) -> str:
    """One table a world."""
    config = results.config
    parts = [
        f"{config.num_seeds} seeds, the same for all variants; batch {config.batch_size}; learning "
        f"rates (generator / fake score) by one search of {len(config.search.generator_rates)} x "
        f"{len(config.search.fake_rates)} pairs on {config.search.num_seeds} other seeds. Means ± "
        "standard deviation over seeds, and the median of the energy distance; its difference to "
        f"`{config.baseline}` is taken seed by seed, with its 95 % bootstrap interval.\n"
    ]
    for name, world in config.worlds.items():
        head, *rows = gaussian_rows(results, name)
        parts.append(f"## {name}\n\n{world_words(world)}\n\n{markdown_table(head, rows)}\n")
    return "\n".join(parts)


def world_words(world: MixtureSettings) -> str:
    """A world in a sentence."""
    modes = "one Gaussian" if world.modes == 1 else f"{world.modes} Gaussians"
    where = "at the origin" if world.modes == 1 else f"at {world.radius:g} from the origin"
    steps = "one step" if world.num_steps == 1 else f"{world.num_steps} steps"
    return (
        f"{modes} of spread {world.spread:g} {where}, {world.dim} dimensions; generator of "
        f"{steps}; {world.forwards:,.0f} forwards a run."
    )


def gaussian_csv(results: GaussianResults) -> str:
    """One row a world, variant, measured place and seed."""
    rows: list[Sequence[object]] = [("world", "variant", "seed", "iteration", "forwards", *FIGURES)]
    for cell in results.cells:
        for point in cell.points:
            for seed in range(results.config.num_seeds):
                values = (f"{point.figures[name][seed]:.6g}" for name in FIGURES)
                forwards = f"{point.forwards:g}"
                rows.append((cell.world, cell.variant, seed, point.iteration, forwards, *values))
    return csv_table(rows)


def _cells(figures: Mapping[str, Sequence[float]], against: str) -> list[str]:
    return [
        _mean(figures[ENERGY], 4),
        _median(figures[ENERGY]),
        against,
        _mean(figures[LOST_MODES], 2),
        _mean(figures[ON_MODE], 3),
        _mean(figures[SPREAD], 3),
    ]


def _median(values: Sequence[float]) -> str:
    """One seed that broke moves it little; one that is not finite is worse than any other."""
    found = median(value if math.isfinite(value) else math.inf for value in values)
    return f"{found:.4f}" if math.isfinite(found) else "not finite"


def _mean(values: Sequence[float], decimals: int) -> str:
    found = spread(values)
    return "not finite" if found is None else plus_minus(found, decimals)


def _difference(cell: CellResult, baseline: CellResult) -> str:
    pairs = paired_differences(cell.end.figures[ENERGY], baseline.end.figures[ENERGY])
    found = mean_difference(pairs)
    if found is None:
        return ""
    return f"{found.value:+.4f} ({found.low:+.4f}, {found.high:+.4f})"
