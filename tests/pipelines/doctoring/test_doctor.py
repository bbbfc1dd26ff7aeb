"""`sgmd doctor`: what it looks at, and what it makes of what it finds."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from cluster.inventory import memory_bytes
from pipelines.config.recipe import load_recipe
from pipelines.doctoring.examine import examine
from pipelines.doctoring.findings import Finding, Status
from tests.helpers.forked_python import forked_python


def finding(name: str, **places: str) -> Finding:
    return next(item for item in examine(**places) if item.name.startswith(name))


def test_this_machine_can_run_the_tests():
    missing = [item for item in examine() if item.status is Status.MISSING]
    assert missing == []


def test_every_finding_that_is_not_good_says_what_to_do():
    assert all(item.remedy for item in examine() if item.status is not Status.GOOD)


def test_the_video_codec_is_tried_not_looked_up():
    assert finding("H.264").found == "encodes and decodes"


def test_packages_are_held_against_their_lower_bounds():
    assert "torch" in finding("packages").found


def test_free_memory_is_part_of_all_memory():
    total, free = memory_bytes()
    assert 0 < free <= total


def test_a_storage_folder_is_written_to_and_left_clean(tmp_path: Path):
    found = finding("storage", storage=str(tmp_path / "deep" / "folder"))
    assert found.status is Status.GOOD
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    assert finding("storage", storage=str(tmp_path / "there" / "new")).status is Status.GOOD
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_recipe_says_which_storage_to_try(tmp_path: Path):
    config = load_recipe("tiny", [f"output={tmp_path / 'runs'}"])
    found = [each for each in examine(config=config) if each.name.startswith("storage")]
    assert [each.name for each in found] == [f"storage {tmp_path / 'runs'}"]
    assert "lists" in found[0].found


def test_models_of_a_recipe_and_of_the_command_line_are_read(tmp_path: Path):
    found = examine(config=load_recipe("tiny", []), model=str(tmp_path / "none"))
    named, own = [each for each in found if each.name.startswith("model")]
    assert (named.status, named.found) == (Status.MISSING, "no such folder")
    assert own.status is Status.GOOD
    assert re.match(r"wan: transformer 1\.08 M, .* parameters", own.found)


def test_the_address_of_a_dashboard_is_answered_with_what_to_do():
    (found,) = examine(address="http://head:8265")
    assert found.status is Status.MISSING
    assert "ray job submit --address http://head:8265" in found.remedy


def test_a_storage_that_cannot_be_written_is_missing_and_says_why(tmp_path: Path):
    (tmp_path / "file").write_text("")
    found = finding("storage", storage=str(tmp_path / "file" / "folder"))
    assert found.status is Status.MISSING
    assert "file" in found.found
    assert found.remedy == "Check the folder and the rights to it"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_storage_of_an_unknown_kind_is_missing():
    assert finding("storage", storage="nonsense://x").status is Status.MISSING


@pytest.mark.parametrize("address", [None, "http://head:8265"])
def test_an_address_with_a_key_is_not_tried_and_the_key_not_told(address: str | None):
    place = "s3://ME:planted0key@bucket/runs"
    found = examine(address=address, storage=place, model=place)
    (storage,) = [each for each in found if each.name == "storage s3://***@bucket/runs"]
    (model,) = [each for each in found if each.name == "model s3://***@bucket/runs"]
    assert storage.status is model.status is Status.MISSING
    assert "planted" not in repr(found)


def test_a_long_temporary_folder_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert finding("temporary folder").status is Status.LIMITED


@pytest.mark.ray
def test_a_cluster_that_does_not_answer_is_missing():
    # In a process of its own: one that other tests have connected to Ray asks nobody.
    command = [forked_python(), "-m", "pipelines.cli", "doctor", "--address", "127.0.0.1:1"]
    result = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, check=False, timeout=200
    )
    rows = json.loads(result.stdout)
    row = next(row for row in rows if "127.0.0.1:1" in row["check"])
    assert row["status"] == Status.MISSING.value
    assert result.returncode == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_wrong_token_is_told_before_ray_tries_it():
    import ray

    address = ray.get_runtime_context().gcs_address
    result = subprocess.run(
        [forked_python(), "-m", "pipelines.cli", "doctor", "--address", address, "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "RAY_AUTH_TOKEN": "wrong"},
    )
    (row,) = json.loads(result.stdout)
    assert (row["status"], result.returncode) == (Status.MISSING.value, 1)
    assert "it refuses this token" in row["found"]
    assert "RAY_AUTH_TOKEN" in row["remedy"]


@pytest.mark.ray
def test_a_cluster_that_answers_is_counted(ray_cluster: None):
    # A process that is connected stays so: the address is not used a second time.
    found = finding("Ray", address="auto")
    assert found.status is Status.GOOD
    assert "4 CPUs" in found.found
