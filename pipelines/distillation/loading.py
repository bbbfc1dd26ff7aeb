"""Learning roles put back to the state in a checkpoint."""

from cluster.worker_group import WorkerGroup
from pipelines.config.recipe import DistillConfig
from pipelines.distillation.iteration import Roles
from workers.generator_learner import GeneratorLearner
from workers.saving import LearningRole


def load_generator(
    generator: WorkerGroup[GeneratorLearner], folder: str, config: DistillConfig
) -> None:
    """Puts the generator alone back to the state in a checkpoint.

    Args:
        generator: Its group.
        folder: The checkpoint.
        config: Settings of the run.
    """
    loaded = generator.call(GeneratorLearner.load, folder)
    generator.fetch(loaded, config.topology.call_timeout_s, "loading the generator")


def load_roles(roles: Roles, folder: str, config: DistillConfig) -> None:
    """Puts the learning roles back to the state in a checkpoint.

    Args:
        roles: The groups.
        folder: The checkpoint.
        config: Settings of the run.
    """
    timeout_s = config.topology.call_timeout_s
    # Side by side: each reads files of its own.
    loading = [(group, group.call(LearningRole.load, folder)) for group in roles.learners.values()]
    for group, loaded in loading:
        group.fetch(loaded, timeout_s, f"loading the {group.name.replace('_', ' ')}")
