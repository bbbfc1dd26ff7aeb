"""Each clip goes to the bucket that it fits best."""

import numpy as np
import pytest

from pipelines.data.clips.bucket_choice import BucketDecoder, ranked_buckets
from pipelines.data.clips.clip_decoding import ClipFacts, decode_clip
from pipelines.data.clips.clip_errors import ClipError
from pipelines.data.clips.clip_format import ClipFormat, FitPolicy
from pipelines.media.video import encode_mp4

WIDE, TALL, SHORT, LARGE = range(4)
BUCKETS = [
    ClipFormat(81, 480, 832, 16),
    ClipFormat(81, 832, 480, 16),
    ClipFormat(33, 480, 832, 16),
    ClipFormat(81, 720, 1248, 16),
]


def clip(height: int, width: int, seconds: float = 10.0) -> ClipFacts:
    return ClipFacts(height, width, round(24 * seconds), seconds, 24.0, True, "h264", False)


@pytest.mark.parametrize(
    ("facts", "best"),
    [
        (clip(1080, 1920), LARGE),
        (clip(480, 832), WIDE),  # the larger one would enlarge it
        (clip(360, 640), WIDE),  # both would, this one by less
        (clip(1920, 1080), TALL),
        (clip(1080, 1920, 3.0), SHORT),  # 48 frames at 16 a second
        (clip(500, 500), WIDE),  # as far from each shape: the first of those that keep most
    ],
)
def test_a_clip_goes_where_least_is_cut_off_and_nothing_is_made_up(
    facts: ClipFacts, best: int
) -> None:
    assert ranked_buckets(facts, BUCKETS)[0] == best


def test_a_clip_that_is_too_short_for_all_goes_nowhere() -> None:
    assert ranked_buckets(clip(1080, 1920, 2.0), BUCKETS) == []


def test_a_policy_that_refuses_leaves_the_buckets_of_the_clips_own_size() -> None:
    strict = [
        ClipFormat(each.num_frames, each.height, each.width, 16, FitPolicy.REFUSE)
        for each in BUCKETS
    ]
    assert ranked_buckets(clip(480, 832), strict) == [WIDE, SHORT]
    assert ranked_buckets(clip(480, 830), strict) == []


SMALL = (ClipFormat(9, 16, 16, 8), ClipFormat(5, 16, 32, 8), ClipFormat(5, 16, 16, 8))


@pytest.mark.parametrize(
    ("shape", "bucket"), [((12, 32, 32), 0), ((9, 16, 32), 1), ((7, 16, 16), 2)]
)
def test_pixels_are_those_of_the_bucket_alone(shape: tuple[int, int, int], bucket: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    data = encode_mp4(frames, 8)
    found = BucketDecoder(SMALL)(data)
    assert np.array_equal(found, decode_clip(data, SMALL[bucket]))


def test_a_clip_that_fits_nowhere_says_why() -> None:
    short = encode_mp4(np.zeros((3, 16, 16, 3), np.uint8), 8)
    with pytest.raises(ClipError, match="enough for 3 frames"):
        BucketDecoder(SMALL)(short)
    refusing = tuple(
        ClipFormat(each.num_frames, each.height, each.width, 8, FitPolicy.REFUSE) for each in SMALL
    )
    with pytest.raises(ClipError, match="a picture of 24x24"):
        BucketDecoder(refusing)(encode_mp4(np.zeros((9, 24, 24, 3), np.uint8), 8))
