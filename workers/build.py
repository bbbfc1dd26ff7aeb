"""Makes each role from its settings: what a process of that role calls first.

Plain functions over frozen records, so that they can be sent to a process by name. Each sets the
number of torch threads, because a process that shares a machine must not take all of it, and puts
its networks on the GPU that the process was given, if any.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sgmd_core.buckets import LatentBuckets
from sgmd_core.objectives import Objective
from sgmd_core.schedule import FlowMatchSchedule
from workers.adapters import add_adapters
from workers.allocator import keep_freed_memory
from workers.attention import require_kernel
from workers.base_networks import joined_bases, shared_base, view_of
from workers.clip_settings import VideoSettings
from workers.compute import prepare_network
from workers.discriminator import Discriminator
from workers.discriminator_heads import build_heads
from workers.evaluator import CHUNK_CLIPS, Evaluator, clips_side_by_side
from workers.fake_score_tracker import FakeScoreTracker
from workers.finite import FiniteChecks
from workers.generator_learner import GeneratorLearner
from workers.generator_task import GeneratorTask
from workers.models.addresses import local_model
from workers.models.experts import ExpertDenoiser
from workers.models.exporting import DTYPES
from workers.models.families import family_of, family_of_expert
from workers.models.family import Autoencoder, Denoiser, TextEmbedder
from workers.network_settings import ComputeSettings, LoraSettings
from workers.score_teacher import ScoreTeacher
from workers.settings import (
    DiscriminatorSettings,
    FakeScoreSettings,
    GeneratorSettings,
    ModelSettings,
    TeacherSettings,
)
from workers.sharding import shard
from workers.text_encoder import TextEncoder
from workers.video_encoder import VideoEncoder


def build_generator(
    model: ModelSettings,
    video: VideoSettings,
    schedule: FlowMatchSchedule,
    settings: GeneratorSettings,
    seed: int,
    num_threads: int,
    raises: bool = True,
    task: GeneratorTask | None = None,
) -> GeneratorLearner:
    """The generator, starting from the teacher's weights.

    Args:
        model: The networks' folder.
        video: Sizes of the clips.
        schedule: Noise levels.
        settings: How it is updated and computed.
        seed: The run's seed.
        num_threads: Threads of torch.
        raises: As in `workers.finite.FiniteChecks`.
        task: Parts of the method that it computes beside the rollout.

    Raises:
        ModelFolderError: The model folder is missing, torn or of another family.
        ShapeError: The clips do not fit the networks.
    """
    torch.set_num_threads(num_threads)
    buckets = _latent_buckets(model, video)
    network = _learning(model, settings.compute, settings.lora, seed, "generator", rolls_out=True)
    checks = FiniteChecks(raises=raises)
    return GeneratorLearner(network, schedule, settings, buckets, seed, checks, task)


def build_fake_score(
    model: ModelSettings,
    objective: Objective,
    settings: FakeScoreSettings,
    num_threads: int,
    seed: int = 0,
    raises: bool = True,
) -> FakeScoreTracker:
    """The fake score, starting from the teacher's weights.

    Args:
        model: The networks' folder.
        objective: Both losses.
        settings: How it is tracked, updated and computed.
        num_threads: Threads of torch.
        seed: The run's seed, by which adapters are drawn.
        raises: As in `workers.finite.FiniteChecks`.

    Raises:
        ModelFolderError: The model folder is missing, torn or of another family.
    """
    torch.set_num_threads(num_threads)
    network = _learning(model, settings.compute, settings.lora, seed, "fake_score")
    return FakeScoreTracker(network, objective, settings, FiniteChecks(raises=raises))


def build_teacher(
    model: ModelSettings,
    settings: TeacherSettings,
    num_threads: int,
    shares_base: bool = False,
    raises: bool = True,
) -> ScoreTeacher:
    """The teacher.

    Args:
        model: The networks' folder.
        settings: How it is guided and computed.
        num_threads: Threads of torch.
        shares_base: Roles with adapters live in the same process, and the teacher is their base:
            its weights are kept once, whole on every rank.
        raises: As in `workers.finite.FiniteChecks`.

    Raises:
        ModelFolderError: The model folder is missing, torn or of another family.
    """
    torch.set_num_threads(num_threads)
    checks = FiniteChecks(raises=raises)
    if not shares_base:
        network = _ready(model, settings.compute, sharded=settings.sharded)
        return ScoreTeacher(network, settings, checks)
    require_kernel(settings.compute.attention, _device().type)
    view = view_of(_base(model, settings.compute))
    return ScoreTeacher(prepare_network(view, settings.compute), settings, checks)


def build_discriminator(
    model: ModelSettings,
    objective: Objective,
    settings: DiscriminatorSettings,
    num_threads: int,
    seed: int,
    raises: bool = True,
) -> Discriminator:
    """The discriminator: new heads on a copy of the teacher of its own.

    Args:
        model: The teacher's folder.
        objective: Has an adversarial term.
        settings: Its heads, how they are updated and how the copy is computed.
        num_threads: Threads of torch.
        seed: The run's seed, by which heads and perturbations are drawn.
        raises: As in `workers.finite.FiniteChecks`.

    Raises:
        ModelFolderError: The model folder is missing, torn or of another family.
    """
    torch.set_num_threads(num_threads)
    network = _ready(model, settings.compute)
    folder = local_model(model.folder)
    shape = family_of(folder).read_shape(folder).denoiser
    layers = settings.layers_of(shape.num_layers)
    heads = build_heads([shape.width] * len(layers), settings.width, settings.num_strides, seed)
    heads.to(_device())
    shard(heads, heads.heads)
    checks = FiniteChecks(raises=raises)
    return Discriminator(network, heads, layers, objective, settings.optimizer, seed, checks)


def build_denoiser(model: ModelSettings, compute: ComputeSettings, num_threads: int) -> Denoiser:
    """A role's network alone, where and how the role computes it, to be timed.

    Raises:
        ModelFolderError: The model folder is missing, torn or of another family.
    """
    torch.set_num_threads(num_threads)
    return _ready(model, compute)


def build_text_encoder(
    model: ModelSettings,
    num_threads: int,
    num_cached: int = 1024,
    *,
    lazily: bool = False,
    raises: bool = True,
    stored: Mapping[str, NDArray[np.float32]] | None = None,
) -> TextEncoder:
    """The text encoder, which remembers the embeddings of `num_cached` captions.

    Args:
        model: Its folder, type and text positions.
        num_threads: Torch threads.
        num_cached: Captions whose embeddings are remembered.
        lazily: Load the network only for a caption that has no stored embedding, and free it after
            that.
        raises: As in `TextEncoder`.
        stored: As in `TextEncoder`.

    Raises:
        ModelFolderError: The model folder is missing, torn or of another family.
    """
    torch.set_num_threads(num_threads)
    if lazily:
        # The negative prompt is asked for again and again, and must be remembered.
        num_cached = max(1, num_cached)
    embedder = partial(_captions, model) if lazily else _captions(model)
    return TextEncoder(embedder, model.text_length, num_cached, raises=raises, stored=stored)


def encoder_dtype() -> Literal["bf16", "fp32"]:
    """Type of frozen encoders where no recipe says one: as `sgmd generate`, bf16 on a GPU."""
    return "bf16" if torch.cuda.is_available() else "fp32"


def build_video_encoder(folder: str, num_threads: int) -> VideoEncoder:
    """The autoencoder of a model folder, for encoding, in the type that `encoder_dtype` says.

    Raises:
        ModelFolderError: The model folder is missing, torn or of another family.
    """
    torch.set_num_threads(num_threads)
    return VideoEncoder(_autoencoder(ModelSettings(folder, encoder_dtype=encoder_dtype())))


def build_evaluator(
    model: ModelSettings,
    video: VideoSettings,
    schedule: FlowMatchSchedule,
    num_threads: int,
    chunk_clips: int = CHUNK_CLIPS,
    generator: GeneratorSettings | None = None,
    teacher: str | None = None,
    stored: Mapping[str, NDArray[np.float32]] | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Evaluator:
    """The evaluator, with the weights of the model folder, or of the teacher's, as its base.

    Args:
        model: The networks' folder.
        video: Size of the clips.
        schedule: Noise levels.
        num_threads: Threads of torch.
        chunk_clips: Most clips that are sampled side by side; large ones are fewer.
        generator: Whose trained weights are sampled; all weights are then in the type of its
            products, as they are exported. Where adapters are trained, they are kept in the type
            of its base, once in a process. None: the folder's own are sampled, as `precision` says.
        teacher: Model folder of a teacher of another size, which is then the base.
        stored: Embeddings of all captions that are sampled and of the negative prompt; no text
            encoder is loaded then.
        precision: Type of the weights, where no generator's are sampled.

    Raises:
        ModelFolderError: The model folder is missing, torn or of another family.
        ShapeError: The clips do not fit the networks.
    """
    torch.set_num_threads(num_threads)
    latent_shape = _latent_shape(model, video)
    dtype = DTYPES[precision if generator is None else generator.compute.precision]
    network, adapted = _sampled_networks(model, generator, teacher, dtype)
    embedder = None if stored else _captions(model)
    cells, patch = latent_shape[1:], network.patch_size
    tokens = prod(-(-size // own) for size, own in zip(cells, patch, strict=True))
    return Evaluator(
        network,
        TextEncoder(embedder or partial(_captions, model), model.text_length, stored=stored),
        _autoencoder(model),
        schedule,
        latent_shape,
        model.negative_prompt,
        clips_side_by_side(chunk_clips, tokens),
        adapted,
        None if embedder is None else embedder.network,
    )


def _sampled_networks(
    model: ModelSettings,
    generator: GeneratorSettings | None,
    teacher: str | None,
    dtype: torch.dtype,
) -> tuple[Denoiser, Denoiser | None]:
    """The base that an evaluator samples, and the network that takes trained weights if another."""
    adapted = None
    if generator is None or generator.lora is None:
        network = _denoiser(model, dtype)
        _train_alone(network, model)
    else:
        base = _base(model, generator.compute, whole=True)
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
    return family_of(folder).load_denoiser(folder, dtype, device=_device())


def _train_alone(network: Denoiser, model: ModelSettings) -> None:
    """Of a network with two experts, freezes the one that a run does not train."""
    if model.alone is not None:
        assert isinstance(network, ExpertDenoiser)
        network.train_alone(model.alone)


def _ready(
    model: ModelSettings,
    compute: ComputeSettings,
    *,
    sharded: bool = True,
    rolls_out: bool = False,
) -> Denoiser:
    """A role's network, computed as the settings say, spread over the role's ranks.

    Args:
        model: Its folder, and the expert that it is.
        compute: How.
        sharded: Whether the ranks share it.
        rolls_out: Whether rollouts of it begin at pure noise, at which the low-noise expert alone
            cannot begin: it gets the other one, frozen, in the type of its products.
    """
    require_kernel(compute.attention, _device().type)
    in_fp8 = compute.weights == "fp8"

    def prepare(denoiser: Denoiser) -> None:
        prepare_network(denoiser, compute)
        if sharded:
            dtype = denoiser.autocast_dtype
            shard(denoiser, denoiser.blocks, device=_device().type, dtype=dtype, frozen=True)

    folder = local_model(model.folder)
    dtype = torch.bfloat16 if in_fp8 else DTYPES[compute.weights]
    companion = None
    if rolls_out:
        companion = DTYPES[compute.precision] if model.alone == "low" else None
    family = family_of_expert(folder, model.alone, companion)
    denoiser = family.load_denoiser(folder, dtype, device=_device(), prepare=prepare)
    if in_fp8:
        denoiser.store_in_fp8()
    keep_freed_memory(_device())
    return denoiser


def _learning(
    model: ModelSettings,
    compute: ComputeSettings,
    lora: LoraSettings | None,
    seed: int,
    role: str,
    *,
    rolls_out: bool = False,
) -> Denoiser:
    """The network of a role that learns: all weights of its own, or adapters over a base."""
    if lora is None:
        return _ready(model, compute, rolls_out=rolls_out)
    require_kernel(compute.attention, _device().type)
    network = view_of(_base(model, compute, whole=rolls_out and model.alone == "low"))
    if rolls_out:
        _train_alone(network, model)
    add_adapters(network, lora, seed, role)
    prepare_network(network, compute)
    shard(network, network.trained_blocks, dtype=network.autocast_dtype)
    keep_freed_memory(_device())
    return network


def _base(model: ModelSettings, compute: ComputeSettings, *, whole: bool = False) -> Denoiser:
    """The base of a role's adapters; `whole` has both experts where the roles have one alone."""
    base = partial(shared_base, local_model(model.folder), DTYPES[compute.weights], _device())
    if whole and model.alone is not None:
        return joined_bases(base("high"), base("low"))
    return base(model.alone)


def _captions(model: ModelSettings) -> TextEmbedder:
    folder = local_model(model.folder)
    captions = family_of(folder).load_text(folder, DTYPES[model.encoder_dtype])
    nn.Module.to(captions.network, _device())
    return captions


def _autoencoder(model: ModelSettings) -> Autoencoder:
    folder = local_model(model.folder)
    autoencoder = family_of(folder).load_autoencoder(folder, DTYPES[model.encoder_dtype])
    nn.Module.to(autoencoder.network, _device())
    return autoencoder


def _latent_shape(model: ModelSettings, video: VideoSettings) -> tuple[int, int, int, int]:
    folder = local_model(model.folder)
    return family_of(folder).inspect(folder).latent_shape(*video.size)


def _latent_buckets(model: ModelSettings, video: VideoSettings) -> LatentBuckets:
    folder = local_model(model.folder)
    checked = family_of(folder).inspect(folder)
    shapes = tuple(checked.latent_shape(*bucket.size) for bucket in video.trained)
    return LatentBuckets(shapes, video.bucket_weights)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
