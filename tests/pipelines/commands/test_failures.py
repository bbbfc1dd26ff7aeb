"""The outermost layer of the command line: one sentence, details in a file, no key anywhere."""

import errno
import os
import re
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest

from cluster.errors import ClusterError, LeaseError
from pipelines.commands.failures import hinting, report_failure
from sgmd_core.errors import ConfigError, DataError

HINT = "The run goes on with: sgmd distill --resume runs/tiny"


@pytest.fixture(autouse=True)
def folder_of_details(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def raised(error: BaseException) -> BaseException:
    """The error with a traceback."""
    try:
        raise error
    except BaseException as caught:
        return caught


def test_an_error_that_nobody_foresaw_is_one_sentence_and_a_file_with_its_traceback(capsys):
    code = report_failure(raised(KeyError("weights")), "report", ["report", "runs/tiny"])
    said = capsys.readouterr().err
    assert code == 1
    assert said.startswith("sgmd report failed with KeyError: 'weights'.")
    assert len(said.splitlines()) == 1
    named = re.search(r"details are in (\S+\.txt)\.", said)
    assert named is not None
    details = Path(named[1])
    text = details.read_text()
    assert "Traceback (most recent call last)" in text
    assert "arguments: report runs/tiny" in text
    assert details.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "Check the path and the rights to it"),
        (errno.EROFS, "mounted read-only"),
        (errno.ENOSPC, "Free space there"),
        (errno.EIO, "Check the path and the rights to it"),
    ],
)
def test_a_disk_or_its_rights_fail_in_words_wherever_a_command_meets_them(
    capsys, folder_of_details, number, words
):
    error = OSError(number, os.strerror(number), "/runs/tiny/config.yaml")
    error.add_note(HINT)
    assert report_failure(raised(error), "report", []) == 1
    said = capsys.readouterr().err
    assert "While running sgmd report: " in said
    assert "/runs/tiny/config.yaml" in said
    assert words in said
    assert said.endswith(f"{HINT}\n")
    assert not list(folder_of_details.iterdir())
    # One that a mistake of ours may have made keeps its traceback.
    report_failure(raised(FileNotFoundError(errno.ENOENT, "x", "/runs")), "report", [])
    assert len(list(folder_of_details.iterdir())) == 1


def test_a_full_disk_that_names_no_path_is_told_with_the_room_where_a_command_writes(
    capsys, folder_of_details
):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    full.add_note("raised in save() of generator rank 0, iteration 4")
    arguments = ["distill", "tiny", f"output={folder_of_details}/runs"]
    assert report_failure(raised(full), "distill", arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("StoreRefusedError: While running sgmd distill: OSError: [Errno 28] ")
    assert f"{folder_of_details} has " in said
    assert said.endswith("raised in save() of generator rank 0, iteration 4\n")
    assert not list(folder_of_details.iterdir())
    report_failure(raised(OSError(errno.EIO, os.strerror(errno.EIO))), "distill", [])
    assert "details are in" in capsys.readouterr().err


def test_a_disk_whose_room_cannot_be_measured_is_left_out(capsys, monkeypatch):
    def fail(folder):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(folder))

    monkeypatch.setattr(shutil, "disk_usage", fail)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert report_failure(raised(full), "distill", []) == 1
    said = capsys.readouterr().err
    assert said.startswith("StoreRefusedError: While running sgmd distill: OSError: [Errno 28] ")
    assert "()" not in said


def test_the_disk_where_ray_spills_is_told(capsys, monkeypatch, tmp_path):
    # A disk of its own for each path, which one machine need not have.
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**41, 2**41 - 2**40, 2**40))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    stat = Path.stat

    def stat_of_own_disk(path, **options):
        found = stat(path, **options)
        fields = list(found)
        fields[2] = hash(str(path))
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "stat", stat_of_own_disk)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert report_failure(raised(full), "distill", []) == 1
    assert f"{tmp_path} has 1.0 TiB free of 2.0 TiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("encode", "Shards that are whole are kept: the same command goes on from there."),
        ("plan", "The same command begins again."),
    ],
)
def test_a_stopped_command_says_what_is_kept_and_how_it_goes_on(capsys, command, words):
    assert report_failure(raised(KeyboardInterrupt()), command, [], 15) == 143
    said = capsys.readouterr().err
    assert said == f"Interrupted: sgmd {command} was stopped by SIGTERM.\n{words}\n"
    noted = KeyboardInterrupt()
    noted.add_note(HINT)
    report_failure(noted, command, [], 15)
    assert capsys.readouterr().err.splitlines()[1:] == [HINT]


def test_keys_of_the_environment_are_in_neither(capsys, monkeypatch, folder_of_details):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    error = RuntimeError("0123456789abcdef and hf_abcdefgh were refused by https://me:pw@host")
    report_failure(raised(error), "distill", ["distill", "x=hf_abcdefgh"])
    (details,) = folder_of_details.glob("sgmd-distill-*.txt")
    for text in (capsys.readouterr().err, details.read_text()):
        assert "*** and *** were refused by https://***@host" in text
        assert "hf_abcdefgh" not in text
        assert "0123456789abcdef" not in text


def test_a_key_in_a_known_error_is_blotted_out_too(capsys, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-somebody")
    report_failure(raised(DataError("reading", "secret-of-somebody refused")), "check", [])
    assert "*** refused" in capsys.readouterr().err


def test_a_folder_for_details_that_takes_no_file_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert report_failure(raised(TypeError("no")), "plan", []) == 1
    said = capsys.readouterr().err
    assert "sgmd --debug shows the traceback" in said


def test_an_error_without_words_still_says_which_it_was(capsys):
    report_failure(raised(AssertionError()), "plan", [])
    assert "AssertionError: no further words." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("reading", "nothing"), 2),
        (DataError("reading", "nothing"), 2),
        (ClusterError("asking", "nothing", "an answer"), 1),
        (OSError("no space left on device"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes_tell_wrong_requests_failures_and_interruptions_apart(error, code):
    assert report_failure(raised(error), "distill", []) == code


class TestHints:
    @pytest.mark.parametrize(
        "error", [ClusterError("a", "b", "c"), OSError("disk"), KeyboardInterrupt()]
    )
    def test_a_run_that_was_started_points_to_its_resume(self, error, capsys):
        with pytest.raises(type(error)) as caught, hinting(lambda: HINT):
            raise error
        report_failure(caught.value, "distill", [])
        assert HINT in capsys.readouterr().err

    @pytest.mark.parametrize(
        "error",
        [ConfigError("reading", "nothing"), LeaseError("writing", "another process", "none")],
        ids=["wrong request", "folder of another process"],
    )
    def test_a_refused_start_gets_no_hint(self, error, capsys):
        with pytest.raises(type(error)) as caught, hinting(lambda: HINT):
            raise error
        report_failure(caught.value, "distill", [])
        assert HINT not in capsys.readouterr().err

    def test_an_error_that_names_the_resume_itself_is_left_alone(self):
        own = ClusterError("a", "b", "c", "Go on with sgmd distill --resume runs/tiny")
        with pytest.raises(ClusterError) as caught, hinting(lambda: HINT):
            raise own
        assert not getattr(caught.value, "__notes__", [])
