"""Options of `sgmd encode`."""

from dataclasses import dataclass, field
from typing import cast, get_args

from pipelines.data.clips.clip_format import ClipFormat, ClipLimits
from pipelines.data.clips.hang_guard import MAX_HANG_S, require_hang_limit
from pipelines.data.shards.columns import ColumnNames
from pipelines.data.shards.schema import DTypeName
from sgmd_core.errors import ConfigError
from workers.clip_settings import MAX_BUCKETS


@dataclass(frozen=True, slots=True)
class ActorPool:
    """The actors of one stage.

    Attributes:
        size: How many.
        gpus: GPUs of each; a fraction shares one.
    """

    size: int = 1
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """Options of encoding a set.

    Attributes:
        wanted: Frames, size and rate; all of them given, unless `text_only`.
        text_length: Text positions; longer captions are cut.
        dtype: Type in which latents and embeddings are stored.
        shard_clips: Most clips in a shard, as far as the source's row groups allow.
        max_caption_chars: A longer caption is bad.
        limits: What a video may ask for.
        max_hang_s: Time that one call of the decoder may take; 0: no limit.
        max_bad_fraction: The command stops where a larger share of the clips is bad.
        decoders: Tasks that read and decode at the same time, a core each.
        videos: Actors with the autoencoder.
        captions: Actors with the text encoder.
        text_only: Make text embeddings alone; no video is read.
        names: Names that the caller gives for the source's columns.
        address: Ray cluster to join; None starts one on this machine, or joins RAY_ADDRESS.
        negatives: Prompts that guidance may lead away from, stored beside the set with the empty
            one.
        buckets: Sizes of a set of several, of which `wanted` is one: each clip goes to the one that
            it fits best; see `ranked_buckets`.
    """

    wanted: ClipFormat
    text_length: int = 512
    dtype: DTypeName = "float32"
    shard_clips: int = 256
    max_caption_chars: int = 4096
    limits: ClipLimits = field(default_factory=ClipLimits)
    max_hang_s: float = MAX_HANG_S
    max_bad_fraction: float = 0.01
    decoders: int = 1
    videos: ActorPool = field(default_factory=ActorPool)
    captions: ActorPool = field(default_factory=ActorPool)
    text_only: bool = False
    names: ColumnNames = ColumnNames()
    address: str | None = None
    negatives: tuple[str, ...] = ()
    buckets: tuple[ClipFormat, ...] = ()

    def __post_init__(self) -> None:
        require_hang_limit(self.max_hang_s)
        for wanted in () if self.text_only else self.formats:
            if None in (wanted.num_frames, wanted.height, wanted.width, wanted.fps):
                raise ConfigError(
                    "reading the options of `sgmd encode`",
                    f"{wanted}",
                    "num_frames, height, width and fps",
                    "Latents of one set have one shape: give all four",
                )
        if len(self.buckets) > MAX_BUCKETS or len({*self.pixel_shapes}) < len(self.buckets):
            raise ConfigError(
                "reading the options of `sgmd encode`",
                ", ".join(label_of(shape) for shape in self.pixel_shapes),
                f"at most {MAX_BUCKETS} sizes, each of them once",
                "Give every --bucket once",
            )

    @property
    def formats(self) -> tuple[ClipFormat, ...]:
        """Formats of the clips that are made: of the buckets, or the one of all clips."""
        return self.buckets or (self.wanted,)

    @property
    def pools(self) -> tuple[ActorPool, ...]:
        """The pools that encoding starts."""
        return (self.captions,) if self.text_only else (self.videos, self.captions)

    @property
    def pixel_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """(frames, height, width, 3) of the clips of each format."""
        return tuple(
            (each.num_frames or 0, each.height or 0, each.width or 0, 3) for each in self.formats
        )

    @property
    def folders(self) -> tuple[str, ...]:
        """Folder of the clips of each format within the set's: none where there is one size."""
        return tuple(label_of(shape) for shape in self.pixel_shapes) if self.buckets else ("",)


def label_of(shape: tuple[int, ...]) -> str:
    """A size as people write it: height, width, frames."""
    num_frames, height, width, *_ = shape
    return f"{height}x{width}x{num_frames}"


def dtype_named(name: str) -> DTypeName:
    """The type of that name.

    Raises:
        ConfigError: values of that type are not stored.
    """
    known = get_args(DTypeName)
    if name not in known:
        raise ConfigError("reading the option --dtype", name, f"one of {', '.join(known)}")
    return cast("DTypeName", name)
