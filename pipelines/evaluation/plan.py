"""Plan of an evaluation: folders, ways of sampling, captions.

The teacher's sets are those of `pipelines.evaluation.teacher_sets`; the generator's has its own few
steps and starts from the same noise. All sets show the same held-out captions, and each is also
sampled from the other seed, for the diversity of the clips of a caption.
"""

import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.data.shards.columns import ColumnNames
from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.stream.inspect import first_captions
from pipelines.distillation.position import model_differences, read_identity
from pipelines.evaluation.result import GENERATOR
from pipelines.media.inference import InferenceSettings, read_inference_settings
from pipelines.run.folder import RunFolder
from pipelines.run.generator_folder import model_folder
from pipelines.run.outputs import require_output_folder
from pipelines.run.places import shared_place
from sgmd_core.errors import ConfigError, ModelFolderError
from sgmd_core.schedule import MAX_STEPS, WHY_MAX_STEPS, FlowMatchSchedule
from workers.build import Precision, build_evaluator, encoder_dtype
from workers.clip_settings import VideoSettings
from workers.evaluator import TOKENS_SIDE_BY_SIDE, Evaluator
from workers.kept_clips import clip_facts
from workers.models.addresses import local_model
from workers.models.content import model_digests
from workers.models.families import family_of
from workers.models.folder import require_encoders
from workers.models.weight_digests import require_same_weights
from workers.samplings import FLOOR, TEACHER_FEW, Sampling, teacher_samplings
from workers.settings import ModelSettings

_DEFAULT_TEACHER_STEPS = 30
# Seed B is the next number.
_MOST = {"teacher_steps": MAX_STEPS, "seed": 2**63 - 2}
_WHY = {"teacher_steps": f": {WHY_MAX_STEPS}"}
_CACHE_FOLDER = "evaluation-cache"
_log = logging.getLogger(__name__)

_FEWEST_CAPTIONS = 2
_MOST_CAPTIONS = 256


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """Amount and way of sampling.

    Attributes:
        num_captions: Held-out captions, one clip each in every set; None takes 256, or all where
            there are fewer.
        seed: Seed A; seed B is the next number.
        batch_size: Most clips that are sampled side by side; large ones are fewer.
        teacher_steps: Steps of the reference; None takes the recipe's, or 30.
        guidance_scale: Guidance of the teacher; None takes the recipe's, or the folder's.
        num_bootstraps: Draws behind the standard errors.
        num_shown: Captions on the contact sheet, different ones.
        num_threads: Threads of torch; None leaves their number: OMP_NUM_THREADS, or every core.
        features: Weights of an I3D that describes clips, as safetensors; None takes
            the built-in features, which need none.
    """

    num_captions: int | None = None
    seed: int = 0
    batch_size: int = 16
    teacher_steps: int | None = None
    guidance_scale: float | None = None
    num_bootstraps: int = 200
    num_shown: int = 6
    num_threads: int | None = None
    features: Path | None = None

    @property
    def threads(self) -> int:
        """Threads of torch that the networks get."""
        return self.num_threads or torch.get_num_threads()

    def __post_init__(self) -> None:
        """Checks the values."""
        least = {
            "num_captions": _FEWEST_CAPTIONS,
            "batch_size": 1,
            "num_bootstraps": 2,
            "num_shown": 1,
            "teacher_steps": 1,
            "guidance_scale": 1,
            "num_threads": 1,
            "seed": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            most = _MOST.get(name, sys.float_info.max)
            # Written so that NaN is refused too.
            if value is not None and not bound <= value <= most:
                expected = f"at least {bound}" if value < bound else f"from {bound} to {most:g}"
                raise ConfigError(
                    "evaluating",
                    f"{name} = {value}",
                    expected + _WHY.get(name, ""),
                    f"Correct {name}",
                )


@dataclass(frozen=True, slots=True)
class Subject:
    """A model folder and how its clips are made.

    Attributes:
        folder: The diffusers folder.
        model: The same, with the text settings.
        video: Size of the clips.
        schedule: Noise levels.
        precision: Type of the denoiser's weights: on a GPU that of the products of the run's
            generator, as its validator has them, and on a CPU float32.
    """

    folder: Path
    model: ModelSettings
    video: VideoSettings
    schedule: FlowMatchSchedule
    precision: Precision = "fp32"

    @property
    def facts(self) -> tuple[object, ...]:
        """Returns what decides its clips besides the folder's files and the way of sampling."""
        narrow = (self.precision,) if self.precision != "fp32" else ()
        return (*clip_facts(self.model, self.video, self.schedule), *narrow)

    def evaluator(self, options: EvaluationOptions) -> Evaluator:
        """Loads the networks; says so where its clips are too large for the batch size."""
        evaluator = build_evaluator(
            self.model,
            self.video,
            self.schedule,
            options.threads,
            options.batch_size,
            weights=self.precision,
        )
        if evaluator.chunk_clips < options.batch_size:
            _log.warning(
                "%s: of clips of this size %d are sampled side by side, not %d (batch_size): a "
                "network is given at most %d tokens at once",
                self.folder,
                evaluator.chunk_clips,
                options.batch_size,
                TOKENS_SIDE_BY_SIDE,
            )
        return evaluator


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Everything that an evaluation needs to know.

    Attributes:
        generator: What is judged.
        teacher: What it is judged by.
        samplings: How each set is sampled, by names of `workers.samplings` and `GENERATOR`.
        captions: One clip each in every set.
        captions_from: Folder of their shards.
        output: Where the results go.
        cache: Where what was measured of the teacher is kept.
        options: How much is sampled.
        generator_place: Path or address of what is judged.
    """

    generator: Subject
    teacher: Subject
    samplings: dict[str, Sampling]
    captions: tuple[str, ...]
    captions_from: str
    output: Path
    cache: Path
    options: EvaluationOptions
    generator_place: str

    def label(self, name: str) -> str:
        """A set's name for a reader."""
        how = self.samplings[name]
        if name == FLOOR:
            return "the same, other seeds"
        who = "generator" if name == GENERATOR else "teacher"
        return f"{who}, {how.num_steps} {'steps' if how.guidance_scale == 1 else 'guided steps'}"


def plan_evaluation(
    run_or_model: str | Path,
    teacher: str | Path | None,
    captions: str | None,
    output: str | Path | None,
    cache: str | Path | None,
    options: EvaluationOptions,
) -> EvaluationPlan:
    """Looks up everything that an evaluation needs to know; see `evaluation.run.evaluate`.

    Raises:
        ConfigError: The teacher or the captions are neither given nor known.
        ModelFolderError: The run has no generator, its teacher has changed since, or a folder's
            settings cannot be used.
        DataError: The captions cannot be read.
    """
    path = local_model(run_or_model)
    generator_folder = model_folder(path)
    teacher = local_model(teacher) if teacher else None
    for folder in filter(None, (generator_folder, teacher)):
        _require_encoders(folder)
    own = read_inference_settings(generator_folder)
    is_run = RunFolder(path).config.exists()
    results = Path(output) if output else (path if is_run else Path("evaluation"))
    for folder, option in ((results, "--output"), (cache, "--cache")):
        if folder:
            require_output_folder(folder, option)
    config = load_recipe(str(RunFolder(path).config)) if is_run else None
    if config is not None:
        if not teacher:
            teacher = config.teacher_folder
            _require_encoders(teacher)
            _require_teacher_of(RunFolder(path), teacher, config)
        captions = captions or config.data.validation
    if not teacher or not captions:
        raise _nothing_to_compare(path, teacher, captions)
    theirs = _teacher_settings(Path(teacher), config)
    video = VideoSettings(own.num_frames, own.height, own.width, own.fps)
    chosen = _captions(captions, options, config)
    for folder in dict.fromkeys((generator_folder, Path(teacher))):
        require_same_weights(folder)
    unknown = family_of(generator_folder).load_tokenizer(generator_folder).unknown_words(chosen)
    if unknown.num_affected:
        _log.warning("%s", unknown.in_words())
    return EvaluationPlan(
        generator=_subject(generator_folder, own, video, config),
        teacher=_subject(Path(teacher), theirs, video, config),
        samplings=_samplings(own, theirs, options, config),
        captions=chosen,
        captions_from=captions,
        output=results,
        cache=Path(cache) if cache else results / _CACHE_FOLDER,
        options=options,
        generator_place=shared_place(RunFolder(path).generator if is_run else run_or_model),
    )


def _samplings(
    own: InferenceSettings,
    theirs: InferenceSettings,
    options: EvaluationOptions,
    config: DistillConfig | None,
) -> dict[str, Sampling]:
    """Sampling of each set of clips, by its name."""
    found = teacher_samplings(
        options.teacher_steps or _recipe_teacher_steps(config),
        options.guidance_scale or theirs.guidance_scale,
        own.num_steps,
        options.seed,
    )
    # The generator starts from the noise of the teacher's few steps.
    found[GENERATOR] = replace(found[TEACHER_FEW], guidance_scale=own.guidance_scale)
    return found


def _nothing_to_compare(
    path: Path, teacher: str | Path | None, captions: str | None
) -> ConfigError:
    return ConfigError(
        f"evaluating {shared_place(path)}",
        f"teacher {str(teacher or '')!r} and captions {captions or ''!r}",
        "a teacher to compare with, and shards or a file of held-out captions",
        "Name a run, which knows both, or give both",
    )


def _require_encoders(folder: Path) -> None:
    require_encoders(family_of(folder).inspect(folder), f"evaluating with {folder}")


def _require_teacher_of(run: RunFolder, teacher: str | Path, config: DistillConfig) -> None:
    """Refuses networks that are not those that the run was distilled from."""
    if not run.identity.exists():
        return
    began = read_identity(run, f"evaluating {run}")
    digests = model_digests(teacher)
    if config.teacher.model is None:
        layout = family_of(teacher).traits.layout
        found = model_differences(began, digests, layout=layout)
    else:
        own = {name: digests.get(name, "") for name in began.get("teacher", {})}
        found = model_differences(began, own, "teacher", "teacher.model")
    if found:
        raise ModelFolderError(
            f"evaluating {run} against its teacher in {teacher}",
            "; ".join(found),
            "the networks that the run was distilled from",
            "Give the folder that holds them, or another teacher on purpose, with --teacher",
        )


def _teacher_settings(folder: Path, config: DistillConfig | None) -> InferenceSettings:
    """The teacher's own settings, guided as it was when it was distilled."""
    settings = read_inference_settings(folder)
    if config is None:
        return settings
    return settings.model_copy(
        update={
            "guidance_scale": config.teacher.guidance_scale,
            "text_length": config.model.text_length,
            "negative_prompt": config.model.negative_prompt,
        }
    )


def _recipe_teacher_steps(config: DistillConfig | None) -> int:
    return config.validation.teacher_steps if config is not None else _DEFAULT_TEACHER_STEPS


def _subject(
    folder: Path, settings: InferenceSettings, video: VideoSettings, config: DistillConfig | None
) -> Subject:
    dtype = encoder_dtype() if config is None else config.model.encoder_dtype
    model = ModelSettings(str(folder), settings.text_length, settings.negative_prompt, dtype)
    return Subject(folder, model, video, settings.schedule, sampling_precision(config))


def sampling_precision(config: DistillConfig | None) -> Precision:
    """Type in which denoisers are sampled on this machine.

    Args:
        config: Settings of the run; None: of a folder that does not say how it was trained.
    """
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if config is None else config.generator.compute.precision


def _captions(
    folder: str, options: EvaluationOptions, config: DistillConfig | None
) -> tuple[str, ...]:
    s3, names = S3Settings(), ColumnNames()
    if config is not None:
        s3 = config.data.s3
        if folder == config.data.validation:
            names = config.data.validation_columns or config.data.columns
    if options.num_captions is not None:
        wanted, setting = options.num_captions, "--num-captions {}"
        return first_captions(folder, s3, options.seed, wanted, names, setting=setting)
    found = first_captions(folder, s3, options.seed, _MOST_CAPTIONS, names, _FEWEST_CAPTIONS)
    if len(found) < _MOST_CAPTIONS:
        _log.warning(
            "%s holds %d captions, fewer than the usual %d: all are taken",
            *(folder, len(found), _MOST_CAPTIONS),
        )
    return found
