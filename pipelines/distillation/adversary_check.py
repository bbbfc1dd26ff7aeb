"""Check of what a discriminator needs of the teacher before a process is taken.

The heads stand on one denoiser's layers, so a teacher of two experts has no place for them.
"""

from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import DISCRIMINATOR
from sgmd_core.errors import ConfigError
from workers.models.families import family_of


def check_adversary(config: DistillConfig) -> None:
    """Checks that a teacher has the layers whose outputs a discriminator looks at.

    Args:
        config: The run.

    Raises:
        ConfigError: It lacks a layer, or has two experts.
        ModelFolderError: The teacher's folder is missing, torn or of another kind.
    """
    if DISCRIMINATOR not in config.roles:
        return
    folder = config.teacher_folder
    attempted = f"placing the discriminator's heads on the teacher of {folder}"
    family = family_of(folder)
    denoisers = family.inspect(folder).layout.denoisers
    if len(denoisers) > 1:
        raise ConfigError(
            attempted,
            f"{len(denoisers)} denoisers, one for each range of noise levels",
            "one denoiser, whose layers see every noise level",
            f"Choose another method than {config.objective.method}, or leave its adversary out",
        )
    num_layers = family.read_shape(folder).denoiser.num_layers
    wanted = config.discriminator.layers_of(num_layers)
    if max(wanted) > num_layers:
        raise ConfigError(
            attempted,
            f"discriminator.layers names layer {max(wanted)}",
            f"layers from 1 to {num_layers}",
            "Correct discriminator.layers, or set it to [] for every third layer",
        )
