"""Commands that make and check data: `sgmd prepare`, `sgmd check`, `sgmd encode`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.s3.settings import DEFAULT_READ_BUDGET_S, S3Settings
from pipelines.commands.options import LARGEST_SEED, Json
from pipelines.commands.output import Counter, counting, pairs, progress_bar, show
from pipelines.data.clips.clip_format import DEFAULT_LIMITS, ClipFormat, ClipLimits, FitPolicy
from pipelines.data.clips.hang_guard import MAX_HANG_S
from pipelines.data.making.caption_choice import CaptionChoice

if TYPE_CHECKING:
    from pipelines.data.making.prepare import PrepareProgress
    from pipelines.data.making.set_report import SetReport

Policy = Annotated[
    FitPolicy,
    typer.Option(
        help="Pictures of another size are scaled side by side (resize), scaled and cut"
        " (crop), or bad (refuse)"
    ),
]
MaxBad = Annotated[
    float, typer.Option(min=0, max=1, help="Stop where a larger share of the clips is bad")
]
NumFrames = Annotated[
    int | None, typer.Option(min=1, max=2**17, help="Frames a clip; a shorter one is bad")
]
Height = Annotated[int | None, typer.Option(min=1, max=2**14, help="Pixels")]
Width = Annotated[int | None, typer.Option(min=1, max=2**14, help="Pixels")]
Processes = Annotated[
    int | None,
    typer.Option(min=0, max=1024, help="Default: one a core; 0 works in this process"),
]
Fps = Annotated[float | None, typer.Option(help="Frames a second, sampled by time")]
CaptionColumn = Annotated[
    str | None,
    typer.Option(help="Column of captions; default: caption, or the only one of prompt and text"),
]
IdColumn = Annotated[
    str | None, typer.Option(help="Column of ids; default: sample_id, or ids of file and row")
]
VideoColumn = Annotated[
    str | None, typer.Option(help="Column of videos: bytes, or a struct of them; default: video")
]
MaxPixels = Annotated[int, typer.Option(min=1, help="A video with larger pictures is bad")]
MaxFrames = Annotated[int, typer.Option(min=1, help="A video with more frames is bad")]
MaxSeconds = Annotated[float, typer.Option(min=0, help="A longer video is bad")]
MaxDecode = Annotated[float, typer.Option(min=0, help="A video that decodes longer is bad")]
MaxHang = Annotated[
    float,
    typer.Option(
        min=0,
        max=86400,
        help="A process in which one call of the decoder takes longer is ended, and the video is"
        " bad; 0 waits for ever",
    ),
]
ReadBudget = Annotated[
    float,
    typer.Option(
        min=0.001,
        help="Time that all tries of one read from S3 may take together, and a second more for"
        " each MiB; an object that is not served by then is bad, if others are",
    ),
]


def prepare_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Folder or s3://bucket/prefix of videos with captions beside them (clip.mp4,"
            " clip.txt) or of WebDataset tars; a .tar; a .csv, .tsv, .jsonl, .json or .parquet"
            " manifest; or a .txt with one prompt a line.",
        ),
    ],
    target: Annotated[
        str, typer.Argument(metavar="DST", help="Folder or s3://bucket/prefix for the shards.")
    ],
    shard_clips: Annotated[int, typer.Option(min=1, help="Most clips in a shard")] = 512,
    shard_mb: Annotated[
        int, typer.Option(min=1, help="A shard is closed at this size, in MiB")
    ] = 256,
    path_column: Annotated[str, typer.Option(help="Manifest: the video's path")] = "path",
    caption_column: Annotated[
        str | None,
        typer.Option(
            help="Manifest and JSON files: the caption; default: caption, or the only one of"
            " prompt and text"
        ),
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Manifest: the sample id; default: the path")
    ] = None,
    captions_only: Annotated[
        bool, typer.Option("--captions-only", help="Manifest: take the captions, no videos")
    ] = False,
    captions: Annotated[
        CaptionChoice,
        typer.Option(
            help="Of a list of captions, or of manifest rows with one video: take the first"
            " usable one or a random one, and count the others in the summary; or make a row of"
            " each (all), with the ids ID#0, ID#1, ..."
        ),
    ] = CaptionChoice.FIRST,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Which caption --captions random takes")
    ] = 0,
    num_frames: NumFrames = None,
    height: Height = None,
    width: Width = None,
    fps: Fps = None,
    policy: Policy = FitPolicy.CROP,
    crf: Annotated[
        int, typer.Option(min=0, max=51, help="Quality of a new encoding; 0 is lossless")
    ] = 18,
    decode: Annotated[
        bool, typer.Option("--decode-all/--decode-first", help="Frames that are tried")
    ] = True,
    max_caption_chars: Annotated[int, typer.Option(min=1, help="A longer caption is bad")] = 4096,
    max_clip_mb: Annotated[int, typer.Option(min=1, help="A larger file is bad, in MiB")] = 512,
    max_pixels: MaxPixels = DEFAULT_LIMITS.max_pixels,
    max_frames: MaxFrames = DEFAULT_LIMITS.max_frames,
    max_seconds: MaxSeconds = DEFAULT_LIMITS.max_seconds,
    max_decode_seconds: MaxDecode = DEFAULT_LIMITS.max_decode_s,
    max_hang_seconds: MaxHang = MAX_HANG_S,
    read_budget_seconds: ReadBudget = DEFAULT_READ_BUDGET_S,
    max_bad_fraction: MaxBad = 0.01,
    retry_bad: Annotated[
        bool, typer.Option("--retry-bad", help="Try again what earlier runs did not take")
    ] = False,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Make Parquet shards out of videos and captions; killed and started again, it goes on.

    Files stay as they are, byte by byte, unless --num-frames, --height and --width, or --fps ask
    for another format. What is not taken is in DST/quarantine.parquet with its reason.
    Exit code 1: the set is made, and lacks all clips of a tar that cannot be read.
    """
    with counting() as count:
        from pipelines.data.making.prepare import PrepareOptions, prepare
        from pipelines.data.making.prepare_clip import ClipRules
        from pipelines.data.making.source_clip import Columns

        options = PrepareOptions(
            columns=Columns(None if captions_only else path_column, caption_column, id_column),
            rules=ClipRules(
                wanted=ClipFormat(num_frames, height, width, fps, policy),
                crf=crf,
                whole=decode,
                max_caption_chars=max_caption_chars,
                max_clip_bytes=max_clip_mb * 2**20,
                limits=ClipLimits(max_pixels, max_frames, max_seconds, max_decode_seconds),
                captions=captions,
                seed=seed,
            ),
            shard_clips=shard_clips,
            shard_bytes=shard_mb * 2**20,
            max_bad_fraction=max_bad_fraction,
            retry_bad=retry_bad,
            num_processes=processes,
            max_hang_s=max_hang_seconds,
            s3=S3Settings(read_budget_s=read_budget_seconds),
        )
        report = prepare(source, target, options, lambda now: _tell(count, now))
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


def check_command(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="DST", help="Folder or s3://bucket/prefix of shards, or a file of captions."
        ),
    ],
    sample: Annotated[
        int | None, typer.Option(min=0, help="Rows to decode, drawn by seed; default: all")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Which rows are drawn")] = 0,
    model: Annotated[
        Path | None, typer.Option(help="Diffusers folder: count captions in its tokens too")
    ] = None,
    text_length: Annotated[
        int | None,
        typer.Option(min=1, max=2**14, help="Tokens that the model takes; its folder knows"),
    ] = None,
    max_caption_chars: Annotated[int, typer.Option(min=1, help="A longer caption is bad")] = 4096,
    max_pixels: MaxPixels = DEFAULT_LIMITS.max_pixels,
    max_frames: MaxFrames = DEFAULT_LIMITS.max_frames,
    max_seconds: MaxSeconds = DEFAULT_LIMITS.max_seconds,
    max_decode_seconds: MaxDecode = DEFAULT_LIMITS.max_decode_s,
    max_hang_seconds: MaxHang = MAX_HANG_S,
    max_bad_fraction: MaxBad = 0.01,
    caption_column: CaptionColumn = None,
    id_column: IdColumn = None,
    video_column: VideoColumn = None,
    write_index: Annotated[
        bool, typer.Option("--write-index", help="Write _index.json anew, for the shards there")
    ] = False,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Look at every shard, row and video of a set; exit code 0: usable, 1: not, 2: no such set."""
    with progress_bar() as on_progress:
        from pipelines.data.checking.check import CheckOptions, check_shards
        from pipelines.data.shards.columns import OptionColumnNames

        count_tokens, limit = None, 512
        if model is not None:
            from pipelines.media.inference import model_folder, read_inference_settings
            from workers.models.families import family_of

            model = model_folder(model)
            count_tokens = family_of(model).load_tokenizer(model).count_tokens
            limit = text_length or read_inference_settings(model).text_length
        report = check_shards(
            folder,
            CheckOptions(
                sample=sample,
                seed=seed,
                max_caption_chars=max_caption_chars,
                limits=ClipLimits(max_pixels, max_frames, max_seconds, max_decode_seconds),
                max_bad_fraction=max_bad_fraction,
                count_tokens=count_tokens,
                text_length=limit,
                num_processes=processes,
                max_hang_s=max_hang_seconds,
                write_index=write_index,
                names=OptionColumnNames(caption_column, id_column, video_column),
            ),
            on_progress,
        )
    data = report.to_json()
    hidden = ("usable", "problems", "examples", "folder")
    told = {name: _in_a_line(value) for name, value in data.items() if name not in hidden and value}
    verdict = "usable" if report.is_usable else "NOT USABLE"
    words = [*report.problems, *report.examples, f"{folder}: {verdict}"]
    show(data, as_json, pairs(told), "\n".join(words))
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
    *("num_frames", "height", "width", "fps", "policy", "video_column"),
    *("max_pixels", "max_frames", "max_seconds", "max_decode_seconds", "max_hang_seconds"),
    *("video_encoders", "video_gpus"),
)


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
    model: Annotated[Path, typer.Option(help="Model folder; what is not given here comes from it")],
    num_frames: NumFrames = None,
    height: Height = None,
    width: Width = None,
    fps: Fps = None,
    policy: Policy = FitPolicy.CROP,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Make text embeddings alone; no video is read")
    ] = False,
    text_length: Annotated[
        int | None, typer.Option(min=1, max=2**14, help="Text positions; longer captions are cut")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32 keeps every bit; bfloat16 and float16 take half the room")
    ] = "float32",
    shard_clips: Annotated[int, typer.Option(min=1, help="Most clips in a shard")] = 256,
    max_caption_chars: Annotated[int, typer.Option(min=1, help="A longer caption is bad")] = 4096,
    max_pixels: MaxPixels = DEFAULT_LIMITS.max_pixels,
    max_frames: MaxFrames = DEFAULT_LIMITS.max_frames,
    max_seconds: MaxSeconds = DEFAULT_LIMITS.max_seconds,
    max_decode_seconds: MaxDecode = DEFAULT_LIMITS.max_decode_s,
    max_hang_seconds: MaxHang = MAX_HANG_S,
    max_bad_fraction: MaxBad = 0.01,
    caption_column: CaptionColumn = None,
    id_column: IdColumn = None,
    video_column: VideoColumn = None,
    decoders: Annotated[int, typer.Option(min=1, help="Clips decoded side by side")] = 1,
    video_encoders: Annotated[int, typer.Option(min=1, help="Actors with the autoencoder")] = 1,
    video_gpus: Annotated[float, typer.Option(min=0, help="GPUs of each; 0.5 shares one")] = 0.0,
    text_encoders: Annotated[int, typer.Option(min=1, help="Actors with the text encoder")] = 1,
    text_gpus: Annotated[float, typer.Option(min=0, help="GPUs of each; 0.5 shares one")] = 0.0,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join: auto, HOST:PORT; default: our own")
    ] = None,
    as_json: Json = False,
) -> None:
    """Encode videos to latents and captions to embeddings; killed and started again, it goes on.

    Exit code 1: the set is made, and lacks all rows of a shard that cannot be read.
    """
    with progress_bar() as on_progress:
        from pipelines.data.making.encode import encode
        from pipelines.data.making.encode_options import ActorPool, EncodeOptions, dtype_named
        from pipelines.data.shards.columns import OptionColumnNames
        from pipelines.media.inference import model_folder, read_inference_settings

        if text_only:
            _refuse_clip_options(context)
        folder = model_folder(model)
        known = read_inference_settings(folder)
        report = encode(
            source,
            target,
            str(folder),
            EncodeOptions(
                wanted=ClipFormat(
                    num_frames=num_frames or known.num_frames,
                    height=height or known.height,
                    width=width or known.width,
                    fps=known.fps if fps is None else fps,
                    policy=policy,
                ),
                text_length=text_length or known.text_length,
                dtype=dtype_named(dtype),
                shard_clips=shard_clips,
                max_caption_chars=max_caption_chars,
                limits=ClipLimits(max_pixels, max_frames, max_seconds, max_decode_seconds),
                max_hang_s=max_hang_seconds,
                max_bad_fraction=max_bad_fraction,
                decoders=decoders,
                videos=ActorPool(video_encoders, video_gpus),
                captions=ActorPool(text_encoders, text_gpus),
                text_only=text_only,
                names=OptionColumnNames(caption_column, id_column, video_column),
                address=address,
            ),
            on_progress,
        )
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
