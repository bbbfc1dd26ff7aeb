"""The generator's steps in a recipe: what does not go with the levels or phases that they have."""

from sgmd_core.errors import ConfigError
from sgmd_core.objectives import Objective, phases_of
from sgmd_core.schedule import FlowMatchSchedule
from workers.settings import GeneratorSettings

_SCORE_SETTINGS = (
    "score_shift",
    "score_sigma_min",
    "score_sigma_max",
    "score_level_min",
    "score_level_max",
    "score_window",
    "score_law",
)
"""Settings of the score law, which has no part in training in phases."""


def step_contradictions(
    schedule: FlowMatchSchedule, generator: GeneratorSettings, objective: Objective
) -> list[str]:
    """Returns what does not go with the steps of a generator, as sentences.

    Args:
        schedule: Their noise levels.
        generator: Their number, and what trains them.
        objective: The method, which may train them in phases.
    """
    problems: list[str] = []
    window = schedule.score_window
    if generator.random_steps is not None and window != "none":
        problems.append(
            f"schedule.score_window {window} has no one window where generator.random_steps draws "
            "the levels of each sample; set schedule.score_window=none"
        )
    if schedule.renoise and generator.diversity.enabled:
        problems.append(
            "generator.diversity ties the first step to the teacher's velocity, and the steps of "
            "schedule.renoise go to clean latents; set one of them off"
        )
    if schedule.steps is not None and len(schedule.steps) != generator.num_steps:
        problems.append(
            f"schedule.steps has {len(schedule.steps)} levels, one for each step, but "
            f"generator.num_steps is {generator.num_steps}; set it to {len(schedule.steps)}"
        )
        return problems
    return problems + _phase_contradictions(schedule, generator, objective)


def _phase_contradictions(
    schedule: FlowMatchSchedule, generator: GeneratorSettings, objective: Objective
) -> list[str]:
    try:
        phases = phases_of(objective, schedule, generator.num_steps)
    except ConfigError as error:
        return [f"{error.found}; {error.remedy}"]
    if phases is None:
        return []
    method, problems = objective.method, list[str]()
    if generator.random_steps is not None:
        problems.append(
            f"generator.random_steps has no step at the boundary of {method}; set it to null"
        )
    if generator.diversity.enabled and phases.high.end == 1:
        problems.append(
            f"generator.diversity is all that trains the first step, which is the whole high phase "
            f"of {method} here; set generator.diversity.weight=0, or a lower objective.boundary"
        )
    if schedule.renoise:
        problems.append(
            f"schedule.renoise leads to clean latents, and the high phase of {method} ends before "
            "them; set schedule.renoise=false"
        )
    plain = FlowMatchSchedule()
    problems += [
        f"schedule.{name} {getattr(schedule, name)} has no part in the phases of {method}, which "
        "draw raw score levels between objective.first_level and last_level; set "
        f"schedule.{name}={'null' if getattr(plain, name) is None else getattr(plain, name)}"
        for name in _SCORE_SETTINGS
        if getattr(schedule, name) != getattr(plain, name)
    ]
    return problems
