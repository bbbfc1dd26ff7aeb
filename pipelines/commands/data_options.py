"""Options of the commands that make and check data.

ClipFormatOptions, ClipLimitOptions, ColumnOptions   shared by several of them
PrepareArguments, CheckArguments, EncodeArguments    all of one, which make what it calls
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.s3.settings import DEFAULT_READ_BUDGET_S, S3Settings
from pipelines.commands.options import LARGEST_SEED, OptionGroup
from pipelines.data.clips.clip_format import DEFAULT_LIMITS, ClipFormat, ClipLimits, FitPolicy
from pipelines.data.clips.hang_guard import MAX_HANG_S
from pipelines.data.making.caption_choice import CaptionChoice

if TYPE_CHECKING:
    from pipelines.data.checking.check import CheckOptions
    from pipelines.data.encoding.encode_options import EncodeOptions
    from pipelines.data.making.prepare import PrepareOptions
    from pipelines.data.shards.columns import OptionColumnNames
    from pipelines.media.inference import InferenceSettings

_DEFAULT_TOKENS = 512

ShardClips = Annotated[int, typer.Option(min=1, help="Most clips in a shard")]
MaxCaptionChars = Annotated[int, typer.Option(min=1, help="A longer caption is bad")]
MaxBadFraction = Annotated[
    float, typer.Option(min=0, max=1, help="Stop if a larger share of the clips is bad")
]
Processes = Annotated[
    int | None,
    typer.Option(
        min=0, max=1024, help="Number of processes; default: one per core; 0: this process alone"
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipFormatOptions(OptionGroup):
    """Format of the clips that are made; what is not given stays as it is."""

    num_frames: Annotated[
        int | None, typer.Option(min=1, max=2**17, help="Frames per clip; a shorter clip is bad")
    ] = None
    height: Annotated[int | None, typer.Option(min=1, max=2**14, help="Pixels")] = None
    width: Annotated[int | None, typer.Option(min=1, max=2**14, help="Pixels")] = None
    fps: Annotated[float | None, typer.Option(help="Frames per second, sampled by time")] = None
    policy: Annotated[
        FitPolicy,
        typer.Option(
            help="Pictures of another size are scaled side by side (resize), scaled and cut"
            " (crop), or bad (refuse)"
        ),
    ] = FitPolicy.CROP

    def wanted(self) -> ClipFormat:
        """Returns the format as far as it is given."""
        return ClipFormat(self.num_frames, self.height, self.width, self.fps, self.policy)

    def wanted_or(self, known: "InferenceSettings") -> ClipFormat:
        """Returns the format, completed by that of a model's clips."""
        return ClipFormat(
            num_frames=self.num_frames or known.num_frames,
            height=self.height or known.height,
            width=self.width or known.width,
            fps=known.fps if self.fps is None else self.fps,
            policy=self.policy,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipLimitOptions(OptionGroup):
    """Limits of a video, beyond which it is bad."""

    max_pixels: Annotated[
        int,
        typer.Option(min=1, help="A video with larger pictures is bad"),
    ] = DEFAULT_LIMITS.max_pixels
    max_frames: Annotated[
        int,
        typer.Option(min=1, help="A video with more frames is bad"),
    ] = DEFAULT_LIMITS.max_frames
    max_seconds: Annotated[
        float,
        typer.Option(min=0, help="A longer video is bad"),
    ] = DEFAULT_LIMITS.max_seconds
    max_decode_seconds: Annotated[
        float, typer.Option(min=0, help="A video that decodes longer is bad")
    ] = DEFAULT_LIMITS.max_decode_s
    max_hang_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            max=86400,
            help="A process in which one call of the decoder takes longer is ended, and the video"
            " is bad; 0 sets no limit",
        ),
    ] = MAX_HANG_S

    def limits(self) -> ClipLimits:
        """Limits of a clip; the limit of a single call of the decoder is passed on by itself."""
        return ClipLimits(
            self.max_pixels, self.max_frames, self.max_seconds, self.max_decode_seconds
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnOptions(OptionGroup):
    """Names of the columns of shards that others have made."""

    caption_column: Annotated[
        str | None,
        typer.Option(
            help="Column of captions; default: caption, or the only one of prompt and text"
        ),
    ] = None
    id_column: Annotated[
        str | None, typer.Option(help="Column of ids; default: sample_id, or ids of file and row")
    ] = None
    video_column: Annotated[
        str | None,
        typer.Option(help="Column of videos: bytes, or a struct of them; default: video"),
    ] = None

    def names(self) -> "OptionColumnNames":
        """Returns them as readers of shards take them."""
        from pipelines.data.shards.columns import OptionColumnNames

        return OptionColumnNames(self.caption_column, self.id_column, self.video_column)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareArguments(OptionGroup):
    """Options of `sgmd prepare`."""

    shard_clips: ShardClips = 512
    shard_mb: Annotated[
        int,
        typer.Option(min=1, help="A shard is closed at this size, in MiB"),
    ] = 256
    path_column: Annotated[
        str,
        typer.Option(
            help="Manifest: the video's path; path also finds the only one of file_name, filename,"
            " file_path, video_path and video"
        ),
    ] = "path"
    caption_column: Annotated[
        str | None,
        typer.Option(
            help="Manifest and JSON files: the caption; default: caption, or the only one of"
            " prompt and text"
        ),
    ] = None
    id_column: Annotated[
        str | None, typer.Option(help="Manifest: the sample id; default: the path")
    ] = None
    captions_only: Annotated[
        bool, typer.Option("--captions-only", help="Manifest: take the captions, no videos")
    ] = False
    captions: Annotated[
        CaptionChoice,
        typer.Option(
            help="If a clip has several captions: take the first usable one or a random one, and "
            "count the others in the summary; or make a row for each (all), with the ids ID#0, "
            "ID#1, ..."
        ),
    ] = CaptionChoice.FIRST
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of --captions random")
    ] = 0
    clip_format: ClipFormatOptions
    crf: Annotated[
        int, typer.Option(min=0, max=51, help="Quality of a new encoding; 0 is lossless")
    ] = 18
    decode: Annotated[
        bool, typer.Option("--decode-all/--decode-first", help="Frames that are tried")
    ] = True
    max_caption_chars: MaxCaptionChars = 4096
    max_clip_mb: Annotated[int, typer.Option(min=1, help="A larger file is bad, in MiB")] = 512
    clip_limits: ClipLimitOptions
    read_budget_seconds: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="Time that all tries of one read from S3 may take together, and a second more for"
            " each MiB; an object that is not served by then is bad, if others are",
        ),
    ] = DEFAULT_READ_BUDGET_S
    max_bad_fraction: MaxBadFraction = 0.01
    retry_bad: Annotated[bool, typer.Option("--retry-bad", help="Try rejected clips again")] = False
    processes: Processes = None

    def options(self) -> "PrepareOptions":
        """Returns them as `prepare` takes them."""
        from pipelines.data.making.prepare import PrepareOptions
        from pipelines.data.making.prepare_clip import ClipRules
        from pipelines.data.making.source_clip import Columns

        path = None if self.captions_only else self.path_column
        return PrepareOptions(
            columns=Columns(path, self.caption_column, self.id_column),
            rules=ClipRules(
                wanted=self.clip_format.wanted(),
                crf=self.crf,
                whole=self.decode,
                max_caption_chars=self.max_caption_chars,
                max_clip_bytes=self.max_clip_mb * 2**20,
                limits=self.clip_limits.limits(),
                captions=self.captions,
                seed=self.seed,
            ),
            shard_clips=self.shard_clips,
            shard_bytes=self.shard_mb * 2**20,
            max_bad_fraction=self.max_bad_fraction,
            retry_bad=self.retry_bad,
            num_processes=self.processes,
            max_hang_s=self.clip_limits.max_hang_seconds,
            s3=S3Settings(read_budget_s=self.read_budget_seconds),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckArguments(OptionGroup):
    """Options of `sgmd check`."""

    sample: Annotated[
        int | None, typer.Option(min=0, help="Rows to decode, drawn by seed; default: all")
    ] = None
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of --sample")] = 0
    model: Annotated[
        Path | None, typer.Option(help="Diffusers folder: also count the captions' tokens")
    ] = None
    text_length: Annotated[
        int | None,
        typer.Option(
            min=1, max=2**14, help="Tokens that the model takes; default: from its folder"
        ),
    ] = None
    max_caption_chars: MaxCaptionChars = 4096
    clip_limits: ClipLimitOptions
    max_bad_fraction: MaxBadFraction = 0.01
    columns: ColumnOptions
    write_index: Annotated[
        bool, typer.Option("--write-index", help="Rewrite _index.json for the present shards")
    ] = False
    processes: Processes = None

    def options(self) -> "CheckOptions":
        """Returns them as `check_shards` takes them; looks at the model, if there is one."""
        from pipelines.data.checking.check import CheckOptions

        count_tokens, text_length = self._tokens()
        return CheckOptions(
            sample=self.sample,
            seed=self.seed,
            max_caption_chars=self.max_caption_chars,
            limits=self.clip_limits.limits(),
            max_bad_fraction=self.max_bad_fraction,
            count_tokens=count_tokens,
            text_length=text_length,
            num_processes=self.processes,
            max_hang_s=self.clip_limits.max_hang_seconds,
            write_index=self.write_index,
            names=self.columns.names(),
        )

    def _tokens(self) -> tuple[Callable[[Sequence[str]], list[int]] | None, int]:
        """Counter of tokens, and how many the model takes."""
        if self.model is None:
            return None, _DEFAULT_TOKENS
        from pipelines.media.inference import read_inference_settings
        from pipelines.run.generator_folder import model_folder
        from workers.models.families import family_of

        folder = model_folder(self.model)
        tokenizer = family_of(folder).load_tokenizer(folder)
        length = self.text_length or read_inference_settings(folder).text_length
        return tokenizer.count_tokens, length


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeArguments(OptionGroup):
    """Options of `sgmd encode`."""

    model: Annotated[
        Path, typer.Option(help="Model folder; also gives the default size and rate of the clips")
    ]
    clip_format: ClipFormatOptions
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Make text embeddings alone; no video is read")
    ] = False
    text_length: Annotated[
        int | None, typer.Option(min=1, max=2**14, help="Text positions; longer captions are cut")
    ] = None
    dtype: Annotated[
        str, typer.Option(help="float32 keeps every bit; bfloat16 and float16 take half the room")
    ] = "float32"
    shard_clips: ShardClips = 256
    max_caption_chars: MaxCaptionChars = 4096
    clip_limits: ClipLimitOptions
    max_bad_fraction: MaxBadFraction = 0.01
    columns: ColumnOptions
    decoders: Annotated[int, typer.Option(min=1, help="Clips decoded side by side")] = 1
    video_encoders: Annotated[int, typer.Option(min=1, help="Actors with the autoencoder")] = 1
    video_gpus: Annotated[float, typer.Option(min=0, help="GPUs of each; 0.5 shares one")] = 0.0
    text_encoders: Annotated[int, typer.Option(min=1, help="Actors with the text encoder")] = 1
    text_gpus: Annotated[float, typer.Option(min=0, help="GPUs of each; 0.5 shares one")] = 0.0
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join: auto, HOST:PORT; default: start one")
    ] = None
    negative: Annotated[
        list[str] | None,
        typer.Option(
            help="Negative prompt to store with the empty one, may be repeated; default: that of"
            " the model's folder and of the shipped recipes that name such a folder"
        ),
    ] = None

    bucket: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HxWxF",
            help="Size of a set of several, as 480x832x81 (height, width, frames), may be repeated:"
            " each clip goes to the one that it fits best, in a folder of its own",
        ),
    ] = None

    def options(self, known: "InferenceSettings") -> "EncodeOptions":
        """Returns them as `encode` takes them; what is not given comes from the model's folder."""
        from pipelines.config.negatives import shipped_negatives
        from pipelines.data.encoding.encode_options import ActorPool, EncodeOptions, dtype_named

        negatives = self.negative
        if negatives is None:
            negatives = [known.negative_prompt, *shipped_negatives(self.model)]
        wanted = self.clip_format.wanted_or(known)
        buckets = self._buckets(wanted)
        return EncodeOptions(
            wanted=buckets[0] if buckets else wanted,
            buckets=buckets,
            text_length=self.text_length or known.text_length,
            dtype=dtype_named(self.dtype),
            shard_clips=self.shard_clips,
            max_caption_chars=self.max_caption_chars,
            limits=self.clip_limits.limits(),
            max_hang_s=self.clip_limits.max_hang_seconds,
            max_bad_fraction=self.max_bad_fraction,
            decoders=self.decoders,
            videos=ActorPool(self.video_encoders, self.video_gpus),
            captions=ActorPool(self.text_encoders, self.text_gpus),
            text_only=self.text_only,
            names=self.columns.names(),
            address=self.address,
            negatives=tuple(negatives),
        )

    def _buckets(self, wanted: ClipFormat) -> tuple[ClipFormat, ...]:
        """The formats of the buckets, with the rate and the policy of all.

        Raises:
            ConfigError: One is not a size, or a size of all clips is given besides.
        """
        from sgmd_core.errors import ConfigError

        given = self.clip_format
        sizes = {"--num-frames": given.num_frames, "--height": given.height, "--width": given.width}
        besides = [name for name, value in sizes.items() if value is not None]
        found: list[ClipFormat] = []
        for size in self.bucket or ():
            numbers = size.lower().split("x")
            if besides or len(numbers) != 3 or not all(each.isdecimal() for each in numbers):
                raise ConfigError(
                    "reading the option --bucket",
                    f"{size} with {', '.join(besides)}" if besides else size,
                    "height x width x frames, and no size of all clips",
                    "For example --bucket 480x832x81 --bucket 832x480x81",
                )
            height, width, num_frames = map(int, numbers)
            found.append(replace(wanted, num_frames=num_frames, height=height, width=width))
        return tuple(found)
