"""The bucket that a clip fits best, of several sizes and numbers of frames.

    cost = |ln(aspect of the clip / aspect of the bucket)| + max(0, ln(enlargement))

Of the buckets that the clip is long enough for, those count whose cost is within 0.05 of the least:
about as much of the picture that a crop cuts off. Of these the one with most pixels, over all its
frames, keeps most of the clip.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from pipelines.data.clips.clip_decoding import ClipFacts, decode_clip, read_first_frame
from pipelines.data.clips.clip_errors import ClipError, ClipFault
from pipelines.data.clips.clip_format import ClipFormat, ClipLimits, FitPolicy, samples_before
from pipelines.media.video import Pixels

_AS_GOOD = 0.05


def ranked_buckets(facts: ClipFacts, buckets: Sequence[ClipFormat]) -> list[int]:
    """Numbers of the buckets that a clip may fill, the best one first.

    Args:
        facts: Size and length of the clip.
        buckets: Formats with frames, height, width and rate; their policy `refuse` leaves only
            those of the clip's own size.

    Returns:
        Each bucket that its length, as its header states it, is enough for.
    """
    costs = {
        number: _cost(facts, bucket)
        for number, bucket in enumerate(buckets)
        if _frames_at(facts, bucket) >= _size(bucket)[0]
        and (bucket.policy is not FitPolicy.REFUSE or _size(bucket)[1:] == _picture(facts))
    }
    least = min(costs.values(), default=0.0)
    return sorted(
        costs,
        key=lambda number: (
            (0.0, -math.prod(_size(buckets[number])))
            if costs[number] <= least + _AS_GOOD
            else (costs[number], 0.0)
        ),
    )


@dataclass(frozen=True, slots=True)
class BucketDecoder:
    """Decodes each file to the bucket that it fits best; a `Source.decode` of several shapes.

    Attributes:
        buckets: Formats with frames, height, width and rate.
        limits: What a file may ask for.
    """

    buckets: tuple[ClipFormat, ...]
    limits: ClipLimits = field(default_factory=ClipLimits)

    def __call__(self, data: bytes, fps: float = 0.0) -> Pixels:
        """Pixels of one file, in the shape of one of the buckets.

        Raises:
            ClipError: It cannot be decoded, or fits none.
        """
        facts = read_first_frame(data, self.limits, whole=False)
        # Some headers do not know their length; what they promise may not be there either.
        any_length = replace(facts, duration_s=float(self.limits.max_seconds))
        for number in ranked_buckets(facts, self.buckets) or ranked_buckets(
            any_length, self.buckets
        ):
            try:
                return decode_clip(data, self.buckets[number], self.limits)
            except ClipError as error:
                if error.fault != ClipFault.TOO_SHORT:
                    raise
        # In none: the shortest one says why.
        shortest = min(self.buckets, key=lambda bucket: bucket.num_frames or 0)
        return decode_clip(data, shortest, self.limits)


def _size(bucket: ClipFormat) -> tuple[int, int, int]:
    return bucket.num_frames or 0, bucket.height or 0, bucket.width or 0


def _picture(facts: ClipFacts) -> tuple[int, int]:
    return facts.height, facts.width


def _frames_at(facts: ClipFacts, bucket: ClipFormat) -> int:
    """Frames that a clip has at the rate of a bucket."""
    return samples_before(Fraction(facts.duration_s), Fraction(bucket.fps or facts.fps))


def _cost(facts: ClipFacts, bucket: ClipFormat) -> float:
    _, height, width = _size(bucket)
    aspect = math.log(facts.width / facts.height) - math.log(width / height)
    enlargement = max(height / facts.height, width / facts.width)
    return abs(aspect) + max(0.0, math.log(enlargement))
