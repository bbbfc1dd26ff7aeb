"""A remembered set of clips that a disk has broken is sampled again instead of believed."""

import pytest
import torch

from pipelines.evaluation.clip_sets import load_clip_set, save_clip_set
from tests.helpers.logs import record_warnings
from workers.clip_sets import ClipSet
from workers.measured_clips import MeasuredClips


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_a_broken_set_counts_as_none(tmp_path, damage, monkeypatch):
    warnings = record_warnings("pipelines.evaluation.clip_sets", monkeypatch)
    path = tmp_path / "set.npz"
    assert load_clip_set(path) is None
    features = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    clips = MeasuredClips(features=features, measures={}, reading=None)
    save_clip_set(path, ClipSet(clips, (), torch.ones(2)))
    read = load_clip_set(path)
    assert read is not None
    assert torch.equal(read.clips.features, features)
    assert warnings == []
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-50], "empty": b"", "text": b"{}"}[damage])
    assert load_clip_set(path) is None
    assert "its clips are sampled again" in warnings[0]
