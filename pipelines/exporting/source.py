"""Weights that are exported: of a checkpoint of a run, of its finished generator, or of a folder.

RUN                     its newest whole checkpoint; without one, generator/
RUN --checkpoint best   the best one of ranking.json; or a number
FOLDER                  a model folder, beside the base that it was trained from
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cluster.checkpoints import Checkpoints
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.media.inference import InferenceSettings, read_inference_settings
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.generator_folder import model_folder
from pipelines.run.places import shared_place
from pipelines.run.ranking import ranked, scores_of
from sgmd_core.errors import CheckpointError, ConfigError
from workers.generator_learner import AVERAGE, ROLE
from workers.models.adapter_files import adapter_factors, merged_weights
from workers.models.addresses import local_model, missing_folder
from workers.models.exporting import DTYPES
from workers.models.families import family_of
from workers.models.family import ModelFamily
from workers.models.low_rank import LowRank
from workers.models.weight_digests import require_same_weights
from workers.role_state import load_role

LAST, BEST = "last", "best"


@dataclass(frozen=True, slots=True)
class TrainedGenerator:
    """A trained generator.

    Attributes:
        name: For file names and titles.
        weights: Parameters of the `Denoiser` by name, in float32 where they come from a checkpoint.
        base: Model folder with the configuration and all other components.
        family: Family of both.
        sampling: How the generator is sampled.
        run: The run; None: the weights come from a model folder.
        config: Settings of the run.
        iteration: Updates that the weights have seen; None where this is not known.
        adapters: What was trained, where it is adapters; `weights` have them merged.
        trained_part: Prefix of the names of the expert that was trained alone; empty: all were.
    """

    name: str
    weights: Mapping[str, Tensor]
    base: Path
    family: ModelFamily
    sampling: InferenceSettings
    run: RunFolder | None = None
    config: DistillConfig | None = None
    iteration: int | None = None
    adapters: Mapping[str, LowRank] | None = None
    trained_part: str = ""


def open_source(
    run_or_model: str | Path, checkpoint: str | None = None, base: str | Path | None = None
) -> TrainedGenerator:
    """Reads the weights to export.

    Args:
        run_or_model: Folder of a run, or a model folder.
        checkpoint: `last`, `best` or an iteration; None: the newest one, or the run's generator
            where no checkpoint was kept.
        base: Model folder that the weights were trained from; None: as the run says, or the folder
            itself.

    Raises:
        ConfigError: The checkpoint is neither a number nor one of the words.
        CheckpointError: The checkpoint does not exist or is not whole.
        ModelFolderError: A folder is missing, incomplete or of no known family.
    """
    path = local_model(run_or_model)
    run = RunFolder(path)
    if run.config.exists():
        return _of_run(run, checkpoint, base)
    if checkpoint is not None:
        raise ConfigError(
            f"exporting {run_or_model}",
            f"--checkpoint {checkpoint} of a folder without config.yaml",
            "the folder of a run",
            "Name the run, or leave --checkpoint out",
        )
    folder = model_folder(run_or_model)
    return TrainedGenerator(
        name=folder.resolve().name,
        weights=_of_folder(folder),
        base=folder if base is None else _checked(base),
        family=family_of(folder),
        sampling=read_inference_settings(folder),
    )


def _of_run(run: RunFolder, checkpoint: str | None, base: str | Path | None) -> TrainedGenerator:
    config = load_recipe(str(run.config))
    folder = _checked(config.model_folder if base is None else base)
    step, adapters = _step(run, config, checkpoint), None
    if step is None:
        weights = _of_folder(model_folder(run.root))
    else:
        part = AVERAGE if config.generator.ema_decay > 0 else ROLE
        state = load_role(Checkpoints(shared_place(run.checkpoints)).folder(step), part)
        weights = state.weights
        if state.lora is not None:
            adapters = adapter_factors(weights, state.lora)
            dtype = DTYPES[config.generator.compute.weights]
            weights = merged_weights(folder, weights, state.lora, dtype)
        elif config.model.alone is not None:
            # The other expert is in no checkpoint.
            weights = {**_of_folder(folder), **weights}
    return TrainedGenerator(
        name=config.name,
        weights=weights,
        base=folder,
        family=family_of(folder),
        sampling=InferenceSettings.model_validate(config.inference_settings()),
        run=run,
        config=config,
        iteration=config.iterations if step is None else step,
        adapters=adapters,
        trained_part="" if config.model.alone is None else f"{config.model.alone}.",
    )


def _step(run: RunFolder, config: DistillConfig, checkpoint: str | None) -> int | None:
    """Iteration of the checkpoint that is meant; None: the run's finished generator."""
    checkpoints = Checkpoints(shared_place(run.checkpoints))
    attempted = f"exporting checkpoint {checkpoint} of {run}"
    steps = checkpoints.steps()
    if checkpoint in (None, LAST):
        if not steps and checkpoint is not None:
            raise _missing(attempted, steps)
        return steps[-1] if steps else None
    if checkpoint == BEST:
        scores = scores_of(read_jsonl(run.validation), config.checkpoint.score)
        ranking = ranked(scores, config.checkpoint.mode, among=steps)
        if not ranking:
            found = "no checkpoint that was kept has been validated"
            raise CheckpointError(attempted, found, "a validated one", "Name an iteration")
        return ranking[0].iteration
    if checkpoint is None or not checkpoint.isdecimal():
        expected = f"{LAST}, {BEST} or an iteration"
        raise ConfigError(attempted, f"--checkpoint {checkpoint}", expected)
    if int(checkpoint) not in steps:
        raise _missing(attempted, steps)
    return int(checkpoint)


def _missing(attempted: str, steps: list[int]) -> CheckpointError:
    kept = ", ".join(map(str, steps)) or "none"
    remedy = "Name one of them" if steps else "Leave --checkpoint out to export generator/"
    return CheckpointError(attempted, f"the checkpoints that were kept: {kept}", "it there", remedy)


def _of_folder(folder: Path) -> dict[str, Tensor]:
    require_same_weights(folder)
    denoiser = family_of(folder).load_denoiser(folder)
    return {name: value.detach() for name, value in denoiser.named_parameters()}


def _checked(base: str | Path) -> Path:
    folder = local_model(base)
    if not folder.is_dir():
        raise missing_folder(
            folder,
            f"looking for the base model {folder}",
            "Give its present place with --base FOLDER",
        )
    return folder.absolute()
