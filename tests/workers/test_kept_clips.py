"""A remembered set of clips that a disk has broken is sampled again instead of believed."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from threading import Event, Timer

import pytest
import torch

from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.worlds import WorldName
from sgmd_core.worlds.readings import read_clips
from tests.helpers.clip_samplers import REQUEST, CountingSampler
from tests.helpers.logs import record_warnings
from workers import measures
from workers.clip_sets import ClipRequest, ClipSet
from workers.clip_settings import VideoSettings
from workers.kept_clips import KeptClips, clip_facts, load_clip_set, save_clip_set, set_name
from workers.measured_clips import MeasuredClips
from workers.samplings import Sampling
from workers.settings import ModelSettings

ROOT = Path(__file__).parents[2]
VIDEO, SCHEDULE = VideoSettings(5, 16, 16, 8), FlowMatchSchedule()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_a_broken_set_counts_as_none(tmp_path, damage, monkeypatch):
    warnings = record_warnings("workers.kept_clips", monkeypatch)
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


@pytest.mark.parametrize("world", WorldName)
def test_what_was_read_of_an_embedded_world_comes_back(tmp_path, world):
    video = torch.rand(3, 3, 13, 32, 32, generator=torch.Generator().manual_seed(0))
    reading = read_clips(world, video)
    clips = MeasuredClips(features=torch.ones(3, 2), measures={}, reading=reading)
    save_clip_set(tmp_path / "set.npz", ClipSet(clips, (), torch.ones(2)))
    read = load_clip_set(tmp_path / "set.npz")
    assert read is not None
    assert type(read.clips.reading) is type(reading)
    for field in fields(reading):
        assert torch.equal(getattr(read.clips.reading, field.name), getattr(reading, field.name))


def test_a_kept_set_is_not_sampled_again_unless_something_that_decides_it_has_changed(tmp_path):
    sample = CountingSampler()
    facts = clip_facts(ModelSettings("model"), VIDEO, SCHEDULE)
    kept = KeptClips(str(tmp_path / "clips"), "digest", facts)
    first, again = kept.get(REQUEST, sample), kept.get(REQUEST, sample)
    assert (sample.made, first.remembered, again.remembered) == (1, False, True)
    assert torch.equal(first.clips.features, again.clips.features)
    assert torch.equal(first.clips.measures["flow"], again.clips.measures["flow"])
    assert (first.shown[0] == again.shown[0]).all()
    others = [
        (kept, REQUEST.twin(1)),
        (kept, REQUEST.sampled(Sampling(30, 4.0, 0))),
        (replace(kept, digest="another model"), REQUEST),
    ]
    for settings in (
        clip_facts(ModelSettings("x", encoder_dtype="fp32"), VIDEO, SCHEDULE),
        clip_facts(ModelSettings("x"), VideoSettings(9, 16, 16, 8), SCHEDULE),
        clip_facts(ModelSettings("x"), VIDEO, FlowMatchSchedule(shift=3.0)),
    ):
        others.append((replace(kept, facts=settings), REQUEST))
    for folder, request in others:
        folder.get(request, sample)
    assert sample.made == 1 + len(others)
    # The same folder of weights at another path is the same model.
    moved = clip_facts(ModelSettings("moved"), VIDEO, SCHEDULE)
    assert replace(kept, facts=moved).get(REQUEST, sample).remembered


def test_the_name_of_a_set_tells_the_measures_of_other_packages_and_their_versions(monkeypatch):
    names = [set_name("digest", REQUEST, ())]
    flow = measures.CLIP_MEASURES["flow"]
    for function in (flow, partial(flow), record_warnings):
        monkeypatch.setitem(measures.CLIP_MEASURES, "outside", function)
        names.append(set_name("digest", REQUEST, ()))
    for version in ("1.0", "1.1"):
        origin = ("outside", "my_package:A", "my-package", version)
        monkeypatch.setattr(measures, "OUTSIDE_ORIGINS", (origin,))
        names.append(set_name("digest", REQUEST, ()))
    # A function with some arguments given is of the same module, and the same version.
    assert names[1] == names[2]
    assert len(set(names)) == len(names) - 1


def test_of_those_that_want_a_set_at_once_one_samples_it(tmp_path, monkeypatch):
    monkeypatch.setattr("workers.kept_clips._AGAIN_S", 0.01)
    counting, began, may_go_on = CountingSampler(), Event(), Event()

    def sample(request: ClipRequest) -> ClipSet:
        began.set()
        assert may_go_on.wait(60)
        return counting(request)

    kept = KeptClips(str(tmp_path / "clips"), "digest", ())
    with ThreadPoolExecutor() as pool:
        first = pool.submit(kept.get, REQUEST, sample)
        assert began.wait(60)
        others = [pool.submit(kept.get, REQUEST, sample) for _ in range(2)]
        # Another set is nobody's.
        assert not kept.get(REQUEST.twin(1), CountingSampler()).remembered
        assert not any(other.done() for other in others)
        may_go_on.set()
    assert counting.made == 1
    assert [each.result().remembered for each in (first, *others)] == [False, True, True]
    assert {path.suffix for path in (tmp_path / "clips").iterdir()} == {".npz"}


HOLDS = """
import sys, time
from cluster.lease import hold
with hold(sys.argv[1], "a test"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_sampler_that_dies_or_takes_too_long_is_not_waited_for(tmp_path, monkeypatch):
    sample = CountingSampler()
    kept = KeptClips(str(tmp_path), "digest", ())
    lease = f"{tmp_path}/{set_name('digest', REQUEST, ())}.npz.lease"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, lease], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        monkeypatch.setattr("workers.kept_clips._AGAIN_S", 0.01)
        broken = tmp_path / lease.rpartition("/")[2].removesuffix(".lease")
        warnings = record_warnings("workers.kept_clips", monkeypatch)
        for is_impatient in (True, False):
            broken.write_text("no set")
            warnings.clear()
            with monkeypatch.context() as changed:
                if is_impatient:
                    changed.setattr("workers.kept_clips._GIVE_UP_S", 0.2)
                else:
                    Timer(0.2, other.kill).start()
                assert not kept.get(REQUEST, sample).remembered
            # Once each, however often it was looked.
            useless, waited = warnings[:2]
            assert "is broken" in useless
            assert f"process {other.pid}" in waited
            assert len(warnings) == 2 + is_impatient
        assert sample.made == 2
    finally:
        other.kill()
        other.communicate()


def test_a_folder_of_which_nothing_can_be_told_costs_a_warning(tmp_path, monkeypatch):
    warnings = record_warnings("workers.kept_clips", monkeypatch)
    # As with a folder above it that may not be searched, which stops no test that root runs.
    kept = KeptClips(f"{tmp_path}/{'x' * 300}", "digest", ())
    sample = CountingSampler()
    assert kept.get(REQUEST, sample).clips.features.shape == (1, 32)
    assert sample.made == 1
    assert any("may sample the same clips" in words for words in warnings)


def test_a_folder_that_takes_no_set_costs_a_warning(tmp_path, monkeypatch):
    warnings = record_warnings("workers.kept_clips", monkeypatch)
    (tmp_path / "file").write_text("")
    sample = CountingSampler()
    kept = KeptClips(str(tmp_path / "file"), "digest", ())
    assert kept.get(REQUEST, sample).clips.features.shape == (1, 32)
    assert kept.get(REQUEST, sample).clips.features.shape == (1, 32)
    assert sample.made == 2
    assert any("will be sampled again" in words for words in warnings)
