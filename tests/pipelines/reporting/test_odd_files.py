"""A report shows the rest of a run in which something else stands in a file's place."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.reporting.page import write_report
from sgmd_core.errors import ConfigError
from tests.helpers.runs import finish_run


@pytest.mark.parametrize(
    ("name", "put", "told"),
    [
        ("samples/evaluation/clips.json", Path.mkdir, "clips.json: no list of clips"),
        ("samples/evaluation/clips.json", os.mkfifo, "clips.json: no list of clips"),
        (
            "samples/evaluation/clips.json",
            lambda path: path.symlink_to("nowhere"),
            "clips.json: no list of clips",
        ),
        ("samples", lambda path: path.symlink_to(path.name), "evaluation.png is not there"),
        ("events.jsonl", Path.mkdir, "events.jsonl is left out: it is not a file"),
    ],
)
@pytest.mark.slow
def test_what_stands_in_the_place_of_a_file_is_told_and_the_rest_is_shown(
    tmp_path: Path, name: str, put: Callable[[Path], None], told: str
):
    run = finish_run(tmp_path / "run")
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    put(path)
    page = write_report([run]).read_text()
    assert told in page
    assert "Training" in page


@pytest.mark.slow
def test_a_page_that_is_a_link_to_itself_is_refused(tmp_path: Path):
    run = finish_run(tmp_path / "run")
    (run / "report.html").symlink_to("report.html")
    with pytest.raises(ConfigError, match=r"report\.html.*a link that leads nowhere"):
        write_report([run])
