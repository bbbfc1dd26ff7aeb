"""Networks of the roles: loaded from a model folder, prepared, sharded, with adapters."""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from workers.adapters import add_adapters
from workers.allocator import keep_freed_memory
from workers.attention import require_kernel
from workers.base_networks import joined_bases, shared_base, view_of
from workers.compute import prepare_network
from workers.models.addresses import local_model
from workers.models.experts import ExpertDenoiser
from workers.models.exporting import DTYPES
from workers.models.families import family_of, family_of_expert
from workers.models.family import Autoencoder, Denoiser, TextEmbedder
from workers.network_settings import ComputeSettings, LoraSettings
from workers.settings import GeneratorSettings, ModelSettings
from workers.sharding import shard


def sampled_networks(
    model: ModelSettings,
    generator: GeneratorSettings | None,
    teacher: str | None,
    dtype: torch.dtype,
) -> tuple[Denoiser, Denoiser | None]:
    """Networks of an evaluator.

    Args:
        model: Folder of the generator's model.
        generator: Settings of the generator whose weights are sampled; None: the folder's own are.
        teacher: Model folder of a teacher of another size.
        dtype: Type of the weights.

    Returns:
        The network that has the base's weights, and the one that takes trained weights if it is
        another.
    """
    adapted = None
    if generator is None or generator.lora is None:
        network = _denoiser(model, dtype)
        _train_alone(network, model)
    else:
        base = adapter_base(model, generator.compute, whole=True)
        network, adapted = view_of(base), view_of(base)
        _train_alone(adapted, model)
        # Their draws do not matter: the trained ones take their place.
        add_adapters(adapted, generator.lora, 0, "evaluator")
    if teacher is not None:
        adapted = adapted or network
        network = _denoiser(replace(model, folder=teacher), dtype)
    return network, adapted


def _denoiser(model: ModelSettings, dtype: torch.dtype = torch.float32) -> Denoiser:
    folder = local_model(model.folder)
    return family_of(folder).load_denoiser(folder, dtype, device=process_device())


def _train_alone(network: Denoiser, model: ModelSettings) -> None:
    """Of a network with two experts, freezes the one that a run does not train."""
    if model.alone is not None:
        assert isinstance(network, ExpertDenoiser)
        network.train_alone(model.alone)


def role_network(
    model: ModelSettings,
    compute: ComputeSettings,
    *,
    sharded: bool = True,
    rolls_out: bool = False,
) -> Denoiser:
    """A role's network with all its weights, computed as the settings say, over the role's ranks.

    Args:
        model: Its folder, and the expert that it is.
        compute: Settings of its computation.
        sharded: Whether the ranks share it.
        rolls_out: Whether rollouts of it begin at pure noise, at which the low-noise expert alone
            cannot begin: it gets the other one, frozen, in the type of its products.
    """
    require_kernel(compute.attention, process_device().type)
    in_fp8 = compute.weights == "fp8"

    def prepare(denoiser: Denoiser) -> None:
        prepare_network(denoiser, compute)
        if sharded:
            dtype = denoiser.autocast_dtype
            shard(denoiser, denoiser.blocks, device=process_device().type, dtype=dtype, frozen=True)

    folder = local_model(model.folder)
    dtype = torch.bfloat16 if in_fp8 else DTYPES[compute.weights]
    companion = None
    if rolls_out:
        companion = DTYPES[compute.precision] if model.alone == "low" else None
    family = family_of_expert(folder, model.alone, companion)
    denoiser = family.load_denoiser(folder, dtype, device=process_device(), prepare=prepare)
    if in_fp8:
        denoiser.store_in_fp8()
    keep_freed_memory(process_device())
    return denoiser


def learning_network(
    model: ModelSettings,
    compute: ComputeSettings,
    lora: LoraSettings | None,
    seed: int,
    role: str,
    *,
    rolls_out: bool = False,
) -> Denoiser:
    """The network of a learning role: its own weights, or adapters over a base.

    Args:
        model: Its folder, and the expert that it is.
        compute: Settings of its computation.
        lora: The adapters; None: all weights learn.
        seed: Seed of the adapters' first values.
        role: Name of the role, by which these values are drawn.
        rolls_out: As in `role_network`.
    """
    if lora is None:
        return role_network(model, compute, rolls_out=rolls_out)
    require_kernel(compute.attention, process_device().type)
    network = view_of(adapter_base(model, compute, whole=rolls_out and model.alone == "low"))
    if rolls_out:
        _train_alone(network, model)
    add_adapters(network, lora, seed, role)
    prepare_network(network, compute)
    shard(network, network.trained_blocks, dtype=network.autocast_dtype)
    keep_freed_memory(process_device())
    return network


def adapter_base(
    model: ModelSettings, compute: ComputeSettings, *, whole: bool = False
) -> Denoiser:
    """The base of a role's adapters; `whole` has both experts where the roles have one alone."""
    base = partial(
        shared_base, local_model(model.folder), DTYPES[compute.weights], process_device()
    )
    if whole and model.alone is not None:
        return joined_bases(base("high"), base("low"))
    return base(model.alone)


def caption_embedder(model: ModelSettings) -> TextEmbedder:
    """The text encoder of a model folder, on the device of this process."""
    folder = local_model(model.folder)
    captions = family_of(folder).load_text(folder, DTYPES[model.encoder_dtype])
    nn.Module.to(captions.network, process_device())
    return captions


def loaded_autoencoder(model: ModelSettings) -> Autoencoder:
    """The autoencoder of a model folder, on the device of this process."""
    folder = local_model(model.folder)
    autoencoder = family_of(folder).load_autoencoder(folder, DTYPES[model.encoder_dtype])
    nn.Module.to(autoencoder.network, process_device())
    return autoencoder


def process_device() -> torch.device:
    """The GPU that the process was given, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
