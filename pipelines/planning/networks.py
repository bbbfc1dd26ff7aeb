"""Networks of a recipe's roles, as far as their costs go: read from configurations alone."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pipelines.config.adapters import adapted_roles
from pipelines.config.clip_sizes import trained_shapes
from pipelines.config.model_folders import model_on_this_machine
from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import GENERATOR
from sgmd_core.buckets import LatentBuckets
from sgmd_core.errors import ConfigError, ModelFolderError, ShapeError
from workers.adapters import targeted
from workers.models.configs import INDEX_FILE
from workers.models.families import families, family_of
from workers.models.family import ModelFamily
from workers.models.shape import DenoiserShape, ModelShape
from workers.models.wan_arithmetic import ExpertsShape


def released_models() -> dict[str, ModelShape]:
    """Shapes of the released models of all families, by name."""
    return {name: shape for family in families() for name, shape in family.traits.released.items()}


def model_shape(config: DistillConfig, model: str | None = None) -> ModelShape:
    """Returns the shape of the generator's model.

    Args:
        config: The recipe.
        model: Name of a released model of a family; None reads the recipe's model folder.

    Raises:
        ConfigError: There is no such shape or folder.
        ModelFolderError: The folder holds another kind of model.
    """
    found = _released(model) if model else _read(config.model_folder)
    if config.model.alone is None:
        return found
    if not isinstance(found.denoiser, ExpertsShape):
        raise ConfigError(
            "planning a run",
            f"model.expert {config.model.expert}, and a model of one denoiser",
            "a model of two experts by noise level",
            "Set model.expert=both, or name such a model",
        )
    return replace(found, denoiser=found.denoiser.expert)


def other_shapes(config: DistillConfig, own: DenoiserShape) -> dict[str, DenoiserShape]:
    """Returns the networks of the roles that start from another model than the generator."""
    models = config.models_of_roles
    shapes = {
        role: _read_or_known(model_on_this_machine(model)).denoiser
        for role, model in models.items()
        if model != models[GENERATOR]
    }
    if config.model.alone is not None:
        shapes = {
            role: shape.expert if isinstance(shape, ExpertsShape) else shape
            for role, shape in shapes.items()
        }
    return {role: shape for role, shape in shapes.items() if shape != own}


def latent_buckets_of(config: DistillConfig, shape: ModelShape) -> LatentBuckets:
    """Returns the shapes (C, T, H, W) of the latents of one clip that are trained.

    Raises:
        ConfigError: A size does not fit the networks.
    """
    try:
        return trained_shapes(config.video, shape.geometry.latent_shape)
    except ShapeError as error:
        raise ConfigError("planning a run", error.found, error.expected, error.remedy) from error


def adapter_parameters(
    config: DistillConfig, shape: DenoiserShape, others: Mapping[str, DenoiserShape]
) -> tuple[tuple[str, int], ...]:
    """Returns parameters of each role's adapters: A and B of the projections that it targets."""
    found: list[tuple[str, int]] = []
    for role in adapted_roles(config):
        lora, own = getattr(config, role).lora, others.get(role, shape)
        names = targeted(list(own.projections), lora.targets)
        widths = sum(sum(own.projections[name]) for name in names)
        found.append((role, own.num_layers * lora.rank * widths))
    return tuple(found)


def family_of_role(config: DistillConfig, role: str, model: str | None = None) -> ModelFamily:
    """Returns the family of a role's network.

    Args:
        config: The recipe.
        role: The role.
        model: As `model_shape` takes it.

    Raises:
        ModelFolderError: The role's folder is missing or of no family.
    """
    models = config.models_of_roles
    if model and models[role] == models[GENERATOR]:
        return next(one for one in families() if model.lower() in one.traits.released)
    folder = model_on_this_machine(models[role])
    return _family_on_hub(folder) or family_of(folder)


def _released(model: str) -> ModelShape:
    known = released_models()
    if model.lower() not in known:
        raise ConfigError("planning a run", f"a model called {model}", f"one of {', '.join(known)}")
    return known[model.lower()]


def _read_or_known(folder: Path) -> ModelShape:
    """Shape of another role's model: of one that is not here, by its name on the hub."""
    family = _family_on_hub(folder)
    if family is None:
        return _read(folder)
    return family.traits.released[family.traits.on_hub[folder.name]]


def _family_on_hub(folder: Path) -> ModelFamily | None:
    """Family of a model that is not here, by the name of its folder on the hub, if known."""
    if folder.exists():
        return None
    return next((one for one in families() if folder.name in one.traits.on_hub), None)


def _read(folder: Path) -> ModelShape:
    """Shape from a folder's configurations; its weights need not be there."""
    try:
        return family_of(folder).read_shape(folder)
    except ModelFolderError as error:
        names = " or ".join(released_models())
        if (folder / INDEX_FILE).exists():
            raise
        raise ConfigError(
            f"reading the shape of the networks in {folder}",
            f"{error.attempted}: {error.found}",
            "model_index.json and the configurations of a diffusers folder",
            f"{error.remedy}; or plan for a known shape: --model {names}",
        ) from error
