"""Check that the models of a run have the expert that it trains alone."""

from pipelines.config.model_folders import model_on_this_machine, models_of_roles
from pipelines.config.recipe import DistillConfig
from sgmd_core.errors import ConfigError
from workers.models.configs import INDEX_FILE, read_model_json
from workers.models.families import family_of_expert


def check_expert(config: DistillConfig) -> None:
    """Check that every role's model has two experts, which change at the level of the recipe.

    Args:
        config: The run.

    Raises:
        ConfigError: They change at another level.
        ModelFolderError: A model has one denoiser, or its folder cannot be read.
    """
    model = config.model
    if model.alone is None:
        return
    for place in dict.fromkeys(models_of_roles(config).values()):
        folder = model_on_this_machine(place)
        family_of_expert(folder, model.alone).read_shape(folder)
        found = float(read_model_json(folder / INDEX_FILE)["boundary_ratio"])
        if found != model.boundary:
            raise ConfigError(
                f"checking the experts of {folder}",
                f"a boundary_ratio of {found:g}, and model.boundary is {model.boundary:g}",
                f"the {model.alone}-noise expert to have the noise levels that are trained",
                f"Set model.boundary={found:g}",
            )
