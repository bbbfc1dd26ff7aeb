"""A run whose standard error nobody takes any more goes on, and saves its state when it stops."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.run.folder import RunFolder, read_jsonl
from tests.e2e.conftest import MakeRecipe
from tests.e2e.processes import ROOT
from tests.helpers.forked_python import forked_process

BETWEEN_LINES_S = 6.0
"""Longer than between two lines of progress, of which the first that nobody takes ends nothing."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("open_output", "number", "code"),
    [(os.pipe, signal.SIGINT, 130), (os.openpty, signal.SIGHUP, 129)],
    ids=["Ctrl-C also ends the reader", "the terminal is closed"],
)
def test_a_run_whose_output_nobody_takes_any_more_saves_its_state(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    open_output: Callable[[], tuple[int, int]],
    number: signal.Signals,
    code: int,
) -> None:
    config = make_recipe(
        "name=unread", "iterations=100000", "checkpoint.every=0", "topology.mode=local"
    )
    recipe, metrics = tmp_path / "unread.yaml", RunFolder(config.run_folder).metrics
    recipe.write_text(config.to_yaml())
    reader, writer = open_output()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "distill", str(recipe)],
        cwd=ROOT,
        stdout=writer,
        stderr=writer,
        start_new_session=True,
        # Tests in the background of a shell ignore SIGINT, and after nohup SIGHUP.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    os.close(writer)
    while not (reached := len(read_jsonl(metrics))):
        assert process.poll() is None, os.read(reader, 4096)
        time.sleep(0.05)
    os.close(reader)
    end_s = time.monotonic() + BETWEEN_LINES_S
    while time.monotonic() < end_s and process.poll() is None:
        time.sleep(0.1)
    os.killpg(forked_process(process.pid), number)
    assert process.wait(timeout=120) == code
    done = len(read_jsonl(metrics))
    assert done > reached
    assert (config.run_folder / "checkpoints" / f"step-{done:06d}" / "manifest.json").is_file()
