"""Builds each role from its settings; the process of a role calls its function first.

Plain functions over frozen records, so that they can be sent to a process by name. Each sets the
number of torch threads, because a process that shares a machine must not take all of it. The
networks are those of `role_networks`.
"""

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sgmd_core.buckets import LatentBuckets
from sgmd_core.objectives import Objective
from sgmd_core.schedule import FlowMatchSchedule
from workers.attention import require_kernel
from workers.base_networks import view_of
from workers.clip_settings import VideoSettings
from workers.compute import prepare_network
from workers.discriminator import Discriminator
from workers.discriminator_heads import build_heads
from workers.evaluator import CHUNK_CLIPS, Evaluator, SampledNetworks, clips_side_by_side
from workers.fake_score_tracker import FakeScoreTracker
from workers.finite import FiniteChecks
from workers.generator_learner import GeneratorLearner
from workers.generator_task import GeneratorTask
from workers.models.addresses import local_model
from workers.models.exporting import DTYPES
from workers.models.families import family_of
from workers.models.family import Denoiser
from workers.network_settings import ComputeSettings
from workers.role_networks import (
    adapter_base,
    caption_embedder,
    learning_network,
    loaded_autoencoder,
    process_device,
    role_network,
    sampled_networks,
)
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

Precision = Literal["fp32", "bf16"]
"""Type of the weights of a denoiser that is not trained."""


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
    network = learning_network(
        model, settings.compute, settings.lora, seed, "generator", rolls_out=True
    )
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
    network = learning_network(model, settings.compute, settings.lora, seed, "fake_score")
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
        network = role_network(model, settings.compute, sharded=settings.sharded)
        return ScoreTeacher(network, settings, checks)
    require_kernel(settings.compute.attention, process_device().type)
    view = view_of(adapter_base(model, settings.compute))
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
    network = role_network(model, settings.compute)
    folder = local_model(model.folder)
    shape = family_of(folder).read_shape(folder).denoiser
    layers = settings.layers_of(shape.num_layers)
    heads = build_heads([shape.width] * len(layers), settings.width, settings.num_strides, seed)
    heads.to(process_device())
    shard(heads, heads.heads)
    checks = FiniteChecks(raises=raises)
    return Discriminator(network, heads, layers, objective, settings.optimizer, seed, checks)


def build_denoiser(model: ModelSettings, compute: ComputeSettings, num_threads: int) -> Denoiser:
    """A role's network alone, where and how the role computes it, to be timed.

    Raises:
        ModelFolderError: The model folder is missing, torn or of another family.
    """
    torch.set_num_threads(num_threads)
    return role_network(model, compute)


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
    embedder = partial(caption_embedder, model) if lazily else caption_embedder(model)
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
    return VideoEncoder(loaded_autoencoder(ModelSettings(folder, encoder_dtype=encoder_dtype())))


def build_evaluator(
    model: ModelSettings,
    video: VideoSettings,
    schedule: FlowMatchSchedule,
    num_threads: int,
    chunk_clips: int = CHUNK_CLIPS,
    weights: GeneratorSettings | Precision = "fp32",
    teacher: str | None = None,
    stored: Mapping[str, NDArray[np.float32]] | None = None,
) -> Evaluator:
    """The evaluator, with the weights of the model folder, or of the teacher's, as its base.

    Args:
        model: The networks' folder.
        video: Size of the clips.
        schedule: Noise levels.
        num_threads: Threads of torch.
        chunk_clips: Most clips that are sampled side by side; large ones are fewer.
        weights: Type of the folder's own weights, which are sampled; or the generator whose trained
            weights are sampled: all weights are then in the type of its products, as they are
            exported. Where adapters are trained, they are kept in the type of its base, once in a
            process.
        teacher: Model folder of a teacher of another size, which is then the base.
        stored: Embeddings of all captions that are sampled and of the negative prompt; no text
            encoder is loaded then.

    Raises:
        ModelFolderError: The model folder is missing, torn or of another family.
        ShapeError: The clips do not fit the networks.
    """
    torch.set_num_threads(num_threads)
    latent_shape = _latent_shape(model, video)
    generator = weights if isinstance(weights, GeneratorSettings) else None
    dtype = DTYPES[weights if isinstance(weights, str) else weights.compute.precision]
    network, adapted = sampled_networks(model, generator, teacher, dtype)
    embedder = None if stored else caption_embedder(model)
    cells, patch = latent_shape[1:], network.patch_size
    tokens = prod(-(-size // own) for size, own in zip(cells, patch, strict=True))
    return Evaluator(
        SampledNetworks(network, adapted),
        TextEncoder(embedder or partial(caption_embedder, model), model.text_length, stored=stored),
        loaded_autoencoder(model),
        schedule,
        latent_shape,
        model.negative_prompt,
        clips_side_by_side(chunk_clips, tokens),
        None if embedder is None else embedder.network,
    )


def _latent_shape(model: ModelSettings, video: VideoSettings) -> tuple[int, int, int, int]:
    folder = local_model(model.folder)
    return family_of(folder).inspect(folder).latent_shape(*video.size)


def _latent_buckets(model: ModelSettings, video: VideoSettings) -> LatentBuckets:
    folder = local_model(model.folder)
    checked = family_of(folder).inspect(folder)
    shapes = tuple(checked.latent_shape(*bucket.size) for bucket in video.trained)
    return LatentBuckets(shapes, video.bucket_weights)
