"""Memory of the processes beside the roles: the text encoder's and the validator's.

    text       the text encoder, in the type of `model.encoder_dtype`
    validator  the generator in float32, a teacher of another model, text encoder and autoencoder

Weights alone: what a validation computes with comes and goes, and depends on the clips.
"""

from dataclasses import replace

from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import GENERATOR, TEACHER
from pipelines.planning.hardware import GB, Hardware
from pipelines.planning.networks import released_models
from pipelines.planning.plan import Plan
from pipelines.planning.workload import Workload
from sgmd_core.errors import ModelFolderError
from workers.models.exporting import DTYPES
from workers.models.families import family_of
from workers.models.folder import EncoderSizes

TEXT, VALIDATOR = "text", "validator"
"""Sections of `topology`."""
_FLOAT = 4


def with_memory_beside(plan: Plan, config: DistillConfig, model: str | None) -> Plan:
    """The plan with the bytes of the processes beside its roles, where their sizes are known.

    Args:
        plan: A plan.
        config: Its recipe.
        model: Name of a released model; None reads the recipe's model folder.
    """
    sizes = _encoder_sizes(config, model)
    if sizes is None:
        return plan
    needed = bytes_beside(config, plan.work, sizes, plan.work.shape.num_parameters)
    return replace(
        plan, memory_beside={name: needed[name] for name in plan.beside if name in needed}
    )


def bytes_beside(
    config: DistillConfig, work: Workload, sizes: EncoderSizes, denoiser: int
) -> dict[str, float]:
    """Bytes by section of `topology`; without validations none of a validator.

    Args:
        config: The recipe.
        work: Its iteration.
        sizes: Parameters of the encoders.
        denoiser: Parameters of the generator's network.
    """
    width = DTYPES[config.model.encoder_dtype].itemsize
    needed: dict[str, float] = {TEXT: width * sizes.text}
    if config.validation.every:
        base = float(_FLOAT * denoiser)
        if config.generator.lora is not None:
            # In one process with the roles, their base is the validator's too.
            base = 0.0 if config.topology.mode == "local" else work.frozen_bytes(GENERATOR)
        teacher = work.shape_of(TEACHER).num_parameters if config.teacher.model else 0
        needed[VALIDATOR] = base + _FLOAT * teacher + width * (sizes.text + sizes.autoencoder)
    return needed


def too_large_beside(plan: Plan, hardware: Hardware) -> list[str]:
    """Returns a sentence for processes beside the roles that their GPU does not hold."""
    usable, needs = hardware.usable_bytes, plan.memory_beside
    groups = [(section,) for section, needed in needs.items() if needed > usable]
    if not groups and sum(plan.beside.values()) <= 1 and sum(needs.values()) > usable:
        # Shares of one GPU.
        groups = [tuple(needs)]
    return [
        f"{' and '.join(group)} {'do' if len(group) > 1 else 'does'} not fit: weights take "
        f"{sum(needs[section] for section in group) / GB:.1f} GB, and a GPU of "
        f"{hardware.memory_gb:g} GB has {usable / GB:.1f} for them; give each a GPU that holds it, "
        f"or {' '.join(f'topology.{section}.gpus=0' for section in group)}, on CPUs"
        for group in groups
    ]


def handed_over(plan: Plan, config: DistillConfig) -> list[str]:
    """Returns a sentence about the weights that a validation is handed."""
    if not config.validation.every or config.topology.mode == "local":
        return []
    sent = _FLOAT * plan.work.num_trained(GENERATOR)
    return [
        f"each validation is handed {sent / GB:.3g} GB of weights through the object store, about "
        f"{sent / plan.hardware.wire_bandwidth:.2g} s; they are not in the seconds of an iteration"
    ]


def _encoder_sizes(config: DistillConfig, model: str | None) -> EncoderSizes | None:
    if model is not None:
        return released_models()[model.lower()].encoders
    folder = config.model_folder
    try:
        found = family_of(folder).inspect(folder)
    except ModelFolderError:
        # A plan takes the shapes from configurations; the weights may be elsewhere.
        return None
    return found.encoder_sizes
