"""Results are written where they last: not into the package of a Ray job, and without secrets."""

import importlib
import subprocess
from pathlib import Path

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.distillation.preflight import run_preflight
from pipelines.evaluation.run import evaluate
from pipelines.generate import generate
from pipelines.reporting.page import write_report
from pipelines.run import revision
from pipelines.run.outputs import require_lasting_folder
from pipelines.run.revision import REVISION_VARIABLE, git_revision
from sgmd_core.errors import ConfigError

TINY = Path(__file__).parents[3] / "assets" / "tiny-wan"


KEY = "s3://user:" + "a-secret-key@bucket/runs"


@pytest.mark.parametrize(
    "write",
    [
        lambda: generate(TINY, ["a red circle"], output=KEY),
        lambda: evaluate(TINY, teacher=TINY, captions="data", output=KEY),
        lambda: write_report(["runs/demo"], f"{KEY}/report.html"),
        lambda: require_lasting_folder(KEY, "output"),
    ],
    ids=["generate", "evaluate", "report", "any"],
)
def test_an_address_with_a_key_in_it_is_refused_and_not_shown(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="a user or a key in the address") as caught:
        write()
    assert "a-secret-key" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_of_address_is_refused():
    with pytest.raises(ConfigError, match="Protocol not known: nowhere"):
        require_lasting_folder("nowhere://bucket/runs", "output")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("$SCRATCH/runs", r"\$SCRATCH, which nothing replaces"),
        ("/data/${USER}", r"\$\{USER\}, which nothing"),
        ("s3://bucket/$NAME", r"\$NAME, which nothing"),
        ("runs-$SET_HERE", r"\$SET_HERE, which nothing"),
        ("/data/x-${USER}", r"\$\{USER\}, which nothing"),
        ("/data/x-${USER:-me}", r"\$\{USER:-me\}, which nothing"),
        ("/data/$(whoami)/x", r"\$\(whoami\), which nothing"),
        ("~nosuch-user/runs", "~nosuch-user, the home of a user"),
        ("''", "an empty path"),
        ("' '", "begins with a blank"),
    ],
)
def test_a_place_that_a_shell_was_meant_to_write_out_is_refused(given, words, monkeypatch):
    monkeypatch.setenv("SET_HERE", "1")
    with pytest.raises(ConfigError, match=words):
        run_preflight(load_recipe("tiny", [f"output={given}"]))


def test_names_with_such_signs_inside_are_names(tmp_path):
    named = tmp_path / "a$b" / "c~d e"
    output = load_recipe("tiny", [f"output={named}"]).output
    require_lasting_folder(output, "output")
    assert output == str(named), "nothing in it is replaced"


def test_the_package_folder_of_a_job_is_refused(tmp_path, monkeypatch):
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    with pytest.raises(ConfigError, match="deletes with the job"):
        run_preflight(load_recipe("tiny", ["output=runs"]))
    require_lasting_folder(tmp_path / "runs", "output")


def test_a_job_knows_the_revision_that_was_submitted(monkeypatch):
    monkeypatch.setenv(REVISION_VARIABLE, "abc123+changes")
    assert git_revision() == "abc123+changes"


def test_the_own_tree_has_the_revision_that_git_names(monkeypatch):
    monkeypatch.delenv(REVISION_VARIABLE, raising=False)
    ours = git_revision(Path(revision.__file__).parent)
    assert (git_revision(), git_revision()) == (ours, ours)
    assert git_revision(Path("/")) == ""


def test_a_git_that_does_not_answer_is_asked_again(monkeypatch):
    monkeypatch.delenv(REVISION_VARIABLE, raising=False)
    ours = git_revision(Path(revision.__file__).parent)
    # As a process that has not looked yet.
    fresh = importlib.reload(revision)

    def be_late(command, **_):
        raise subprocess.TimeoutExpired(command, 10)

    with monkeypatch.context() as late:
        late.setattr(subprocess, "run", be_late)
        assert fresh.git_revision() == ""
    assert fresh.git_revision() == ours
