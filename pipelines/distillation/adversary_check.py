"""Check of what a discriminator needs of the teacher before a process is taken.

The heads stand on one denoiser's layers, so a teacher of two experts has no place for them.
"""

from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import DISCRIMINATOR
from sgmd_core.errors import ConfigError
from workers.models.families import family_of
from workers.models.folder import ModelFolder


def check_adversary(config: DistillConfig, model: ModelFolder) -> None:
    """Checks that a teacher has the layers whose outputs a discriminator looks at.

    Args:
        config: The run.
        model: The generator's model.

    Raises:
        ConfigError: It lacks a layer, or has two experts.
    """
    if DISCRIMINATOR not in config.roles:
        return
    folder = config.teacher_folder
    attempted = f"placing the discriminator's heads on the teacher of {folder}"
    if len(model.layout.denoisers) > 1:
        raise ConfigError(
            attempted,
            f"{len(model.layout.denoisers)} denoisers, one for each range of noise levels",
            "one denoiser, whose layers see every noise level",
            f"Choose another method than {config.objective.method}, or leave its adversary out",
        )
    num_layers = family_of(folder).read_shape(folder).denoiser.num_layers
    wanted = config.discriminator.layers_of(num_layers)
    if max(wanted) > num_layers:
        raise ConfigError(
            attempted,
            f"discriminator.layers names layer {max(wanted)}",
            f"layers from 1 to {num_layers}",
            "Correct discriminator.layers, or set it to [] for every third layer",
        )
