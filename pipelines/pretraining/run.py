"""`pretrain`: train a small Wan teacher from captioned clips, with Ray Train.

    shards -- feed: decode ---------> stage 1: autoencoder  -> RUN/vae/
    shards -- feed: decode, encode -> stage 2: denoiser     -> RUN/teacher/
                                      diffusers folder      -> OUTPUT/
                                      quality               -> RUN/summary.json

With `vae.folder`, the autoencoder is taken from there; then the shards may hold latents.

A stage that is finished is not run again, and an unfinished one continues from its last
checkpoint: giving the command again is how an interrupted run is resumed. With other settings or
other clips it is refused instead.

RUN and OUTPUT may be addresses. Then this process works on the small files of RUN in a working copy
and publishes them; checkpoints, vae/ and teacher/ are written to the address by whoever makes them.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ray.train import Checkpoint, Result

from cluster.folders import folder_here, whole_folder_at
from cluster.lease import Lease, hold_replaced
from cluster.ray.mailbox import open_mailbox
from cluster.ray.topology import require_cpus
from cluster.storage import write_json
from cluster.stores import opened_store, store_address
from pipelines.config.recovery import RecoverySettings
from pipelines.data.shards.schema import ShardKind
from pipelines.pretraining.config import PretrainConfig
from pipelines.pretraining.data import (
    TrainingClips,
    distinct_captions,
    open_clips,
)
from pipelines.pretraining.events import EVENTS_FILE, EventWriter, PretrainEvent, PretrainEvents
from pipelines.pretraining.folder import write_pipeline_folder
from pipelines.pretraining.loops import (
    NETWORKS_FILE,
    VAE_FOLDER,
    VOCABULARY_FILE,
    build_pretrained_teacher,
    denoiser_loop,
    inference_settings,
    vae_loop,
)
from pipelines.pretraining.quality import QualityReport, measure_folder
from pipelines.pretraining.ray_stage import fit_stage
from pipelines.pretraining.stages import (
    DENOISER_STAGE,
    IN_PLACE,
    RAY_FOLDER,
    TEACHER_FOLDER,
    VAE_STAGE,
    record_stage,
    require_fitting_autoencoder,
    require_same_stages,
    stage_identities,
)
from pipelines.run.opened_copy import hold_place, working_copy
from pipelines.run.outputs import require_output_folder
from pipelines.run.places import local_of, shared_place
from pipelines.run.publisher import publish_now, publishing
from pipelines.run.replaceable import require_replaceable
from sgmd_core.errors import ConfigError
from workers.models.configs import CONFIG_FILE
from workers.models.families import family_of
from workers.models.wan import open_autoencoder
from workers.models.wan_family import WAN_TRAITS

# Readers of videos hold parts of a CPU.
_DATA_CPUS = 2
_SUMMARY_FILE = "summary.json"


NETWORK_MODULES = ("pipelines.pretraining.networks", *WAN_TRAITS.modules)
"""Modules that the processes of training import and that have nothing to do with Ray."""


@dataclass(frozen=True, slots=True)
class CheckedPretrain:
    """A recipe whose shards and folders are checked; see `checked`.

    Attributes:
        config: The recipe with absolute paths.
        clips: The clips that it trains on.
        held_out: The clips that its autoencoder is watched on; None where it trains none.
    """

    config: PretrainConfig
    clips: TrainingClips
    held_out: TrainingClips | None


@dataclass(frozen=True, slots=True)
class PretrainResult:
    """Files of a finished run.

    Attributes:
        output: The diffusers folder: a path or an address.
        quality: Its measured quality.
    """

    output: str
    quality: QualityReport


def num_cpus_needed(config: PretrainConfig) -> int:
    """Logical CPUs that a cluster must have for the trainers and for Ray Data beside them."""
    return config.ray.num_workers * config.ray.cpus_per_worker + _DATA_CPUS


def pretrain(
    config: PretrainConfig | CheckedPretrain,
    on_event: Callable[[PretrainEvent], None] = lambda event: None,
) -> PretrainResult:
    """Trains both stages, writes the diffusers folder and measures it; Ray must be connected.

    Args:
        config: The recipe, or the result of `checked`, which is not checked again.
        on_event: Called in this process for every line of progress.

    Returns:
        The folder and its quality.

    Raises:
        DataError: shards are missing, corrupt or do not fit.
        InsufficientResourcesError: the cluster is too small, and the job would wait without end.
        CheckpointError: a stage in the run's folder was made from other settings or other clips.
        NonFiniteError: a loss stopped being finite.
        LeaseError: another process trains in the run's folder, or into the same model folder.
        ConfigError: a folder to write to cannot be written to, or is a model folder to replace in
            which other things lie.
        StorageError: an object store cannot be read, or has failed for too long.
        KeyboardInterrupt: Ctrl-C; the workers have been ended.
    """
    job = config if isinstance(config, CheckedPretrain) else checked(config)
    with working_copy(job.config.run_dir, IN_PLACE):
        run_dir = local_of(job.config.run_dir)
        with _held(job.config, run_dir) as lease:
            identities = stage_identities(job.config, job.clips)
            require_same_stages(run_dir, identities)
            require_cpus(num_cpus_needed(job.config), f"training {job.config.name}")
            events = PretrainEvents(run_dir / EVENTS_FILE, on_event)
            outage_s = RecoverySettings().storage_outage_s
            with publishing(run_dir, lease, outage_s, events.add_outage):
                return _pretrain(job, run_dir, identities, events)


def checked(config: PretrainConfig) -> CheckedPretrain:
    """Checks the recipe, its shards and its folders; needs no Ray, and writes nothing.

    Raises:
        DataError: Shards are missing.
        ConfigError: See `pretrain`.
    """
    named = {"run_dir": config.run_dir, **_outputs(config)}
    for setting, folder in named.items():
        require_output_folder(folder, setting)
    config = config.with_absolute_paths()
    for setting, folder in _outputs(config).items():
        require_replaceable(folder, setting, _sources(config))
    clips, held_out = open_clips(config.world.train, config.world), None
    require_fitting_autoencoder(config, clips)
    _require_clip_each(config, clips, "world.train")
    if config.vae.folder is None:
        held_out = open_clips(config.world.held_out, config.world, [ShardKind.VIDEO])
        _require_clip_each(config, held_out, "world.held_out")
    return CheckedPretrain(config, clips, held_out)


def _require_clip_each(config: PretrainConfig, clips: TrainingClips, setting: str) -> None:
    """Checks that every worker gets a clip.

    Raises:
        ConfigError: There are fewer clips than workers.
    """
    if clips.num_rows < config.ray.num_workers:
        raise ConfigError(
            f"sharing the clips of {setting} among the workers",
            f"{clips.num_rows} clips and ray.num_workers {config.ray.num_workers}",
            "a clip for each worker at least",
            "Lower ray.num_workers, or raise world.max_clips or write more clips",
        )


def _outputs(config: PretrainConfig) -> dict[str, str]:
    """Model folders that the run replaces whole, by setting."""
    named = {"output": config.output, "partial_output": config.partial_output}
    return {setting: folder for setting, folder in named.items() if folder is not None}


def _sources(config: PretrainConfig) -> dict[str, str]:
    """Addresses that must not lie in a folder that is replaced, by setting."""
    named = {
        "run_dir": config.run_dir,
        "world.train": config.world.train,
        "world.held_out": config.world.held_out,
        "vae.folder": config.vae.folder,
    }
    return {setting: address for setting, address in named.items() if address is not None}


@contextmanager
def _held(config: PretrainConfig, run_dir: Path) -> Iterator[Lease]:
    """Holds the run's folder and the model folders that it makes, against other processes."""
    purpose = f"sgmd pretrain {config.name}"
    with ExitStack() as stack:
        lease = stack.enter_context(hold_place(run_dir, purpose, IN_PLACE))
        for folder in sorted({_one_spelling(each) for each in _outputs(config).values()}):
            stack.enter_context(hold_replaced(folder, purpose))
        yield lease


def _one_spelling(folder: str) -> str:
    return store_address(folder) or os.path.realpath(folder)


def _pretrain(
    job: CheckedPretrain,
    run_dir: Path,
    identities: dict[str, dict[str, Any]],
    events: PretrainEvents,
) -> PretrainResult:
    """Runs a checked recipe in a folder that this process holds.

    Args:
        job: The recipe.
        run_dir: The folder on this disk.
        identities: What each stage is made from.
        events: Takes what happens.
    """
    config = job.config
    with open_mailbox(events.add) as mailbox:
        run = _Run(config, run_dir, mailbox)
        _make_vae(job, run, identities[VAE_STAGE])
        _train_denoiser(run, job.clips, identities[DENOISER_STAGE])
    _write_folder(config, run)
    teller = EventWriter(config, "quality", config.sampling.num_clips, events.add)
    teller.note(f"measuring {config.output} on {config.sampling.num_clips} held-out captions")
    with folder_here(config.output) as folder:
        quality = measure_folder(folder, config)
    write_json(str(run_dir / _SUMMARY_FILE), asdict(quality))
    teller.note(quality.in_words())
    return PretrainResult(config.output, quality)


@dataclass(frozen=True, slots=True)
class _Run:
    """Places of a run.

    Attributes:
        config: Its recipe.
        run_dir: Its folder on this disk.
        mailbox: Takes the events of its workers.
    """

    config: PretrainConfig
    run_dir: Path
    mailbox: str

    def place(self, name: str) -> str:
        """One of the folders of `IN_PLACE`, for every process: a path or an address."""
        return shared_place(self.run_dir / name)

    def record(self, stage: str, identity: dict[str, Any]) -> None:
        """Writes down what a stage is made from, before it begins."""
        record_stage(self.run_dir, stage, identity)
        publish_now(self.run_dir)

    def fit(
        self, stage: str, loop: Callable[[dict[str, Any]], None], settings: dict[str, Any]
    ) -> Result:
        """Runs one stage; an earlier attempt is continued."""
        common = {"config": self.config.model_dump(mode="json"), "mailbox": self.mailbox}
        place = self.place(RAY_FOLDER)
        return fit_stage(loop, {**common, **settings}, stage, place, self.config.ray)


def _make_vae(job: CheckedPretrain, run: _Run, identity: dict[str, Any]) -> None:
    made, folder = run.place(VAE_FOLDER), job.config.vae.folder
    if _is_made(made, CONFIG_FILE):
        return
    run.record(VAE_STAGE, identity)
    if job.held_out is None:
        assert folder is not None, "the autoencoder is taken or trained"
        part = family_of(folder).traits.layout.autoencoder
        _copy_whole(Path(folder) / part, made, CONFIG_FILE)
        return
    sets = {"train": job.clips, "held_out": job.held_out}
    result = run.fit(VAE_STAGE, vae_loop, sets)
    with _checkpoint_of(result).as_directory() as folder:
        _copy_whole(Path(folder) / VAE_FOLDER, made, CONFIG_FILE)


def _train_denoiser(run: _Run, clips: TrainingClips, identity: dict[str, Any]) -> None:
    made, vae_folder = run.place(TEACHER_FOLDER), run.place(VAE_FOLDER)
    if _is_made(made, NETWORKS_FILE):
        return
    run.record(DENOISER_STAGE, identity)
    vocabulary = distinct_captions(clips)
    settings = {"train": clips, "vae_folder": vae_folder, "vocabulary": vocabulary}
    result = run.fit(DENOISER_STAGE, denoiser_loop, settings)
    with _checkpoint_of(result).as_directory() as folder:
        _copy_whole(Path(folder), made, NETWORKS_FILE)


def _write_folder(config: PretrainConfig, run: _Run) -> None:
    with folder_here(run.place(VAE_FOLDER)) as folder:
        vae = open_autoencoder(folder)
    with folder_here(run.place(TEACHER_FOLDER)) as folder:
        vocabulary = json.loads((folder / VOCABULARY_FILE).read_text())
        teacher = build_pretrained_teacher(config, vocabulary, vae.vae.config["z_dim"])
        teacher.load_state_dict(torch.load(folder / NETWORKS_FILE, weights_only=True))
    write_pipeline_folder(config.output, teacher, vae, inference_settings(config))


def _checkpoint_of(result: Result) -> Checkpoint:
    checkpoint = result.checkpoint
    assert checkpoint is not None, "every stage ends by reporting a checkpoint"
    return checkpoint


def _is_made(place: str, mark: str) -> bool:
    """Returns True if a stage's folder is whole: its file that comes last is there."""
    with opened_store(place, f"looking at {place}") as (files, path):
        return bool(files.exists(f"{path}/{mark}"))


def _copy_whole(source: Path, place: str, last: str) -> None:
    """Copy a folder so that it counts only when it is complete."""
    with whole_folder_at(place, (last,)) as draft:
        shutil.copytree(source, draft, dirs_exist_ok=True)
