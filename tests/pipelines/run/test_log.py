"""log.jsonl: every line says run, role, rank and iteration, and none is told twice."""

import logging
from pathlib import Path

import pytest

from cluster.said import Hearing, Said, SaidHandler
from pipelines.run.folder import read_jsonl
from pipelines.run.log import RunLog, hearing_loggers
from pipelines.run.observer import Observers
from pipelines.run.origin import COMMAND_VARIABLE
from pipelines.run.records import RunEvent
from tests.helpers.records import iteration_record
from tests.helpers.secrets import plant


def test_lines_say_where_they_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = plant(monkeypatch)
    monkeypatch.setenv(COMMAND_VARIABLE, "sgmd submit mine.yaml")
    told: list[str] = []
    log = RunLog(tmp_path / "log.jsonl", "mine", told.append)
    everything = Observers([log])
    everything.note("checking")
    assert not (tmp_path / "log.jsonl").exists()
    log.open()
    everything.iteration(iteration_record(119))
    lost = RunEvent(kind="worker_died", cause="killed", role="teacher", rank=2, iteration=120)
    everything.event(lost)
    everything.said(Said(1, 1.5e9, "WARNING", "fake_score", 1, 120, "the server is slow"))
    with hearing_loggers(log, told.append):
        logging.getLogger("cluster.lease").warning("not renewed: %s", secrets[0])
    logging.getLogger("cluster.lease").warning("nobody listens any more")

    lines = read_jsonl(tmp_path / "log.jsonl")
    assert [line["message"] for line in lines[:2]] == ["checking", "started"]
    assert lines[1]["command"] == "sgmd submit mine.yaml"
    assert {line["run"] for line in lines} == {"mine"}
    places = [(line["level"], line["role"], line["rank"], line["iteration"]) for line in lines[2:]]
    assert places == [
        ("WARNING", "teacher", 2, 120),
        ("WARNING", "fake_score", 1, 120),
        ("WARNING", "controller", 0, 120),
    ]
    assert lines[3]["time"].startswith("2017-07-14T02:40:00")
    (warned,) = told
    assert warned.startswith("not renewed: ")
    assert secrets[0] not in warned + (tmp_path / "log.jsonl").read_text()


def test_a_disk_that_takes_no_line_is_told_once_and_the_run_goes_on(tmp_path: Path) -> None:
    told: list[str] = []
    log = RunLog(tmp_path / "nowhere" / "log.jsonl", "mine", told.append)
    log.open()
    log.note("on")
    assert len(told) == 1
    assert told[0].startswith("log.jsonl ends here")


def test_what_a_rank_logs_is_heard_once_with_its_place(capfd: pytest.CaptureFixture[str]) -> None:
    handler = SaidHandler(lambda: ("fake_score", 1, 120))
    logger = logging.getLogger("workers.of_this_test")
    logger.addHandler(handler)
    heard: list[Said] = []
    hearing = Hearing(heard.append)
    for word in ("one", "two"):
        logger.warning("word %s", word)
        logger.info("not heard")
        hearing.hear("process", handler.recent())
    hearing.hear("another process", handler.recent()[:1])
    assert [said.message for said in heard] == ["word one", "word two", "word one"]
    assert heard[0].line == "[fake_score 1 @120] word one"
    assert "[fake_score 1 @120] word two\n" in capfd.readouterr().err
