"""Commands that make and check data: `sgmd prepare`, `sgmd check`, `sgmd encode`."""

from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.data_options import CheckArguments, EncodeArguments, PrepareArguments
from pipelines.commands.options import Json, expand_groups
from pipelines.commands.output import Counter, counting, pairs, progress_bar, show
from sgmd_core.collector import paused_collector

if TYPE_CHECKING:
    from pipelines.data.making.prepare import PrepareProgress
    from pipelines.data.making.set_report import SetReport


@expand_groups
def prepare_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Folder or s3://bucket/prefix of videos with captions beside them (clip.mp4,"
            " clip.txt) or of WebDataset tars; a .tar; a .csv, .tsv, .jsonl, .json or .parquet"
            " manifest; or a .txt with one prompt per line.",
        ),
    ],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="Folder or s3://bucket/prefix for the shards.")
    ],
    arguments: PrepareArguments,
    as_json: Json = False,
) -> None:
    """Make Parquet shards of videos and captions; run again after an interruption, it continues.

    Files are copied byte by byte, unless --num-frames, --height and --width, or --fps ask
    for another format. Rejected clips are in DST/quarantine.parquet, each with its reason.
    Exit code 1: the set is complete except for the clips of a tar that cannot be read.
    """
    with counting() as count:
        from pipelines.data.making.prepare import prepare

        report = prepare(source, target, arguments.options(), lambda now: _tell(count, now))
    _show_set(report, target, as_json)


def _tell(count: Counter, now: "PrepareProgress") -> None:
    count(
        f"{now.num_clips} clips, {now.num_bad} bad, {now.num_shards} shards,"
        f" {now.num_bytes / 2**20:.1f} MiB"
    )


def _show_set(report: "SetReport", target: str, as_json: bool) -> None:
    """Prints the report of a command that fills a folder with shards.

    Raises:
        Exit: With code 1, where nothing of a whole file of the source is in the set.
    """
    data = report.to_json()
    hidden = ("skipped", "unknown_words", "unread")
    figures = pairs({name: value for name, value in data.items() if name not in hidden})
    show(data, as_json, figures, *report.notes(), f"Look at them: sgmd check {target}")
    if report.unread:
        raise typer.Exit(1)


@expand_groups
def check_command(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="DST", help="Folder or s3://bucket/prefix of shards, or a file of captions."
        ),
    ],
    arguments: CheckArguments,
    as_json: Json = False,
) -> None:
    """Check every shard, row and video of a set; exit code 0: usable, 1: not, 2: no such set."""
    with progress_bar() as on_progress:
        from pipelines.data.checking.check import check_shards

        report = check_shards(folder, arguments.options(), on_progress)
    data = report.to_json()
    hidden = ("usable", "problems", "examples", "folder", "unfinished")
    entries = {
        name: _in_a_line(value) for name, value in data.items() if name not in hidden and value
    }
    verdict = "usable" if report.is_usable else "NOT USABLE"
    unfinished = [report.unfinished] if report.unfinished else []
    words = [*report.problems, *report.examples, *unfinished, f"{folder}: {verdict}"]
    show(data, as_json, pairs(entries), "\n".join(words))
    if not report.is_usable:
        raise typer.Exit(1)


def _in_a_line(value: object) -> object:
    """Counts and quantiles side by side instead of one below the other."""
    if not isinstance(value, dict):
        return value
    if any(isinstance(inner, dict) for inner in value.values()):
        return {name: _in_a_line(inner) for name, inner in value.items()}
    return "  ".join(f"{name}: {inner}" for name, inner in value.items())


_CLIP_OPTIONS = (
    *("num_frames", "height", "width", "fps", "policy", "video_column", "bucket"),
    *("max_pixels", "max_frames", "max_seconds", "max_decode_seconds", "max_hang_seconds"),
    *("video_encoders", "video_gpus"),
)


@expand_groups
def encode_command(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Folder or s3://bucket/prefix of video shards; with --text-only of any shards,"
            " or a file of captions.",
        ),
    ],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="Folder or s3://bucket/prefix for the new shards.")
    ],
    arguments: EncodeArguments,
    as_json: Json = False,
) -> None:
    """Encode videos to latents and captions to embeddings; run again, it continues.

    Exit code 1: the set is complete except for the rows of a shard that cannot be read.
    """
    with progress_bar() as on_progress:
        with paused_collector():
            from pipelines.data.encoding.encode import encode
            from pipelines.media.inference import read_inference_settings
            from pipelines.run.generator_folder import model_folder

        if arguments.text_only:
            _refuse_clip_options(context)
        folder = model_folder(arguments.model)
        options = arguments.options(read_inference_settings(folder))
        report = encode(source, target, str(folder), options, on_progress)
    _show_set(report, target, as_json)


def _refuse_clip_options(context: typer.Context) -> None:
    """Refuses options of videos where no video is read.

    Raises:
        ConfigError: The command line has one.
    """
    given = []
    for parameter in context.command.params:
        if parameter.name in _CLIP_OPTIONS:
            origin = context.get_parameter_source(parameter.name)
            if origin is not None and origin.name != "DEFAULT":
                given.append(parameter.opts[0])
    if given:
        from sgmd_core.errors import ConfigError

        raise ConfigError(
            "reading the options of `sgmd encode`",
            f"--text-only with {', '.join(given)}",
            "no option of videos, because --text-only reads none",
            "Leave out these options, or --text-only",
        )
