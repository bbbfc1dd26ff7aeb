"""A damaged run folder of somebody else is reported, or refused in words; it never hangs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import ClusterError
from pipelines.data.stream.ledger import Ledger
from pipelines.data.stream.plan import Cursor
from pipelines.exporting.source import open_source
from pipelines.reporting.page import write_report
from pipelines.run.folder import RunFolder, append_jsonl, read_jsonl
from pipelines.run.records import RunEvent
from sgmd_core.errors import SgmdError
from tests.fuzz.mutations import NUM_CASES, mutate_bytes, mutate_text, time_limit
from tests.helpers.runs import finish_run, write_alarms

FILES = [
    "config.yaml",
    "metrics.jsonl",
    "validation.jsonl",
    "alarms.jsonl",
    "events.jsonl",
    "ranking.json",
    "summary.json",
    "evaluation.json",
    "ledger/000000000.jsonl",
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a line in each of its logs."""
    run = finish_run(tmp_path_factory.mktemp("written") / "run")
    write_alarms(
        run, {"iteration": 3, "name": "tracking_growth", "message": "m", "value": 2.0, "limit": 1.0}
    )
    append_jsonl(run / "events.jsonl", RunEvent(kind="recovered", cause="c").to_json())
    (run / "ledger").mkdir()
    cursor = Cursor().to_json()
    entry = {"iteration": 0, "ids": ["a", "b"], "epochs": [[0, 2]], "cursor": cursor}
    append_jsonl(run / "ledger" / "000000000.jsonl", entry)
    assert len(list(Ledger(run / "ledger").entries())) == 1
    return run


def refusal(use: Callable[[], object]) -> str:
    """Words of the refusal; empty where none came."""
    try:
        with time_limit():
            use()
    except (SgmdError, ClusterError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_run_is_shown_without_it_or_refused_in_words(
    name: str, written: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(written, tmp_path / "run"))
    path = run / name
    whole = path.read_text()
    for seed in range(max(1, NUM_CASES // 2)):
        data = mutate_text(whole, seed).encode("utf-8", "surrogatepass")
        path.write_bytes(mutate_bytes(data, seed) if seed % 2 else data)
        uses: tuple[Callable[[], object], ...] = (
            lambda: write_report([run], tmp_path / "page.html"),
            lambda: list(Ledger(run / "ledger").entries()),
            lambda: open_source(run),
            lambda: read_jsonl(RunFolder(run).metrics),
        )
        assert all(len(refusal(use)) < 20_000 for use in uses), seed
