"""Odd arguments of every command: one sentence with what to do, exit code 2, and nothing started.

Each row is a command line and words of its answer. Paths lie in a folder that `place` fills.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import ray
from typer.testing import CliRunner

from cluster.errors import LeaseError
from cluster.lease import hold_replaced
from pipelines.cli import app
from pipelines.config.recipe_files import load
from pipelines.pretraining.config import PretrainConfig
from pipelines.pretraining.run import pretrain
from pipelines.shapes import ClipSplit, write_shards
from tests.helpers.runs import start_run

TINY = Path(__file__).parents[3] / "assets" / "tiny-wan"
DATA = ("data.train=train", "data.validation=held_out", "validation.num_captions=4")


def pretrain_with(change: str) -> tuple[str, ...]:
    """A command whose settings are right except for one."""
    settings = {
        "world.train": "train",
        "world.held_out": "held_out",
        "run_dir": "new/run",
        "output": "new/model",
    }
    key, _, value = change.partition("=")
    changed = settings | {key: value}
    return "pretrain", "pretrain-tiny", *(f"{name}={each}" for name, each in changed.items())


LARGE = ("--height", "8192", "--width", "8192")
SUBMIT = ("submit", "tiny", "output=/mnt/runs")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders of every kind, small shards, and a run with a generator."""
    root = tmp_path_factory.mktemp("odd")
    (root / "empty").mkdir()
    (root / "file").touch()
    (root / "bytes").write_bytes(os.urandom(1000))
    (root / "prompts.txt").write_text("a red circle\n")
    os.mkfifo(root / "pipe")
    (root / "dangling").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    for split, name in ((ClipSplit.TRAIN, "train"), (ClipSplit.HELD_OUT, "held_out")):
        write_shards(str(root / name), num_clips=4, shard_size=4, seed=0, split=split)
    overrides = (f"model.folder={TINY}", f"data.validation={root / 'held_out'}")
    run = start_run(root / "run", 2, overrides=overrides)
    shutil.copytree(TINY, run / "generator")
    half = root / "half"
    half.mkdir()
    (half / "metrics.jsonl").touch()
    return root


@pytest.fixture(autouse=True)
def at_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("NOT_SET", raising=False)


def answer(*arguments: str) -> tuple[int, str]:
    """Exit code and words of a command that must not start Ray."""
    # Another test of this process may have started it.
    was_connected = ray.is_initialized()
    result = CliRunner().invoke(app, arguments)
    assert ray.is_initialized() == was_connected
    words = " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in words
    assert "not a failure that sgmd knows" not in words
    return result.exit_code, words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("shapes", "file"), "file is a file. Expected a folder"),
        (("shapes", "pipe"), "pipe is a named pipe. Expected a folder"),
        (("shapes", "dangling"), "dangling is a link that leads nowhere"),
        (("shapes", "s3://"), "with one slash after it"),
        (("shapes", "gs://bucket/x"), "the protocol gs. Expected a local path"),
        (("shapes", "new", "--train-clips", "100000000"), "train_clips=100000000"),
        (("shapes", "new", "--held-out-clips", "0"), "held_out_clips=0. Expected from 1"),
        (("shapes", "new", "--seed", "-1"), "'--seed'"),
        (("shapes", "new", "--seed", str(2**70)), "'--seed'"),
        (("check", ""), "an empty argument"),
        (("check", "file"), "neither a Parquet shard nor a list of captions"),
        (("check", "bytes"), "a folder of shards, or a file that ends in .txt"),
        (("check", "pipe"), "pipe: a named pipe"),
        (("check", "dangling"), "a link that leads nowhere"),
        (("check", "loop"), "a link that leads nowhere"),
        (("check", "/dev/null"), "/dev/null: a device"),
        (("check", "ftp://127.0.0.1:1/x"), "the protocol ftp"),
        (("check", "s3:/bucket/x"), "s3: with one slash after it"),
        (("check", "s3://"), "no bucket"),
        (("check", "train", "--max-caption-chars", "0"), "'--max-caption-chars'"),
        (("check", "train", "--processes", "1000000"), "'--processes'"),
        (("check", "train", "--model", "nowhere"), "looking for the run or model nowhere"),
        (("prepare", "pipe", "new"), "pipe: a named pipe"),
        (("prepare", "prompts.txt", "file"), "file is a file"),
        (("prepare", "prompts.txt", "pipe"), "pipe: a named pipe"),
        (("prepare", "prompts.txt", ""), "an empty argument"),
        (("prepare", "prompts.txt", "new", "--id-column="), "--id-column is empty"),
        (("prepare", "prompts.txt", "gs://x/y"), "the protocol gs"),
        (("prepare", "prompts.txt", "new", "--max-clip-mb", "-1"), "'--max-clip-mb'"),
        (("encode", "train", "train/new", "--model", str(TINY)), "a folder inside the source"),
        (("encode", "train", "file", "--model", str(TINY)), "file is a file"),
        (("encode", "train", "new", "--model", str(TINY), "--fps", "0"), "fps = 0.0"),
        (("encode", "train", "new", "--model", "file"), "model file: a file"),
        (("encode", "file", "new", "--model", str(TINY)), "neither a Parquet shard nor a list"),
        (("encode", "train", "new", "--model", str(TINY), "--text-length", "100000000"), "'--text"),
        (("encode", "train", "new", "--model", str(TINY), "--height", "100000000"), "'--height'"),
        (("ledger", "nowhere"), "checking the ledger of"),
        (("evaluate", "nowhere"), "looking for the run or model nowhere: no such folder"),
        (("evaluate", "run", "--num-captions", "2", "--features", "pipe"), "no such file"),
        (("export", "nowhere"), "looking for the run or model nowhere: no such folder"),
        (("export", "empty"), "no model_index.json and nothing else"),
        (("generate", "empty", "--prompt", "a"), "no model_index.json and nothing else"),
        (("report", "nowhere"), "evaluation.json there, and no such folder"),
        (("report", "s4://bucket/x"), "the protocol s4"),
        (("distill", "s4://bucket/x.yaml"), "the protocol s4"),
        (("evaluate", "pipe"), "model pipe: a named pipe"),
        (("evaluate", "half"), "no model_index.json"),
        (("evaluate", "run", "--output", "file"), "file is a file"),
        (("evaluate", "run", "--output", ""), "--output is empty"),
        (("evaluate", "run", "--cache", "pipe"), "pipe is a named pipe"),
        (("evaluate", "run", "--teacher-steps", "100000000"), "1 to 1000: networks tell 1000"),
        (("evaluate", "run", "--guidance-scale", "nan"), "guidance_scale = nan"),
        (("evaluate", "run", "--seed", "-1"), "seed = -1. Expected at least 0"),
        (("evaluate", "run", "--seed", str(2**70)), "seed = 1180591620717411303424"),
        (("evaluate", "run", "--num-captions", "100000000"), "4 rows. Expected at least 1000000"),
        (("evaluate", "run", "--captions", "pipe"), "pipe: a named pipe"),
        (("evaluate", "run", "--captions", "bytes"), "neither a Parquet shard nor a list"),
        (("generate", "run", "--prompt", "a", "--num-steps", "100000000"), "at most 1000"),
        (("generate", "run", "--prompt", "a", "--num-clips", "1000000000"), "'--num-clips'"),
        (("generate", "run", "--prompt", "a", "--height", "100000000"), "at most 16384"),
        (("generate", "run", "--prompt", "a", "--text-length", "100000000"), "its square"),
        (("generate", "run", "--prompt", "a", "--fps", "100000000"), "at most 65535"),
        (("generate", "run", "--prompt", "a", "--num-frames", "1000001", *LARGE), "GB of pixels"),
        (("generate", "run", "--prompt", "a", "--zoom", "100000"), "from 1 to 64"),
        (("generate", "run", "--prompt", "a", "--guidance-scale", "1e30"), "at most 10000"),
        (("generate", "run", "--prompt", "a", "--flow-shift", "nan"), "a finite number"),
        (("generate", "run", "--prompt", "a", "--output", "pipe"), "pipe is a named pipe"),
        (("generate", "run", "--prompts", "pipe"), "a named pipe"),
        (("generate", "nowhere", "--prompt", "a"), "no such folder"),
        (("report", "run", "--output", "empty"), "a folder of that name"),
        (("report", "run", "--output", "pipe"), "a named pipe of that name"),
        (("report", "run", "--output", "/dev/null"), "a device of that name"),
        (("report", "run", "--output", "file/x.html"), "file is a file"),
        (("report", "nowhere"), "Expected the folder of a run"),
        (("distill", "tiny", "--dry-run", *DATA, "output=file"), "file is a file"),
        (("distill", "tiny", "--dry-run", "data.train=pipe"), "pipe: a named pipe"),
        (("distill", "tiny", "--dry-run", "generator.num_steps=100000000"), "at most 1000"),
        (("distill", "tiny", "--dry-run", "validation.teacher_steps=100000000"), "equal to 1000"),
        (("sweep", "tiny", *DATA, "output=file"), "file is a file"),
        (("study", "tiny", *DATA, "output=file", "--dry-run"), "file is a file"),
        (pretrain_with("world.train=nowhere"), "no such folder, or no file in it"),
        (pretrain_with("world.train=pipe"), "pipe: a named pipe"),
        (pretrain_with("run_dir=file"), "(run_dir): "),
        (pretrain_with("output=file"), "file is a file"),
        (pretrain_with("output=new/run"), "is in it. Expected a folder for the model alone"),
        (pretrain_with("output=."), "is in it. Expected a folder for the model alone"),
        (pretrain_with("output=half"), "a folder with metrics.jsonl, and no model_index.json"),
        (pretrain_with("partial_output=pipe"), "(partial_output): "),
        (pretrain_with("sampling.guidance_scale=0.5"), "sampling.guidance_scale is 0.5"),
        (pretrain_with("sampling.num_steps=100000000"), "less than or equal to 1000"),
        ((*SUBMIT, "--address", "foo"), "the URL of a dashboard"),
        ((*SUBMIT, "--command", "dance"), "--command dance. Expected one of distill, sweep"),
        ((*SUBMIT, "--working-dir", "nowhere"), "nowhere: no such folder"),
        ((*SUBMIT, "--working-dir", "file"), "submitting the folder file: a file"),
        ((*SUBMIT, "--working-dir", "empty"), "no pipelines/cli.py in it"),
        ((*SUBMIT, "--env", "NAME=value"), "--env NAME, with more than a name"),
        ((*SUBMIT, "--env", "NOT_SET"), "NOT_SET not set"),
        ((*SUBMIT, "objective.lambda_n=1"), "objective.lambda_nr"),
        ((*SUBMIT, "nonsense"), "no KEY=VALUE"),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, tuple) else "",
)
def test_an_odd_argument_is_a_wrong_request_in_one_sentence(arguments, words):
    code, said = answer(*arguments)
    assert words in said
    assert code == 2
    assert not Path("new").exists()


@pytest.mark.parametrize("text", ["null", "[]", "3", '{"settings": {}, "model": 4}', "{"])
def test_an_identity_of_another_shape_is_named(place, text):
    path = place / "run" / "identity.json"
    path.write_text(text)
    try:
        code, said = answer("evaluate", "run", "--num-captions", "2")
    finally:
        path.unlink()
    assert code == 2
    assert "identity.json is damaged" in said


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sgmd.json", '{"flow_shift": Infinity}'),
        *(("sgmd.json", text) for text in ("null", "[]", "3", "{")),
        *(("scheduler/scheduler_config.json", text) for text in ("null", "[]", "3", "{")),
    ],
)
def test_settings_of_a_generator_of_another_shape_are_named(place, name, text):
    path = place / "run" / "generator" / name
    before = path.read_text()
    path.write_text(text)
    try:
        code, said = answer("generate", "run", "--prompt", "a")
    finally:
        path.write_text(before)
    assert code == 2
    assert Path(name).name in said or "flow_shift" in said


@pytest.mark.parametrize("setting", ["output", "partial_output"])
def test_two_pretrainings_do_not_write_one_model_folder(place, tmp_path, setting):
    """Their run folders differ; the second is refused before it asks for Ray."""
    model = str(tmp_path / "model")
    given = {"run_dir": str(tmp_path / "run"), "output": str(tmp_path / "own"), setting: model}
    world = {"world.train": str(place / "train"), "world.held_out": str(place / "held_out")}
    overrides = [f"{name}={value}" for name, value in {**world, **given}.items()]
    config = load(PretrainConfig, "pretrain-tiny", overrides)
    refused = pytest.raises(LeaseError, match=rf"{model}: .*sgmd pretrain first")
    was_connected = ray.is_initialized()
    with hold_replaced(model, "sgmd pretrain first"), refused:
        pretrain(config)
    assert ray.is_initialized() == was_connected
    assert not (tmp_path / "model").exists()


def test_a_negative_prompt_may_be_empty():
    assert json.loads((TINY / "sgmd.json").read_text())["negative_prompt"] == ""
    code, said = answer("generate", "nowhere", "--prompt", "a", "--negative-prompt", "")
    assert "no such folder" in said
    assert code == 2
