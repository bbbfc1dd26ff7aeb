"""One expert of two in a recipe: the iterations that it has, and what does not go with it."""

from collections.abc import Iterator

from pipelines.config.recipe_sections import RecipeSections
from sgmd_core.errors import ConfigError
from sgmd_core.objectives import adversary_of, looks_of, phases_of
from sgmd_core.objectives.consistency import consistency_of, learns_from_samples
from sgmd_core.objectives.meanflow import flow_of
from sgmd_core.phases import Phases, expert_phases


def expert_contradictions(config: RecipeSections) -> Iterator[str]:
    """Sentences on what does not go with one expert that is trained alone."""
    expert, method = config.model.alone, config.objective.method
    if expert is None:
        return
    setting = f"model.expert {expert} trains one range of noise levels, and"
    remedy = "set model.expert=both"
    schedule, generator, objective = config.schedule, config.generator, config.objective
    looks = looks_of(objective, config.teacher.guidance_scale)
    wanted = {
        "has phases of its own, which train one expert after the other": (
            phases_of(objective, schedule, generator.num_steps) is not None
        ),
        "looks at noise levels of the other one, too": (
            looks.splits_guidance or looks.off_trajectory
        ),
        "learns from latents of the data at all of them": (
            consistency_of(objective) is not None
            or flow_of(objective) is not None
            or not learns_from_samples(objective)
        ),
        "has a discriminator, which looks at all of them": adversary_of(objective) is not None,
    }
    for words in (words for words, holds in wanted.items() if holds):
        yield f"{setting} objective.method {method} {words}; {remedy}"
    if generator.random_steps is not None:
        yield (
            f"{setting} generator.random_steps draws levels of both; set "
            "generator.random_steps=null"
        )
    if schedule.score_window != "none":
        yield (
            f"{setting} schedule.score_window {schedule.score_window} reaches over its end; set "
            "schedule.score_window=none"
        )
    try:
        phases = expert_phases(schedule, generator.num_steps, config.model.boundary, expert)
    except ConfigError as error:
        yield f"{error.found}; {error.remedy}"
        return
    yield from _diversity_contradictions(config, phases, setting)


def _diversity_contradictions(
    config: RecipeSections, phases: Phases, setting: str
) -> Iterator[str]:
    diversity = config.generator.diversity
    if not diversity.enabled:
        return
    if config.model.alone == "low":
        yield (
            f"{setting} generator.diversity trains the first step, which is the high-noise "
            "expert's; set generator.diversity.weight=0"
        )
        return
    path = config.schedule.few_step_grid(diversity.teacher_steps)[: diversity.anchor_step]
    if float(path[-1]) < config.model.boundary:
        yield (
            f"{setting} step {diversity.anchor_step} of the teacher's path for "
            f"generator.diversity starts at {float(path[-1]):.4g}, below model.boundary "
            f"{config.model.boundary:g}; lower generator.diversity.anchor_step"
        )
    if diversity.first_exit >= phases.high.end:
        yield (
            f"{setting} generator.diversity leaves it no other step than the first; set "
            "generator.diversity.weight=0"
        )
