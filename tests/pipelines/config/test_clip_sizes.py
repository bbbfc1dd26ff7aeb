"""Sizes that the pipeline of a family samples."""

import pytest

from pipelines.config.clip_sizes import require_samplable
from sgmd_core.errors import ShapeError
from tests.helpers.logs import record_warnings
from workers.clip_settings import Bucket, VideoSettings
from workers.models.wan_family import WAN_TRAITS


def test_a_size_of_ones_own_that_the_pipeline_refuses_is_warned_of_and_one_of_buckets_refused(
    monkeypatch,
):
    rules = WAN_TRAITS.sampling
    told = record_warnings("pipelines.config.clip_sizes", monkeypatch)
    require_samplable(VideoSettings(9, 480, 832, 16), rules)
    assert not told
    require_samplable(VideoSettings(9, 24, 32, 16), rules)
    (words,) = told
    assert "multiples of 16" in words
    assert "24x32" in words
    own, other = Bucket(9, 32, 32, 1), Bucket(9, 24, 32, 1)
    with pytest.raises(ShapeError, match=r"buckets\[1\]"):
        require_samplable(VideoSettings(9, 32, 32, 16, (own, other)), rules)
