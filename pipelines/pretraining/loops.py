"""The two training loops as Ray Train workers run them.

    read clips -> restore the last checkpoint -> { steps -> report } -> final checkpoint

Every worker runs the same loop on its own share of the clips; gradients are averaged over workers,
whose networks start equal and so stay equal. Worker 0 writes checkpoints and progress;
`ray.train.report` is a barrier, so all workers call it at the same steps. The arithmetic is in
the stage modules.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
from torch import Tensor

from cluster.folders import folder_here
from cluster.ray.mailbox import post
from pipelines.data.shards.schema import LATENTS
from pipelines.embedded_worlds import embedded_world
from pipelines.media.inference import InferenceSettings
from pipelines.pretraining import networks, vae_stage
from pipelines.pretraining.config import PretrainConfig
from pipelines.pretraining.data import (
    PIXELS,
    MemoryClips,
    TrainingClips,
    collect,
    share_of_clips,
)
from pipelines.pretraining.denoiser_stage import DenoiserTraining, TeacherNetworks
from pipelines.pretraining.distributed import average_gradients, from_first_worker
from pipelines.pretraining.events import EventWriter
from pipelines.pretraining.folder import write_pipeline_folder
from pipelines.pretraining.quality import held_out_captions, sample_videos
from workers.models.wan import VideoVae, WanVelocity, open_autoencoder

STATE_FILE = "state.pt"
VAE_FOLDER = "vae"
NETWORKS_FILE = "networks.pt"
VOCABULARY_FILE = "vocabulary.json"
_FEWEST_READERS = 2
_WATCH_SEED = 7_001
_MAX_STATISTICS_CLIPS = 2048


def vae_loop(settings: Mapping[str, Any]) -> None:
    """Train the autoencoder; the final checkpoint holds it as a diffusers folder."""
    config = PretrainConfig.model_validate(settings["config"])
    rank = ray.train.get_context().get_world_rank()
    events = _writer(config, settings, "vae", config.vae.num_steps)
    events.note("reading and decoding the clips")
    clips = _gather(settings["train"], PIXELS).values
    held_out = _gather(settings["held_out"], PIXELS).values
    _begin(config)
    vae = networks.build_vae(config.vae)
    training = vae_stage.VaeTraining(vae, config.vae, config.seed + 1_000 * rank, average_gradients)
    _restore(training)
    events.start(training.num_steps_done)
    while training.num_steps_done < config.vae.num_steps:
        metrics = training.step(clips)
        step = training.num_steps_done
        events.step(step, metrics)
        if step % config.ray.checkpoint_every_steps == 0 and step < config.vae.num_steps:
            _report(step, metrics, {STATE_FILE: training.state_dict()})
    latents = vae_stage.encode_clips(vae, clips[:_MAX_STATISTICS_CLIPS])
    vae_stage.store_latent_statistics(vae, latents)
    psnr_db = vae_stage.reconstruction_psnr_db(vae, held_out)
    events.note(f"autoencoder: {psnr_db:.1f} dB on held-out clips")
    with tempfile.TemporaryDirectory() as folder:
        vae.save_pretrained(Path(folder) / VAE_FOLDER)
        checkpoint = ray.train.Checkpoint.from_directory(folder) if rank == 0 else None
        ray.train.report(
            {"step": training.num_steps_done, "psnr_db": psnr_db}, checkpoint=checkpoint
        )


def denoiser_loop(settings: Mapping[str, Any]) -> None:
    """Train denoiser and caption encoder; the final checkpoint holds their moving average."""
    config = PretrainConfig.model_validate(settings["config"])
    rank = ray.train.get_context().get_world_rank()
    longest = config.denoiser.max_hold_steps + config.denoiser.decay_steps
    events = _writer(config, settings, "denoiser", longest)
    events.note("reading the clips' latents")
    with folder_here(settings["vae_folder"]) as folder:
        vae = open_autoencoder(folder)
    torch.set_num_threads(1)  # Bits of latents do not depend on how many cores a worker has.
    clips = _gather(settings["train"], LATENTS, vae.encode)
    _begin(config)
    training = DenoiserTraining(
        build_pretrained_teacher(config, settings["vocabulary"], vae.vae.config["z_dim"]),
        config.denoiser,
        config.text,
        seed=config.seed,
        rank=rank,
        sync_gradients=average_gradients,
    )
    _restore(training)
    events.start(training.num_steps_done)
    metrics: dict[str, float] = {}
    while not training.is_over:
        metrics = training.step(clips.values, clips.captions)
        step = training.num_steps_done
        score: float | None = None
        if step % config.denoiser.watch_every_steps == 0:
            watched = _watch(config, training, vae, clips) if rank == 0 else {}
            score = from_first_worker(watched.get("direction", 0.0))
            metrics = metrics | watched
        events.step(step, metrics)
        training.watched(score)
        if step % config.ray.checkpoint_every_steps == 0 and not training.is_over:
            _report(step, metrics, {STATE_FILE: training.state_dict()})
    with training.averaged() as averaged:
        _report(
            training.num_steps_done,
            metrics,
            {NETWORKS_FILE: averaged.state_dict()},
            settings["vocabulary"],
        )


def build_pretrained_teacher(
    config: PretrainConfig, vocabulary: list[str], latent_channels: int
) -> TeacherNetworks:
    """Fresh denoiser, caption encoder and a tokenizer made from all captions of the run."""
    tokenizer = networks.train_tokenizer(vocabulary)
    transformer = networks.build_transformer(config.denoiser, config.text, latent_channels)
    text_encoder = networks.new_text_encoder(config.text, len(tokenizer))
    return TeacherNetworks(WanVelocity(transformer), text_encoder, tokenizer)


def inference_settings(config: PretrainConfig) -> InferenceSettings:
    """Sampling settings of a trained teacher."""
    return InferenceSettings(
        num_steps=config.sampling.num_steps,
        guidance_scale=config.sampling.guidance_scale,
        flow_shift=config.sampling.flow_shift,
        text_length=config.text.max_length,
        num_frames=config.world.num_frames,
        height=config.world.frame_px,
        width=config.world.frame_px,
        fps=config.world.fps,
    )


def _watch(
    config: PretrainConfig, training: DenoiserTraining, vae: VideoVae, clips: MemoryClips
) -> dict[str, float]:
    """Sample a few held-out captions with the averaged networks and score them."""
    world = embedded_world(config.world.name)
    captions = held_out_captions(world, config.denoiser.watch_clips, _WATCH_SEED)
    sampling = config.sampling.model_copy(
        update={"num_steps": config.denoiser.watch_sampling_steps}
    )
    with training.averaged() as averaged:
        encoder = averaged.caption_encoder()
        videos = sample_videos(
            averaged.transformer,
            lambda texts: encoder.encode(texts, config.text.max_length),
            vae,
            captions,
            clips.values.shape[1:],
            sampling,
            _WATCH_SEED,
        )
        if config.partial_output is not None:
            settings = inference_settings(config)
            write_pipeline_folder(config.partial_output, averaged, vae, settings)
    return asdict(world.score(videos, captions))


def _writer(
    config: PretrainConfig, settings: Mapping[str, Any], stage: str, num_steps: int
) -> EventWriter:
    """The writer of this worker, of which the first one alone tells anything."""
    is_silent = ray.train.get_context().get_world_rank() > 0
    send = partial(post, settings["mailbox"])
    return EventWriter(config, stage, num_steps, send, is_silent=is_silent)


def _gather(
    clips: TrainingClips, column: str, encode: Callable[[Tensor], Tensor] | None = None
) -> MemoryClips:
    """Read this worker's share of a set into memory."""
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    # One process reads latents as fast as a disk or a network gives them; videos keep many busy.
    is_decoded = clips.source.decode is not None
    readers = max(_FEWEST_READERS, (os.cpu_count() or 1) // num_workers) if is_decoded else 0
    return collect(share_of_clips(clips, rank, num_workers, encode=encode, readers=readers), column)


def _begin(config: PretrainConfig) -> None:
    """Fix what the bits of a run depend on: the seed of the weights, and the threads of sums.

    Ray sets `OMP_NUM_THREADS` for a process, which comes too late where torch has been imported.
    """
    torch.set_num_threads(config.ray.cpus_per_worker)
    torch.manual_seed(config.seed)


def _restore(training: vae_stage.VaeTraining | DenoiserTraining) -> None:
    """Continue from the last checkpoint, if this run or an earlier one has left any."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True)
    training.load_state_dict(state)


def _report(
    step: int,
    metrics: Mapping[str, float],
    files: Mapping[str, Mapping[str, Any]],
    vocabulary: Sequence[str] | None = None,
) -> None:
    """Tell Ray Train the metrics, and hand it a checkpoint of worker 0's files."""
    is_first = ray.train.get_context().get_world_rank() == 0
    with tempfile.TemporaryDirectory() as folder:
        for name, state in files.items() if is_first else ():
            torch.save(state, Path(folder) / name)
        if vocabulary is not None:
            (Path(folder) / VOCABULARY_FILE).write_text(json.dumps(vocabulary))
        checkpoint = ray.train.Checkpoint.from_directory(folder) if is_first else None
        ray.train.report({"step": step, **metrics}, checkpoint=checkpoint)
