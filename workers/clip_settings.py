"""Settings of clips: their size, or several sizes that are trained."""

from dataclasses import dataclass, field

from workers.network_settings import (
    require_setting,
)

MAX_BUCKETS = 64


@dataclass(frozen=True, slots=True)
class Bucket:
    """One of the sizes of clips that are trained.

    Attributes:
        num_frames: Video frames a clip.
        height: Pixels.
        width: Pixels.
        weight: Its share of the iterations is this over the sum of all weights.
    """

    num_frames: int
    height: int
    width: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, value in zip(("num_frames", "height", "width"), self.size, strict=True):
            require_setting(value >= 1, f"video.buckets.{name}", value, "at least 1")
        require_setting(
            0 < self.weight <= 1e6, "video.buckets.weight", self.weight, "above 0, at most 1e6"
        )

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height, width."""
        return self.num_frames, self.height, self.width

    @property
    def label(self) -> str:
        """The size as people write it: height, width, frames."""
        return f"{self.height}x{self.width}x{self.num_frames}"


@dataclass(frozen=True, slots=True)
class VideoSettings:
    """The clips that are made.

    Attributes:
        num_frames: Video frames a clip.
        height: Pixels.
        width: Pixels.
        fps: Frames a second.
        buckets: Sizes that are trained: every iteration draws one by weight. The size above, which
            is validated and exported, is one of them. Without any it is the only one.
    """

    num_frames: int
    height: int
    width: int
    fps: int
    # Not in its text, under which clips are kept: they depend on their own size alone.
    buckets: tuple[Bucket, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Checks the values."""
        require_setting(self.num_frames >= 1, "video.num_frames", self.num_frames, "at least 1")
        require_setting(self.height >= 1, "video.height", self.height, "at least 1")
        require_setting(self.width >= 1, "video.width", self.width, "at least 1")
        require_setting(self.fps >= 1, "video.fps", self.fps, "at least 1")
        labels = [bucket.label for bucket in self.buckets]
        require_setting(
            len(labels) <= MAX_BUCKETS, "video.buckets", len(labels), f"at most {MAX_BUCKETS}"
        )
        twice = next((label for label in labels if labels.count(label) > 1), None)
        require_setting(
            twice is None, "video.buckets", f"{twice} twice", "every size once, with its weight"
        )
        own = Bucket(*self.size)
        require_setting(
            not labels or own.label in labels,
            "video.buckets",
            ", ".join(labels),
            f"{own.label} among them, the size that is validated and exported "
            "(video.height x video.width x video.num_frames)",
        )

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height, width of the clips that are validated and exported."""
        return self.num_frames, self.height, self.width

    @property
    def trained(self) -> tuple[Bucket, ...]:
        """The sizes that are trained: the buckets, or the one size of all clips."""
        return self.buckets or (Bucket(*self.size),)

    @property
    def bucket_weights(self) -> tuple[float, ...]:
        """Weights of the sizes that are trained."""
        return tuple(bucket.weight for bucket in self.trained)
