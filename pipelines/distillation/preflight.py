"""Everything about a run that can be wrong before a process or a GPU is taken."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipelines.config.figures import SHAPE_FIGURES
from pipelines.config.recipe import DistillConfig
from pipelines.data.shards.schema import LATENTS, TEXT_EMBEDS
from pipelines.data.stream.content import with_latents
from pipelines.data.stream.inspect import (
    FolderFacts,
    first_captions,
    inspect_folder,
)
from pipelines.data.stream.source import Source
from pipelines.distillation.method_checks import latent_maker_of, require_latents
from pipelines.distillation.network_checks import inspect_networks
from pipelines.distillation.teacher_check import check_teacher
from pipelines.distillation.text_check import (
    LookedAtSet,
    find_stored_text,
    has_text,
    require_all_stored,
    text_maker_of,
)
from pipelines.distillation.training_sets import (
    require_sizes,
    takes_sizes_from_data,
    training_sets,
)
from pipelines.planning.stored_text import StoredText
from pipelines.run.outputs import require_lasting_folder
from pipelines.run.places import shared_place
from pipelines.stages.algorithm import needs_data
from pipelines.stages.kind import IterationKind
from sgmd_core.buckets import LatentBuckets
from sgmd_core.errors import ConfigError, ShapeError
from sgmd_core.worlds.shapes import labels_from_captions
from workers.measures import MIN_FRAMES
from workers.models.content import model_digests
from workers.models.families import family_of
from workers.models.folder import ModelFolder, require_autoencoder
from workers.models.makers import named_by
from workers.models.vocabulary import UnknownWords
from workers.optical_flow import MIN_SIDE_PX

# Captions that are enough to tell the language and vocabulary of the data.
_NUM_READ = 256


@dataclass(frozen=True, slots=True)
class Preflight:
    """Result of checking a configuration on this machine.

    Attributes:
        model: The networks' folder.
        content: Digest of each of its components, wherever the folder is.
        teacher_content: Digests of the denoiser of a teacher of another model; else empty.
        buckets: Shapes (channels, frames, rows, columns) of a sample that are trained.
        latent_shape: That of the clips that are validated and exported.
        source: The training data, and what is read of them.
        data: What a first look at them tells.
        held_out: Captions to validate with; empty when validation is off.
        rows_per_iteration: Captions that one iteration takes.
        unknown_words: Words of the first captions that the tokenizer does not know.
        further: The other sets of captions.
        texts: Texts whose embeddings lie with the data.
        latents_named: Fingerprint of the autoencoder as all latents name it, where the model folder
            has none to compare them with; else empty.
    """

    model: ModelFolder
    content: dict[str, str]
    teacher_content: dict[str, str]
    buckets: LatentBuckets
    latent_shape: tuple[int, int, int, int]
    source: Source
    data: FolderFacts
    held_out: tuple[str, ...]
    rows_per_iteration: int
    unknown_words: UnknownWords
    further: tuple[LookedAtSet, ...]
    texts: StoredText
    latents_named: str = ""

    def to_json(self, config: DistillConfig) -> dict[str, Any]:
        """Returns what `--dry-run` prints."""
        return {
            "name": config.name,
            "run_folder": shared_place(config.run_folder),
            "model": str(self.model.path),
            "teacher": str(config.teacher_folder),
            "num_parameters": self.model.num_parameters,
            "unused_weight_files": [
                str(file.relative_to(self.model.path))
                for part in self.model.weights.values()
                for file in part.unused
            ],
            "latent_shape": list(self.latent_shape),
            **({"buckets": _shares(config)} if config.video.buckets else {}),
            "training_rows": self.data.num_rows,
            "training_shards": self.data.num_shards,
            "training_shards_hold": self.data.kind.value,
            "training_columns": self.data.found or "as sgmd names them",
            "stored_text": self.has_stored_text,
            "text_encoder_for": {name: list(each) for name, each in self.texts.lacking.items()},
            "text_encoder_named": self.texts.named,
            "autoencoder_named": self.latents_named,
            "data_latents": self.has_data_latents,
            "held_out_captions": len(self.held_out),
            "unknown_words": asdict(self.unknown_words),
            "unfinished_sets": self.unfinished_sets,
            "rows_per_iteration": self.rows_per_iteration,
            "further_sets": [
                {
                    "source": one.source.url,
                    "rows": one.data.num_rows,
                    "shards": one.data.num_shards,
                    "weight": chosen.weight,
                }
                for one, chosen in zip(self.further, training_sets(config)[1:], strict=True)
            ],
            "iterations": config.iterations,
            "epochs": (
                config.iterations
                * self.rows_per_iteration
                * training_sets(config)[0].weight
                / sum(one.weight for one in training_sets(config))
                / self.data.num_rows
                if self.data.num_rows
                else None
            ),
            "objective": asdict(config.objective),
            "tracking": config.fake_score.tracking,
            "topology": config.topology.mode,
            "processes": {
                role: team.size for role, team in config.topology.teams_of(config.roles).items()
            },
        }

    @property
    def unfinished_sets(self) -> list[str]:
        """Sets of captions whose making has not come to its end, each with what is left to do."""
        looked = [self.data, *(one.data for one in self.further)]
        return [each.unfinished for each in looked if each.unfinished]

    @property
    def has_stored_text(self) -> bool:
        """True if captions bring their embeddings, and the text encoder is not needed for them."""
        return TEXT_EMBEDS in self.source.columns

    @property
    def has_data_latents(self) -> bool:
        """True if iterations take latents of the data, and the feed reads them."""
        return LATENTS in self.source.columns

    @property
    def autoencoder_in_words(self) -> str:
        """Line for a run whose model folder has no autoencoder; empty where it has one."""
        if self.model.has_autoencoder:
            return ""
        named = (
            f", and the latents of the data name {self.latents_named} as their maker, which is "
            "not verified"
            if self.latents_named
            else ""
        )
        return f"the model folder has no autoencoder: nothing is decoded{named}"

    @property
    def checked(self) -> dict[str, str]:
        """Subjects that `check` looked at, each with what it compared."""
        found = {
            "settings": "every value, and the rules between them",
            "model": f"configurations, tokenizer, weight headers of {self.model.path}; clip size",
            "data": f"listing of {self.source.url}, footers and rows up to the first usable ones",
        }
        if self.held_out:
            found["held-out"] = f"{len(self.held_out)} captions, all usable"
        return found

    @property
    def not_checked(self) -> dict[str, str]:
        """Subjects that `check` did not look at, each with what does."""
        return {
            "weights": "their values: networks are not loaded",
            "data": f"the other rows: sgmd check {self.source.url}",
            "time": "how long an iteration takes: sgmd plan, or a short run",
        }


def run_preflight(config: DistillConfig) -> Preflight:
    """Checks model folder, clip size, shards and captions.

    Raises:
        SgmdError: The first thing that does not fit, with what to do about it.
    """
    require_lasting_folder(config.output, "output")
    if config.validation.teacher_clips:
        require_lasting_folder(config.validation.teacher_clips, "validation.teacher_clips")
    model, buckets = inspect_networks(config)
    _require_decoder(config, model)
    tokenizer = family_of(model.path).load_tokenizer(model.path)
    learns_from_data = needs_data(IterationKind.of(config))
    if learns_from_data:
        require_sizes(config)
    sets = training_sets(config)
    looked = [LookedAtSet(*inspect_captions(config, number)) for number in range(len(sets))]
    columns: list[str] = []
    maker = text_maker_of(config, model, looked)
    # What not all sets bring is taken from none.
    if all(has_text(one.data, config, model, maker) for one in looked):
        columns.append(TEXT_EMBEDS)
    latents_named = ""
    if learns_from_data:
        latent_maker = latent_maker_of(model, looked)
        latents_named = "" if model.has_autoencoder else latent_maker
        by_set = buckets.shapes if takes_sizes_from_data(config) else buckets.shapes * len(looked)
        for one, latent_shape in zip(looked, by_set, strict=True):
            require_latents(config, one.data, model, latent_shape, latent_maker)
        columns.append(LATENTS)
    (source, data), *further = [_read_with(one, tuple(columns)) for one in looked]
    held_out = _held_out(config)
    texts = find_stored_text(
        config, model, looked if TEXT_EMBEDS in columns else [], held_out, maker
    )
    content = model_digests(model.path)
    if not model.has_text_encoder:
        require_all_stored(model, texts)
        content |= dict.fromkeys(model.layout.text_encoders, named_by("embeddings", maker))
    if latents_named:
        content[model.layout.autoencoder] = named_by("latents", latents_named)
    return Preflight(
        model=model,
        content=content,
        teacher_content=check_teacher(config, model, content),
        buckets=buckets,
        latent_shape=model.latent_shape(*config.video.size),
        source=source,
        data=data,
        held_out=held_out,
        rows_per_iteration=config.batch.size * (1 + config.fresh_updates),
        unknown_words=tokenizer.unknown_words(
            [*(each for one in looked for each in one.data.captions[:_NUM_READ]), *held_out]
        ),
        further=tuple(LookedAtSet(*one) for one in further),
        texts=texts,
        latents_named=latents_named,
    )


def _require_decoder(config: DistillConfig, model: ModelFolder) -> None:
    """Checks that validations, where there are some, can decode their clips."""
    if config.validation.every:
        require_autoencoder(
            model,
            "preparing validations, which decode clips",
            ". A distillation without validations (validation.every=0) needs none; a sweep "
            "always has some",
        )


def _shares(config: DistillConfig) -> dict[str, float]:
    """Share of the iterations of each size that is trained."""
    video = config.video
    whole = sum(video.bucket_weights)
    return {bucket.label: bucket.weight / whole for bucket in video.trained}


def _read_with(one: LookedAtSet, columns: tuple[str, ...]) -> tuple[Source, FolderFacts]:
    """A set of which some columns are read."""
    source, data = one.source, one.data
    if columns:
        source = replace(source, columns=columns, encoding=data.encoding)
    if LATENTS in columns:
        data = replace(data, first=tuple(with_latents(source, data.first)))
    return source, data


def inspect_captions(config: DistillConfig, number: int = 0) -> tuple[Source, FolderFacts]:
    """Takes a first look at a set of a run's training data.

    Args:
        config: The run.
        number: Of the set; see `training_sets`.

    Raises:
        DataError: They cannot be read.
    """
    settings = config.data
    one = training_sets(config)[number]
    source = Source(
        one.url, settings.s3, max_caption_chars=settings.max_caption_chars, names=one.columns
    )
    data = inspect_folder(source, config.seed, settings.shuffle)
    return replace(source, settled=data.names), data


def _held_out(config: DistillConfig) -> tuple[str, ...]:
    if not config.validation.every:
        return ()
    video = config.video
    if video.num_frames < MIN_FRAMES or min(video.height, video.width) < MIN_SIDE_PX:
        raise ConfigError(
            "preparing validations, which measure motion",
            f"clips of {video.num_frames} frames, {video.height} x {video.width} pixels",
            f"at least {MIN_FRAMES} frames of {MIN_SIDE_PX} x {MIN_SIDE_PX} pixels",
            "Set video.num_frames, video.height and video.width, or validation.every=0",
        )
    wanted, score = config.validation.num_captions, config.checkpoint.score
    data = config.data
    captions = first_captions(
        data.validation,
        data.s3,
        config.seed,
        wanted,
        data.validation_columns or data.columns,
        setting="validation.num_captions={}",
    )
    if config.checkpoint.keep_best:
        require_readable(score, captions, f"ranking checkpoints by {score}", "checkpoint.score")
    return captions


def require_readable(score: str, captions: Sequence[str], attempted: str, setting: str) -> None:
    """Checks that a ranking figure can be measured on clips of these captions.

    Args:
        score: Name of a figure.
        captions: The held-out ones.
        attempted: What it is wanted for.
        setting: Key that names it.

    Raises:
        ConfigError: It reads shapes, and the captions do not name any.
    """
    if score not in SHAPE_FIGURES:
        return
    try:
        labels_from_captions(captions)
    except ShapeError as error:
        raise ConfigError(
            attempted,
            f"held-out captions that it cannot be read from ({error.found})",
            "captions of `sgmd shapes`, or a figure of any clips such as frechet",
            f"Set {setting}",
        ) from error
