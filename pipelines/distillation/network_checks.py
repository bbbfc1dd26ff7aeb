"""Checks of a run's networks before it starts: their folders, sizes of clips, and settings."""

from collections.abc import Mapping

import torch

from pipelines.config.adapters import adapted_roles
from pipelines.config.clip_sizes import require_samplable, trained_shapes
from pipelines.config.model_folders import model_on_this_machine
from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, TEACHER
from pipelines.config.sequence import require_divisible
from pipelines.distillation.iteration_plan import stage_seconds
from pipelines.distillation.method_checks import (
    check_adversary,
    check_expert,
    check_phases,
    check_transition,
)
from sgmd_core.buckets import LatentBuckets
from sgmd_core.errors import ConfigError
from workers.adapters import targeted
from workers.attention import NATIVE, require_kernel
from workers.models.families import family_of
from workers.models.family import ModelFamily
from workers.models.folder import ModelFolder
from workers.network_settings import ComputeSettings

_COMPUTE = "Correct {}.compute"
_REMEDIES = {"lora": "Correct {}.lora", "joint": "Set {}.walk=apart"}
"""Remedies for what a family does not compute, other than a change of `compute`."""


def inspect_networks(config: DistillConfig) -> tuple[ModelFolder, LatentBuckets]:
    """Checks a run's model folder, and that it fits the run.

    Returns:
        The folder, and the shapes of the latents of one sample that are trained.

    Raises:
        SgmdError: The folder is not whole, or does not fit the clips, adapters or precision.
    """
    family = family_of(config.model_folder)
    families = families_of_roles(config)
    require_computable(config, families)
    require_adaptable(config)
    model = family.inspect(config.model_folder)
    check_expert(config)
    check_transition(config, model)
    check_phases(config, model)
    buckets = trained_shapes(config.video, model.latent_shape)
    for role, place in config.models_of_roles.items():
        folder = model_on_this_machine(place)
        shape = family_of(folder).read_shape(folder).denoiser
        for latent_shape in buckets.shapes:
            require_divisible(role, config.computes[role].ulysses, shape, latent_shape)
    require_samplable(config.video, family.traits.sampling)
    check_adversary(config)
    if config.topology.shares_pools:
        stage_seconds(config)
    return model, buckets


def families_of_roles(config: DistillConfig) -> dict[str, ModelFamily]:
    """Family of each role's model; a discriminator looks through a copy of the teacher."""
    models = config.models_of_roles
    return {
        role: family_of(model_on_this_machine(models[TEACHER if role == DISCRIMINATOR else role]))
        for role in config.roles
    }


def require_computable(config: DistillConfig, families: Mapping[str, ModelFamily]) -> None:
    """Checks that each role's denoiser can be computed as the role wants it.

    Args:
        config: The run.
        families: Family of each role's model.

    Raises:
        ConfigError: A setting of `compute` is one that the family does not support.
    """
    for role, family in families.items():
        compute: ComputeSettings = getattr(config, role).compute
        wanted = {
            "bf16": "bf16" in (compute.precision, compute.weights),
            "checkpointing": bool(compute.checkpointing),
            "selective": compute.checkpointing == "selective",
            "offload": compute.checkpointing == "offload",
            "compile": compute.compile,
            "fp8": compute.weights == "fp8",
            "attention": compute.attention != NATIVE,
            "ulysses": compute.ulysses > 1,
            "lora": role in adapted_roles(config),
            "joint": role == FAKE_SCORE and config.fake_score.walk == "joint",
        }
        lacking = [name for name in wanted if wanted[name] and name not in family.traits.computes]
        if lacking:
            raise ConfigError(
                f"preparing the {role.replace('_', ' ')} of the family {family.name}",
                f"{role} asks for {' and '.join(lacking)}",
                f"settings that the family supports: {', '.join(sorted(family.traits.computes))}"
                + (f"; {family.traits.limits}" if family.traits.limits else ""),
                (_REMEDIES.get(lacking[0], _COMPUTE) if len(lacking) == 1 else _COMPUTE).format(
                    role
                ),
            )
        if config.topology.mode == "local":
            # Other machines may have other libraries: there each process looks before it reads.
            require_kernel(compute.attention, "cuda" if torch.cuda.is_available() else "cpu")


def require_adaptable(config: DistillConfig) -> None:
    """Checks that the layers of each role's model have the projections of its adapters.

    Raises:
        ConfigError: A target of `lora` is not one of them.
    """
    models = config.models_of_roles
    for role in adapted_roles(config):
        folder = model_on_this_machine(models[role])
        projections = family_of(folder).read_shape(folder).denoiser.projections
        targeted(list(projections), getattr(config, role).lora.targets)
