"""Sets that a run reads its samples from: those of section `data`, or the sizes of one set.

    data.train, data.also[0], ...        each sample is of a set that is drawn by weight
    data.train/480x832x81, .../...x33    each iteration is of the size that it draws

The second where a method learns from latents of the data and `video.buckets` has several sizes:
then `sgmd encode --bucket` has made a folder for each.
"""

from dataclasses import dataclass

from pipelines.config.recipe import DistillConfig
from pipelines.data.shards.columns import RecipeColumnNames
from pipelines.data.shards.stored_buckets import read_buckets
from pipelines.data.stream.source import Source
from pipelines.stages.algorithm import needs_data
from pipelines.stages.kind import IterationKind
from sgmd_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """One of the sets of a run.

    Attributes:
        setting: What names it.
        url: Its address.
        columns: Names of its columns.
        weight: Its share is this over the sum of all.
    """

    setting: str
    url: str
    columns: RecipeColumnNames
    weight: float


def takes_sizes_from_data(config: DistillConfig) -> bool:
    """True if iterations learn from latents of the data, of the size that each draws."""
    return len(config.video.buckets) > 1 and needs_data(IterationKind.of(config))


def training_sets(config: DistillConfig, train: str | None = None) -> tuple[TrainingSet, ...]:
    """The sets of a run, the first one first.

    Args:
        config: The run.
        train: Place of `data.train` now; None: as the recipe says.
    """
    data = config.data
    place = train or data.train
    if takes_sizes_from_data(config):
        return tuple(
            TrainingSet(
                f"data.train ({each.label})",
                f"{place.rstrip('/')}/{each.label}",
                data.columns,
                each.weight,
            )
            for each in config.video.trained
        )
    return (
        TrainingSet("data.train", place, data.columns, data.weight),
        *(
            TrainingSet(f"data.also[{number}]", each.source, each.columns, each.weight)
            for number, each in enumerate(data.also)
        ),
    )


def require_sizes(config: DistillConfig) -> None:
    """Checks that training data have latents of every size that a run trains.

    Args:
        config: A run that learns from latents of the data.

    Raises:
        ConfigError: A size is missing or has no clip; or the data have several sizes, and the run
            trains one; or there are further sets besides the sizes of one.
        DataError: The data cannot be read.
    """
    data = config.data
    attempted = f"reading data for objective.method {config.objective.method} from {data.train}"
    place = Source(data.train, data.s3, names=data.columns).open()
    stored = {each.folder: each for each in read_buckets(place.filesystem, place.root, data.s3)}
    wanted = [each.label for each in config.video.trained]
    if not takes_sizes_from_data(config):
        if stored:
            raise ConfigError(
                attempted,
                f"latents of {len(stored)} sizes ({', '.join(stored)})",
                f"one size, {wanted[0]}",
                f"Set data.train={data.train.rstrip('/')}/{wanted[0]}, or train all of them with"
                " video.buckets"
                if wanted[0] in stored
                else "Encode the videos for this size, or train other ones with video.buckets",
            )
        return
    if data.also:
        raise ConfigError(
            attempted,
            f"video.buckets of {len(wanted)} sizes and data.also",
            "one set, whose sizes are drawn by the weights of video.buckets",
            "Leave data.also out, or leave one bucket",
        )
    lacking = [each for each in wanted if each not in stored or not stored[each].num_rows]
    if lacking:
        found = [f"{name} ({each.num_rows} clips)" for name, each in stored.items()]
        options = " ".join(f"--bucket {each}" for each in wanted)
        raise ConfigError(
            attempted,
            f"latents of {', '.join(found) if found else 'one size, or none'}; video.buckets asks"
            f" for {', '.join(lacking)} too",
            "clips of every size of video.buckets",
            f"Encode videos with `sgmd encode SRC DST --model {config.model.folder} {options}` and"
            " set data.train to DST, or leave these buckets out",
        )
