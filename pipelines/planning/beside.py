"""Memory of the processes beside the roles: the text encoder's and the validator's.

    text       the text encoder, in the type of `model.encoder_dtype`
    validator  the generator and a teacher of another model, both in the type of its products, the
               autoencoder, and the larger of text encoder and a pass of the network: on a GPU the
               encoder is in main memory while clips are sampled, and so are the weights that the
               generator's replace, beside those that were handed over

Of the encoders' own passes nothing is counted. A process whose texts are all stored with the data
has no text encoder.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import GENERATOR, TEACHER
from pipelines.planning.hardware import GB, Hardware
from pipelines.planning.kept_bytes import frozen_bytes
from pipelines.planning.networks import released_models
from pipelines.planning.plan import Plan
from pipelines.planning.stored_text import (
    ENCODING,
    TEXT,
    VALIDATOR,
    encoding_sections,
    lacks_prompts_alone,
    unseen_sets,
)
from pipelines.planning.workload import Workload
from sgmd_core.errors import ConfigError, ModelFolderError
from workers.evaluator import CHUNK_CLIPS, clips_side_by_side
from workers.models.exporting import DTYPES
from workers.models.families import family_of
from workers.models.folder import EncoderSizes

WITHOUT_VALIDATIONS = "validation.every=0, and `sgmd evaluate RUN` after the run"
"""Remedy where a validator has no GPU: its passes are too many for a CPU at released sizes."""
_EMBEDDINGS = "stored embeddings (sgmd encode --text-only)"
_PROMPTS = "the prompts beside the stored embeddings (the same sgmd encode again, --negative)"
"""Remedies where a text process has no GPU."""


def with_memory_beside(
    plan: Plan, config: DistillConfig, model: str | None, *, at_addresses: bool = False
) -> Plan:
    """The plan with the bytes of the processes beside its roles, where their sizes are known.

    Args:
        plan: A plan.
        config: Its recipe.
        model: Name of a released model; None reads the recipe's model folder.
        at_addresses: Take it that sets at addresses bring their embeddings.
    """
    encoding = encoding_sections(config, at_addresses=at_addresses)
    sizes = _encoder_sizes(config, model, encoding)
    if sizes is None:
        return plan
    denoiser = plan.work.shape.num_parameters + plan.work.idle_expert
    needed = bytes_beside(config, plan.work, sizes, denoiser, encoding)
    return replace(
        plan, memory_beside={name: needed[name] for name in plan.beside if name in needed}
    )


def bytes_beside(
    config: DistillConfig,
    work: Workload,
    sizes: EncoderSizes,
    denoiser: int,
    encoding: Collection[str] = ENCODING,
) -> dict[str, float]:
    """Bytes by section of `topology`; without validations none of a validator.

    Args:
        config: The recipe.
        work: Its iteration.
        sizes: Parameters of the encoders.
        denoiser: Parameters of the generator's network.
        encoding: Sections whose processes load a text encoder.
    """
    width = DTYPES[config.model.encoder_dtype].itemsize
    needed: dict[str, float] = {TEXT: width * sizes.text if TEXT in encoding else 0.0}
    if config.validation.every:
        trained = _validated_width(config)
        base = float(trained * denoiser)
        if config.generator.lora is not None:
            # In one process with the roles, their base is the validator's too.
            idle = DTYPES[config.generator.compute.weights].itemsize * work.idle_expert
            base = 0.0 if config.topology.mode == "local" else frozen_bytes(work, GENERATOR) + idle
        teacher = work.idle_expert + work.shape_of(TEACHER).num_parameters
        teacher *= config.teacher.model is not None
        kept = base + trained * teacher + width * sizes.autoencoder
        text = width * sizes.text if VALIDATOR in encoding else 0
        in_turn = (text, _sampling_bytes(config, work))
        needed[VALIDATOR] = kept + (max if config.topology.validator.gpus else sum)(in_turn)
    return needed


def host_bytes_beside(
    config: DistillConfig, work: Workload, sizes: EncoderSizes, encoding: Collection[str] = ENCODING
) -> dict[str, float]:
    """Main memory by section of `topology`, besides the bytes where a process computes.

    Args:
        config: The recipe.
        work: Its iteration.
        sizes: Parameters of the encoders.
        encoding: Sections whose processes load a text encoder.
    """
    if not config.validation.every:
        return {}
    handed = _handed_bytes(config, work)
    if not config.topology.validator.gpus:
        return {VALIDATOR: handed}
    # While a GPU samples: what the handed weights replace is put aside, and the encoder is.
    text = DTYPES[config.model.encoder_dtype].itemsize * sizes.text if VALIDATOR in encoding else 0
    return {VALIDATOR: 2 * handed + text}


def check_beside(
    plan: Plan, config: DistillConfig, model: str | None, hardware: Hardware
) -> list[str]:
    """Refuses a plan whose processes beside the roles do not fit, whatever lies at addresses.

    Args:
        plan: With the bytes of these processes, where they are known.
        config: Its recipe.
        model: Name of a released model; None reads the recipe's model folder.
        hardware: GPUs that they get.

    Returns:
        A sentence where they fit if sets that were not looked at bring their embeddings.

    Raises:
        ConfigError: One does not fit; or several do not fit the GPU that they share.
    """
    remedy = _PROMPTS if lacks_prompts_alone(config) else _EMBEDDINGS
    try:
        require_fitting_beside(plan, hardware, remedy)
    except ConfigError as error:
        unseen = unseen_sets(config)
        if not unseen:
            raise
        least = with_memory_beside(plan, config, model, at_addresses=True)
        require_fitting_beside(least, hardware, remedy)
        return [
            f"{error.found} with a text encoder, {error.expected}; {' and '.join(unseen)} not "
            "looked at: it fits if embeddings of all captions and prompts are stored there "
            "(`sgmd encode`), which `sgmd distill ... --dry-run` tells"
        ]
    return []


def require_fitting_beside(plan: Plan, hardware: Hardware, stored: str = _EMBEDDINGS) -> None:
    """Refuses a plan with a process beside the roles that its GPU does not hold.

    Args:
        plan: With the bytes of these processes, where they are known.
        hardware: GPUs that they get.
        stored: What a run needs to have no text encoder.

    Raises:
        ConfigError: One does not fit; or several do not fit the GPU that they share.
    """
    usable, needs = hardware.usable_bytes, plan.memory_beside
    groups = [(section,) for section, needed in needs.items() if needed > usable]
    if not groups and sum(plan.beside.values()) <= 1 and sum(needs.values()) > usable:
        # Shares of one GPU.
        groups = [tuple(needs)]
    if not groups:
        return
    largest = max(sum(needs[section] for section in group) for group in groups)
    sections = [section for group in groups for section in group]
    shared = any(len(group) > 1 for group in groups)
    remedies = [
        " ".join(f"topology.{section}.gpus=1" for section in sections)
        if shared
        else f"a GPU of {math.ceil(_memory_gb(largest, hardware))} GB for {_joined(sections)}"
    ]
    if TEXT in sections:
        remedies.append(f"{stored} and topology.text.gpus=0")
    if VALIDATOR in sections:
        remedies.append(WITHOUT_VALIDATIONS)
    raise ConfigError(
        f"planning for GPUs of {hardware.memory_gb:g} GB",
        "; ".join(
            f"{_joined(group)} {'do' if len(group) > 1 else 'does'} not fit: "
            f"{sum(needs[section] for section in group) / GB:.1f} GB"
            for group in groups
        ),
        f"at most {usable / GB:.1f} GB on a GPU",
        f"It would fit with {'; or with '.join(remedies)}",
    )


def handed_over(plan: Plan, config: DistillConfig) -> list[str]:
    """Returns a sentence about the weights that a validation is handed."""
    if not config.validation.every or config.topology.mode == "local":
        return []
    sent = _handed_bytes(config, plan.work)
    return [
        f"each validation is handed {sent / GB:.3g} GB of weights through the object store, about "
        f"{sent / plan.hardware.wire_bandwidth:.2g} s; they are not in the seconds of an iteration"
    ]


def _handed_bytes(config: DistillConfig, work: Workload) -> float:
    """Weights that a validation is handed; adapters stay as they are trained."""
    adapted = config.generator.lora is not None
    return float((4 if adapted else _validated_width(config)) * work.num_trained(GENERATOR))


def _validated_width(config: DistillConfig) -> int:
    """Bytes of a weight that a validator holds: as `build_evaluator` loads them."""
    return DTYPES[config.generator.compute.precision].itemsize


def _sampling_bytes(config: DistillConfig, work: Workload) -> float:
    """A pass over the clips that are sampled side by side, with and without the caption."""
    latent_shape = _validated_shape(config, work)
    clips = clips_side_by_side(
        min(CHUNK_CLIPS, config.validation.num_captions), work.shape.num_tokens(latent_shape)
    )
    bf16 = config.generator.compute.precision == "bf16"
    passes = {GENERATOR: 1, TEACHER: 2 if work.guided else 1}
    return clips * max(
        passes[role] * work.shape_of(role).transient_bytes(latent_shape, bf16=bf16)
        for role in passes
    )


def _validated_shape(config: DistillConfig, work: Workload) -> tuple[int, int, int, int]:
    """Latents of a clip that is validated: of the sizes that are trained, that of `video` alone."""
    if work.buckets is None:
        return work.latent_shape
    sizes = [bucket.size for bucket in config.video.trained]
    return work.buckets.shapes[sizes.index(config.video.size)]


def _memory_gb(needed: float, hardware: Hardware) -> float:
    """GB of a GPU that has these bytes for a process."""
    return (needed / GB + hardware.reserve_gb) / (1 - hardware.spare_share)


def _joined(group: Sequence[str]) -> str:
    return " and ".join(group)


def _encoder_sizes(
    config: DistillConfig, model: str | None, encoding: Collection[str]
) -> EncoderSizes | None:
    """Parameters of the encoders; None where one that is loaded has no size here."""
    if model is not None:
        return released_models()[model.lower()].encoders
    folder = config.model_folder
    try:
        found = family_of(folder).inspect(folder)
    except ModelFolderError:
        # A plan takes the shapes from configurations; the weights may be elsewhere.
        return None
    decodes = bool(config.validation.every)
    if (encoding and not found.has_text_encoder) or (decodes and not found.has_autoencoder):
        # Of another machine, where the run may have it.
        return None
    return found.encoder_sizes
