"""A checkpoint exists or it does not, on a disk and on an object store alike."""

import hashlib
import json

import fsspec
import pytest

from cluster.checkpoints import MANIFEST, Checkpoints
from cluster.errors import StorageError
from cluster.storage import read_text, write_json, write_text


def save(checkpoints: Checkpoints, step: int, *, commit: bool = True) -> None:
    write_text(f"{checkpoints.folder(step)}/role/weights", "w" * step)
    if commit:
        checkpoints.commit(step, {"iteration": step})


@pytest.mark.slow
def test_an_empty_run_has_no_checkpoint(root):
    assert Checkpoints(root).latest() is None
    assert Checkpoints(root).steps() == []


@pytest.mark.slow
def test_a_folder_without_manifest_is_no_checkpoint(root):
    checkpoints = Checkpoints(root)
    save(checkpoints, 10)
    save(checkpoints, 20, commit=False)
    assert checkpoints.latest() == 10
    digest = hashlib.sha256(b"w" * 10).hexdigest()
    assert checkpoints.manifest(10) == {
        "iteration": 10,
        "step": 10,
        "files": {"role/weights": 10},
        "sha256": {"role/weights": digest},
    }
    save(checkpoints, 20)
    assert checkpoints.latest() == 20


@pytest.mark.slow
def test_a_part_torn_or_lost_after_the_commit_is_noticed(root):
    checkpoints = Checkpoints(root)
    for step in (10, 20, 30):
        save(checkpoints, step)
    write_text(f"{checkpoints.folder(20)}/role/weights", "w")
    files, path = fsspec.core.url_to_fs(f"{checkpoints.folder(30)}/role/weights")
    files.rm_file(path)
    assert checkpoints.steps() == [10]
    assert checkpoints.latest() == 10


def test_nothing_can_be_committed_before_its_parts(root):
    with pytest.raises(StorageError, match="no files in"):
        Checkpoints(root).commit(10, {})


def test_nothing_is_committed_with_a_written_part_missing(root):
    checkpoints = Checkpoints(root)
    write_text(f"{checkpoints.folder(10)}/role/weights", "w")
    with pytest.raises(StorageError, match="no role/moments in"):
        checkpoints.commit(10, {}, {"role/weights": "1", "role/moments": "2"})
    assert checkpoints.latest() is None


@pytest.mark.slow
def test_pruning_keeps_the_newest_and_what_is_being_written(root):
    checkpoints = Checkpoints(root)
    for step in (10, 20, 30, 40):
        save(checkpoints, step)
    save(checkpoints, 15, commit=False)
    save(checkpoints, 50, commit=False)
    checkpoints.prune(keep=2)
    assert checkpoints.steps() == [30, 40]
    assert read_text(f"{checkpoints.folder(50)}/role/weights") == "w" * 50
    with pytest.raises(StorageError):
        read_text(f"{checkpoints.folder(15)}/role/weights")


@pytest.mark.slow
def test_pruning_spares_what_it_is_told_to(root):
    checkpoints = Checkpoints(root)
    for step in (10, 20, 30, 40):
        save(checkpoints, step)
    checkpoints.prune(keep=1, spared={20, 99})
    assert checkpoints.steps() == [20, 40]


def test_steps_are_ordered_as_numbers(root):
    checkpoints = Checkpoints(root)
    for step in (999_999, 1_000_000):
        write_text(f"{checkpoints.folder(step)}/part", "x")
        checkpoints.commit(step, {})
    assert checkpoints.latest() == 1_000_000


def damaged(checkpoints: Checkpoints, name: str, content: str) -> str:
    """What is said of checkpoint 20 once one of its files has another content."""
    for step in (10, 20):
        save(checkpoints, step)
    assert checkpoints.fault(20, contents=True) == ""
    write_text(f"{checkpoints.folder(20)}/{name}", content)
    return checkpoints.fault(20, contents=True)


def test_a_part_of_the_same_size_with_one_other_bit_is_noticed(root):
    checkpoints = Checkpoints(root)
    fault = damaged(checkpoints, "role/weights", "w" * 19 + "v")
    assert fault.startswith("role/weights is not what was written (sha256 ")
    assert checkpoints.fault(20) == "", "sizes alone do not tell"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "no JSON"),
        ('{"iteration": 20, "fil', "no JSON"),
        ("\0" * 40, "no JSON"),
        ("{}", "names no parts"),
        ("[]", "names no parts"),
        ("null", "names no parts"),
        ('{"files": 3}', "files does not give each part its int"),
        ('{"files": {"role/weights": "20"}}', "files does not give each part its int"),
        ('{"files": {"role/weights": 20}, "sha256": []}', "sha256 does not give each part its str"),
        ('{"files": {"role/weights": 20}, "step": 10}', "that of step 10"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_a_fault_and_the_state_before_counts(
    tmp_path, content, fault
):
    checkpoints = Checkpoints(str(tmp_path))
    assert fault in damaged(checkpoints, MANIFEST, content)
    assert checkpoints.latest() == 10
    assert checkpoints.steps() == [10]


def test_a_checkpoint_of_another_step_does_not_take_its_place(root):
    checkpoints = Checkpoints(root)
    for step in (10, 20):
        save(checkpoints, step)
    files, path = fsspec.core.url_to_fs(root)
    files.rm(f"{path}/step-000020", recursive=True)
    files.cp(f"{path}/step-000010", f"{path}/step-000020", recursive=True)
    assert checkpoints.fault(20) == "manifest.json is that of step 10"


def test_digests_of_those_who_wrote_the_parts_are_kept_and_others_are_computed(root):
    checkpoints = Checkpoints(root)
    for name in ("one", "other"):
        write_text(f"{checkpoints.folder(5)}/{name}", name)
    checkpoints.commit(5, {}, {"one": "0" * 64})
    other = hashlib.sha256(b"other").hexdigest()
    assert checkpoints.manifest(5)["sha256"] == {"one": "0" * 64, "other": other}
    assert checkpoints.fault(5, contents=True).startswith("one is not what was written")


def test_a_checkpoint_of_an_older_version_is_whole_by_its_sizes(root):
    checkpoints = Checkpoints(root)
    save(checkpoints, 10)
    write_json(
        f"{checkpoints.folder(10)}/{MANIFEST}", {"iteration": 10, "files": {"role/weights": 10}}
    )
    assert checkpoints.fault(10, contents=True) == ""
    assert not checkpoints.has_digests(10)
    save(checkpoints, 20)
    assert checkpoints.has_digests(20)


def test_a_checkpoint_that_is_set_aside_counts_no_longer_and_keeps_its_parts(root):
    checkpoints = Checkpoints(root)
    for step in (10, 20):
        save(checkpoints, step)
    checkpoints.set_aside(20)
    assert checkpoints.steps() == [10]
    assert read_text(f"{checkpoints.folder(20)}/role/weights") == "w" * 20
    assert json.loads(read_text(f"{checkpoints.folder(20)}/{MANIFEST}.broken"))["step"] == 20


def test_what_an_earlier_attempt_left_is_gone_before_the_next_one_writes(root):
    checkpoints = Checkpoints(root)
    save(checkpoints, 10)
    write_text(f"{checkpoints.folder(10)}/old", "of another attempt")
    checkpoints.begin(10)
    assert checkpoints.latest() is None
    save(checkpoints, 10)
    assert set(checkpoints.manifest(10)["files"]) == {"role/weights"}
