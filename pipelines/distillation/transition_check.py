"""Check that a method and its models agree on flow heads.

A transition samples its velocities. Teacher and fake score have to answer with means, so they are
models of the family that it was made of.
"""

from pipelines.config.recipe import DistillConfig
from sgmd_core.errors import ConfigError
from sgmd_core.objectives.meanflow import FlowObjective
from workers.models.families import family_named, family_of
from workers.models.folder import ModelFolder


def check_transition(config: DistillConfig, model: ModelFolder) -> None:
    """Check flow heads, before anything starts.

    Args:
        config: The run.
        model: The generator's model.

    Raises:
        ConfigError: The method trains a flow head and the model has none, or it has one and
            something beside it does not go with samples of velocities.
    """
    attempted = f"checking the flow head of {model.path}"
    teachers = sorted(family_named(model.family).traits.taught_by)
    if not teachers:
        if isinstance(config.objective, FlowObjective):
            raise ConfigError(
                attempted,
                f"a model of the family {model.family}, which has none",
                f"one for objective.method={config.objective.method}",
                f"`sgmd transition {model.path} DST --layers 1` makes a folder with one, for "
                "model.folder; name this one as teacher.model",
            )
        return
    teacher = family_of(config.teacher_folder).name
    rules = {
        f"the teacher, {config.teacher_folder}, is of the family {teacher}{_unset(config)}": (
            teacher not in teachers
        ),
        "fake_score.start is generator": config.fake_score.start == "generator",
        "generator.diversity follows the teacher's path": config.generator.diversity.enabled,
        "a loss looks off the trajectory": config.looks.off_trajectory,
        "phases have two experts": config.phases is not None,
    }
    if any(rules.values()):
        raise ConfigError(
            attempted,
            "; ".join(words for words, broken in rules.items() if broken),
            f"a teacher of the family {' or '.join(teachers)} that the fake score starts from, and "
            "losses at the ends of rollouts: velocities of this model are samples",
            "Set teacher.model to the model that the folder was made of, and "
            "fake_score.start=teacher; the recipe tiny-tmd is an example",
        )


def _unset(config: DistillConfig) -> str:
    return "" if config.teacher.model else " (teacher.model is null, so it is model.folder)"
