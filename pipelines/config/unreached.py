"""Parts of a method, and learning rates, that a run ends before.

A short run to try a recipe is right, so it is warned of and not refused. What it exports looks like
the method's result, and is not.
"""

import logging
from collections.abc import Iterator

from pipelines.config.recipe_sections import RecipeSections
from sgmd_core.objectives import WarmingObjective
from sgmd_core.objectives.consistency import consistency_of, learns_from_samples
from sgmd_core.phases import Phases


def warn_of_unreached(run: RecipeSections, who: str, log: logging.Logger) -> None:
    """Warns of each part that runs are too short for.

    Args:
        run: One of them.
        who: Names them.
        log: Takes the warnings.
    """
    for sentence in unreached_parts(run):
        log.warning("%s: %s", who, sentence)


def unreached_parts(run: RecipeSections) -> Iterator[str]:
    """Returns a sentence for each part of a method, and each rate, that a run is too short for."""
    objective, iterations = run.objective, run.iterations
    yield from _unreached_rates(run)
    if run.phases is not None:
        yield from _untrained_expert(run.phases, iterations)
    term = consistency_of(objective)
    if term is not None and iterations <= term.warmup:
        ends = (
            "the matching on own samples never begins"
            if learns_from_samples(objective)
            else "the tangent never counts in full"
        )
        yield (
            f"iterations {iterations} end within the tangent warm-up "
            f"(objective.consistency.warmup {term.warmup}), so {ends}; set "
            f"objective.consistency.warmup below {iterations}, or more iterations"
        )
    if isinstance(objective, WarmingObjective):
        yield from objective.unreached(iterations)


def _unreached_rates(run: RecipeSections) -> Iterator[str]:
    """Warm-ups that are not over when the run is."""
    of_fake_score = run.iterations * max(1, run.fresh_updates)
    for role, own, updates in (
        ("generator", run.generator.optimizer, run.iterations),
        ("fake_score", run.fake_score.optimizer, of_fake_score),
    ):
        if updates < own.warmup_iterations:
            reached = own.lr * updates / own.warmup_iterations
            yield (
                f"iterations {run.iterations} end within {role}.optimizer.warmup_iterations "
                f"{own.warmup_iterations}, so the learning rate never exceeds {reached:.3g} of "
                f"{own.lr:g}; set a shorter warm-up, or more iterations"
            )


def _untrained_expert(phases: Phases, iterations: int) -> Iterator[str]:
    in_turns = phases.order == "alternate"
    before = 1 if in_turns else phases.high_iterations
    if iterations > before:
        return
    phase = "objective.order alternate" if in_turns else f"objective.high_iterations {before}"
    yield (
        f"iterations {iterations} end before the low phase begins ({phase}): the low-noise expert "
        "is never trained, and is sampled and exported as it is; set iterations above "
        f"{before}" + ("" if in_turns else ", or fewer high_iterations")
    )
