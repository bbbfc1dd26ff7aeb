"""Requests of jobs, checked where they are made: what goes along, what is refused, what is left."""

import os
import signal
from pathlib import PurePosixPath

import pytest

from cluster.job_files import is_ignored
from pipelines.config.model_folders import PROJECT_ROOT
from pipelines.config.recipe import load_recipe
from pipelines.run.stopping import STOP_SIGNALS
from pipelines.shapes import ClipSplit, write_shards
from pipelines.submitting.checks import Preparation
from pipelines.submitting.in_job import Attempts, resumed
from pipelines.submitting.job import package
from pipelines.submitting.request import JobRequest, TravellingFile
from sgmd_core.errors import ConfigError, DataError

DATA = ("data.train=/there/train", "data.validation=/there/held_out")


def asked(command: str, *arguments: str, options: tuple[str, ...] = ()) -> JobRequest:
    return JobRequest(command, arguments, options)


def prepare(request: JobRequest, root: str | None = None) -> tuple[JobRequest, Preparation]:
    preparation = Preparation(request, PROJECT_ROOT, root)
    return preparation.prepare(), preparation


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (asked("distill", "tiny", *DATA), "output is 'runs', which would lie in the job's package"),
        (asked("distill", "tiny", "output=/mnt"), "data.train is 'data/shapes/train', a relative"),
        (asked("distill", "tiny", *DATA, "output=/m", "model.folder=models/w"), "model.folder is"),
        (asked("distill", "tiny", *DATA, "output=/m", "batch.sizes=2"), "batch.size"),
        (asked("distill"), "neither a recipe nor a run to resume"),
        (asked("distill", options=("--resume=runs/x",)), "--resume is 'runs/x'"),
        (asked("study", "tiny", *DATA, "output=/mnt", "study.seeds=[1, 1]"), "different seeds"),
        (asked("pretrain", "pretrain-tiny"), "run_dir is 'runs/tiny-wan'"),
        (asked("encode", "s3://b/raw", "set", options=("--model=/m",)), "DST is 'set'"),
        (asked("encode", "raw", "s3://b/set", options=("--model=/m",)), "SRC is 'raw'"),
        (asked("evaluate", "runs/x"), "RUN is 'runs/x'"),
        (asked("distill", "tiny", *DATA, "output=~/runs"), "output is '~/runs'"),
        (
            asked("sweep", "tiny", *DATA, "output=/m", "sweep.start_from=runs/x"),
            "sweep.start_from is 'runs/x'",
        ),
        (asked("study", "gaussians"), "output is 'runs'"),
        (asked("study", "gaussians", "output=/mnt", "baseline=none"), "baseline is none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_could_not_work_there_is_refused_here(request_, words):
    with pytest.raises(ConfigError) as caught:
        prepare(request_)
    assert words in str(caught.value)


def test_relative_outputs_begin_at_the_root_and_absolute_ones_stay():
    request, _ = prepare(asked("distill", "tiny", *DATA), "/mnt/team/")
    assert "output=/mnt/team/runs" in request.settings
    assert request.results == "/mnt/team/runs/tiny"
    request, _ = prepare(asked("sweep", "tiny", *DATA, "output=/own"), "/mnt/team")
    assert request.settings.count("output=/own") == 1
    assert request.results == "/own/tiny-sweep"
    worlds = ("world.train=s3://nobody/a", "world.held_out=/there/b")
    request, _ = prepare(
        asked("pretrain", "pretrain-tiny", "world.train=/there/a", worlds[1]), "/m"
    )
    assert {"run_dir=/m/runs/tiny-wan", "output=/m/runs/tiny-wan/pipeline"} <= {*request.settings}
    request, _ = prepare(asked("distill", options=("--resume=runs/x",)), "/mnt")
    assert (request.options, request.results) == (("--resume=/mnt/runs/x",), "/mnt/runs/x")
    request, _ = prepare(asked("evaluate", "runs/x", options=("--output=figures",)), "/mnt")
    assert (request.arguments, request.options) == (("/mnt/runs/x",), ("--output=/mnt/figures",))


@pytest.mark.slow
def test_a_recipe_and_files_of_captions_go_along_wherever_they_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = (PROJECT_ROOT / "pipelines/config/recipes/tiny.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(recipe)
    (tmp_path / "prompts.txt").write_text("a red circle moves left\n" * 80)
    (tmp_path / "more.txt").write_text("a blue square moves right\n" * 8)
    also = "data.also=[{source: more.txt, weight: 0.5}, {source: prompts.txt}]"
    captions = (f"data.train={tmp_path}/prompts.txt", "data.validation=prompts.txt", also)
    request, preparation = prepare(asked("distill", "mine.yaml", *captions, "output=/mnt/runs"))
    inside = [
        "submitted/data.also.0.source/more.txt",
        "submitted/data.also.1.source/prompts.txt",
        "submitted/data.train/prompts.txt",
        "submitted/data.validation/prompts.txt",
        "submitted/recipe/mine.yaml",
    ]
    assert sorted(request.files) == inside
    assert request.arguments[0] == inside[-1]
    assert f"data.train={inside[2]}" in request.settings
    sent = load_recipe("mine.yaml", request.settings).data.also
    assert [(one.source, one.weight) for one in sent] == [(inside[0], 0.5), (inside[1], 1)]
    assert {"settings", "model", "data"} <= set(preparation.checked)
    assert list(preparation.left) == ["cluster"]

    with package(PROJECT_ROOT, request.files) as folder:
        assert (folder / inside[-1]).read_text() == recipe
        assert "blue" in (folder / inside[0]).read_text()
        assert (folder / "pipelines" / "cli.py").is_file()
        assert not (folder / ".git").exists()

    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(DataError):
        prepare(asked("distill", "mine.yaml", *captions, "output=/mnt/runs"))


def test_files_that_do_not_fit_into_a_package_are_refused_before_it_is_made():
    request, content = asked("distill", "tiny"), bytes(32 * 2**20)
    for number in range(15):
        request, _ = request.with_file(TravellingFile("prompts.txt", content), f"also.{number}")
    with pytest.raises(ConfigError, match=r"16 have 481 MiB.*largest, prompts.txt, 32") as caught:
        request.with_file(TravellingFile("more.txt", content[: 2**20]), "also.15")
    assert "at most 480 MiB" in str(caught.value)


def test_what_only_the_cluster_has_is_left_to_the_job(tmp_path):
    request, preparation = prepare(
        asked("distill", "tiny", *DATA, "output=/mnt/runs", "model.folder=s3://nobody/wan")
    )
    assert request.files == {}
    assert set(preparation.left) == {"model", "data", "held-out", "cluster"}
    write_shards(str(tmp_path), num_clips=4, shard_size=4, seed=0, split=ClipSplit.TRAIN)
    settings = (f"data.train={tmp_path}", DATA[1], "output=/mnt/runs")
    _, preparation = prepare(asked("distill", "tiny", *settings))
    assert {"settings", "model", "data"} == set(preparation.checked)
    assert preparation.left["held-out"].startswith("/there/held_out")


@pytest.mark.slow
def test_data_behind_keys_that_this_machine_lacks_are_left_to_the_job(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    settings = ("data.train=s3://bucket/train", "data.validation=s3://bucket/held_out")
    short = "data.s3.read_budget_s=2"
    _, preparation = prepare(asked("distill", "tiny", *settings, "output=/mnt/runs", short))
    assert "not served to this machine" in preparation.left["data"]
    assert "model" in preparation.checked


def test_what_an_ignore_file_keeps_at_home_does_not_travel(tmp_path):
    (tmp_path / "clips" / "train").mkdir(parents=True)
    (tmp_path / "assets" / "train").mkdir(parents=True)
    settings = ("data.validation=/there", "output=/mnt/runs")
    inside = [PurePosixPath(each) for each in ("clips/train", "assets/train")]
    assert not any(is_ignored(tmp_path, each) for each in inside)
    (tmp_path / ".gitignore").write_text("/clips/\n")
    (tmp_path / "assets" / ".rayignore").write_text("train\n")
    for train in inside:
        request = asked("distill", "tiny", f"data.train={train}", *settings)
        with pytest.raises(ConfigError, match="an ignore file names stay at home"):
            Preparation(request, tmp_path, None).prepare()


def test_a_command_line_of_a_job_says_what_is_done_around_it():
    plain = asked("encode", "s3://b/raw", "s3://b/set", options=("--model=/m",))
    assert plain.argv() == [
        "python",
        "-m",
        "pipelines.cli",
        "encode",
        *plain.arguments,
        "--model=/m",
    ]
    run = JobRequest("distill", ("tiny",), results="s3://b/runs/tiny")
    assert run.argv(2)[3:] == [
        *("--retries=2", "--pause=75", "--report=s3://b/runs/tiny", "--"),
        *("distill", "tiny"),
    ]


def test_a_run_at_an_address_is_reported_there_and_waits_for_its_lease():
    request, _ = prepare(asked("distill", "tiny", *DATA, "output=s3://bucket/runs"))
    assert request.results == "s3://bucket/runs/tiny"
    assert {"--pause=75", "--report=s3://bucket/runs/tiny"} <= {*request.argv(2)}
    request, _ = prepare(asked("sweep", "tiny", *DATA, "output=s3://bucket/runs"))
    assert request.results == "s3://bucket/runs/tiny-sweep"
    assert request.argv(2)[3:6] == ["--retries=2", "--pause=75", "--"]


@pytest.mark.slow
def test_studies_of_both_kinds_are_sent_with_what_they_need(tmp_path):
    request, preparation = prepare(asked("study", "gaussians", "num_seeds=2"), "s3://b/team")
    assert request.arguments == ("gaussians", "num_seeds=2", "output=s3://b/team/runs")
    assert request.results == "s3://b/team/runs/gaussians-study"
    assert list(preparation.checked) == ["settings"]
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: gaussians\nnum_seeds: 3\n")
    request, _ = prepare(asked("study", str(mine), "output=/mnt"))
    (content,) = request.files.values()
    assert b"num_seeds: 3" in content.content
    assert b"worlds:" in content.content
    request, _ = prepare(asked("study", "tiny", *DATA, "output=s3://b/runs"))
    assert request.results == "s3://b/runs/tiny-study"


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--resume", "--resume-auto"])
def test_a_sweep_that_goes_on_is_checked_as_the_job_will_check_it(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle moves left\n" * 80)
    (tmp_path / "start").mkdir()
    settings = (
        *("data.train=prompts.txt", "data.validation=prompts.txt", "output=/mnt"),
        # A recipe of before, and a run whose states are gone by now.
        "sweep.grid={objective.lambda_nr: [0.1, 0.1]}",
        f"sweep.start_from={tmp_path}/start",
    )
    with pytest.raises(ConfigError, match=r"lambda_nr has 0\.1 more than once"):
        prepare(asked("sweep", "tiny", *settings))
    _, preparation = prepare(asked("sweep", "tiny", *settings, options=(option,)))
    assert "sweep" in preparation.checked
    assert "may be that which the sweep has kept" in preparation.left["sweep.start_from"]


def test_a_command_that_failed_goes_on_where_it_was():
    assert resumed(["distill", "tiny"]) == ["distill", "tiny", "--resume", "auto"]
    assert resumed(["distill", "tiny", "--resume=/x"]) == ["distill", "tiny", "--resume=/x"]
    assert resumed(["study", "tiny"]) == ["study", "tiny"]
    assert resumed(["sweep", "tiny"]) == ["sweep", "tiny", "--resume-auto"]


def test_a_stop_that_comes_before_the_command_has_started_ends_it_and_none_follows():
    answers = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    class StoppedEarly(Attempts):
        def _run_once(self, argv):
            os.kill(os.getpid(), signal.SIGTERM)
            return super()._run_once(argv)

    try:
        assert StoppedEarly(["--version"], retries=3, pause_s=60.0).run() == 128 + signal.SIGTERM
    finally:
        for number, answer in answers.items():
            signal.signal(number, answer)
