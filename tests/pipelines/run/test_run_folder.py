"""The files of a run: whole or not there, never overwritten, rewound on resume."""

from pathlib import Path

import pytest

from cluster.errors import StorageError
from pipelines.run.events import EventLog
from pipelines.run.folder import RunFolder, append_jsonl, read_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.opened_copy import hold_place
from pipelines.run.outputs import require_inside
from pipelines.run.records import RunEvent
from pipelines.run.revision import versions
from sgmd_core.errors import CheckpointError, ConfigError


def test_a_run_is_never_started_over_another(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create("name: run\n")
    with pytest.raises(ConfigError, match=r"already there.*--resume"):
        folder.create("name: run\n")


def test_resuming_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.yaml"):
        RunFolder(tmp_path / "nothing").require()


def test_a_line_torn_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "alarms.jsonl"
    append_jsonl(path, {"iteration": 0})
    with path.open("a") as file:
        file.write('{"iteration": 1, "los')
    assert read_jsonl(path) == [{"iteration": 0}]


def test_rewinding_drops_what_will_be_made_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create("name: run\n")
    rest = {"seconds": {"total": 1.0}, "losses": {}, "data_wait_s": 0.0, "samples_seen": 4}
    for iteration in range(5):
        append_jsonl(folder.metrics, {"iteration": iteration, **rest})
    folder.rewind(3)
    assert [line["iteration"] for line in read_jsonl(folder.metrics)] == [0, 1, 2]
    append_jsonl(folder.metrics, {"iteration": 3, **rest})
    assert len(read_jsonl(folder.metrics)) == 4


def test_a_log_is_not_added_to_through_a_link(tmp_path: Path) -> None:
    precious, log = tmp_path / "precious", tmp_path / "metrics.jsonl"
    precious.write_text("mine")
    for make, words in (
        (lambda: log.symlink_to(precious), f"is a link to {precious}.*Remove the link"),
        (lambda: log.hardlink_to(precious), "one of 2 names of a file"),
    ):
        make()
        with pytest.raises(StorageError, match=words):
            append_jsonl(log, {"iteration": 0})
        log.unlink()
    assert precious.read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "summary.json", "checkpoints/step-000002", "ledger/0.jsonl", "best"]
)
def test_a_run_whose_links_lead_elsewhere_is_not_written_to(tmp_path: Path, name: str) -> None:
    folder, outside = RunFolder(tmp_path / "run"), tmp_path / "outside"
    folder.create("name: run\n")
    (folder.root / "real").write_text("inside")
    (folder.root / "inner").symlink_to("real")
    (folder.generator / "vae").mkdir(parents=True)
    (folder.generator / "vae" / "weights").symlink_to(outside)
    with hold_place(folder.root, "a test"):
        pass
    path = folder.root / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(outside)
    held = hold_place(folder.root, "a test")
    with pytest.raises(ConfigError, match=f"{path} is a link to {outside}") as refused, held:
        pass
    # A link to a larger disk was a usual way until then, and has another one.
    for way in (f"mv {folder.root} DISK/ and output=DISK", f"mount the disk at {path}"):
        assert way in refused.value.remedy
    assert not outside.exists()


@pytest.mark.parametrize("end", [b"\0" * 300 + b"\n", b"\0" * 300, b'{"shards": [["b.par', b"x\n"])
def test_a_broken_end_of_the_shards_is_gone_before_a_resumed_run_adds_to_them(
    end: bytes, tmp_path: Path
) -> None:
    folder, said = RunFolder(tmp_path / "run"), list[str]()
    folder.create("name: run\n")
    first, last = {"shards": [["ä.parquet", 10, [4, 6]]]}, {"shards": [], "last": True}
    append_jsonl(folder.shards, first)
    folder.rewind(0, said.append)
    assert said == []
    assert read_jsonl(folder.shards) == [first]
    with folder.shards.open("ab") as file:
        file.write(end)
    folder.rewind(0, said.append)
    append_jsonl(folder.shards, last)
    assert read_jsonl(folder.shards) == [first, last]
    assert [f"{len(end)} broken bytes" in line for line in said] == [True]


def test_links_lead_no_results_out_of_a_folder(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    (folder / "own").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "samples").symlink_to(elsewhere)
    (folder / "loop").symlink_to("own")
    (tmp_path / "linked").symlink_to(folder)
    require_inside(tmp_path / "linked", "a", "own/b", "loop/c")
    for name in ("samples", "samples/x.png", "own/../../elsewhere/x"):
        with pytest.raises(ConfigError, match=r"a link that leads to .*elsewhere"):
            require_inside(folder, "a", name)


class Heard(RunObserver):
    def __init__(self) -> None:
        self.events: list[RunEvent] = []

    def event(self, event: RunEvent) -> None:
        self.events.append(event)


def test_events_outlive_a_rewind_and_hold_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_SERVICE_TOKEN", "planted-7f3a")
    folder, heard = RunFolder(tmp_path / "run"), Heard()
    folder.create("name: run\n")
    event = RunEvent(
        kind="worker_died",
        cause="ended by signal 9 with planted-7f3a",
        action="planted-7f3a was replaced",
        role="teacher",
        rank=1,
        iteration=4,
        last_lines=("key planted-7f3a", "at https://user:word@host/x"),
        lost_s=2.5,
    )
    EventLog(folder, heard).add(event)
    folder.rewind(0)
    assert "planted-7f3a" not in folder.events.read_text()
    assert "user:word" not in folder.events.read_text()
    (line,) = read_jsonl(folder.events)
    assert line == event.to_json() | {"last_lines": list(event.last_lines)}
    assert heard.events == [event]
    assert event.in_words() == (
        "worker died (teacher rank 1, iteration 4): ended by signal 9 with ***. "
        "*** was replaced. 2.5 s lost."
    )


def test_versions_name_what_decides_the_numbers() -> None:
    found = versions()
    assert found["torch"] != "not installed"
    assert found["ray"] != "not installed"
