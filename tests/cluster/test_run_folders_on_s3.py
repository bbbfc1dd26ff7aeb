"""The folder of a run on an S3 server that is busy, and on one that accepts and never answers."""

import time
from collections.abc import Callable

import pytest
import torch

from cluster.errors import StorageError
from cluster.lease import hold
from cluster.s3.settings import S3Settings
from cluster.storage import file_sizes, read_json, write_json
from cluster.stores import open_store
from pipelines.doctoring.examine import examine
from pipelines.doctoring.findings import Status
from tests.helpers.clip_samplers import REQUEST, CountingSampler
from tests.helpers.faulty_proxy import ProxyBook, Trouble, every
from tests.helpers.s3_server import S3Server
from workers.kept_clips import KeptClips
from workers.role_state import RoleState, load_role, save_role

BUSY = (Trouble.SLOW_DOWN, Trouble.INTERNAL, Trouble.RESET)
STATE = RoleState(3, {"w": torch.arange(50_000.0)}, {"exp_avg/w": torch.ones(50_000)})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of seconds where a run has minutes."""
    patience = S3Settings(read_budget_s=3.0, read_timeout_s=1.0, backoff_s=0.05)
    monkeypatch.setattr("cluster.s3.filesystem.RUNS", patience)


@pytest.mark.slow
def test_a_busy_server_costs_no_save_and_no_bit(
    through: Callable[..., ProxyBook], server: S3Server
) -> None:
    book = through(every(3, *BUSY))
    save_role("s3://runs/busy/step-1", "generator", STATE)
    write_json("s3://runs/busy/summary.json", {"step": 1})
    with hold("s3://runs/busy", "a test") as lease:
        lease.check()
    found = load_role("s3://runs/busy/step-1", "generator")
    assert found.updates == STATE.updates
    assert torch.equal(found.weights["w"], STATE.weights["w"])
    assert torch.equal(found.moments["exp_avg/w"], STATE.moments["exp_avg/w"])
    assert read_json("s3://runs/busy/summary.json") == {"step": 1}
    assert len(file_sizes("s3://runs/busy")) == 4
    assert all(book.troubles.get(trouble, 0) >= 2 for trouble in BUSY), book.troubles


@pytest.mark.slow
def test_the_teachers_clips_of_another_run_are_read_back(through: Callable[..., ProxyBook]) -> None:
    through(every(3, *BUSY))
    sample = CountingSampler()
    kept = KeptClips("s3://runs/teacher-clips", "digest", (), patience_s=30.0)
    first, again = kept.get(REQUEST, sample), kept.get(REQUEST, sample)
    assert (sample.made, again.remembered) == (1, True)
    assert torch.equal(first.clips.features, again.clips.features)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("work", "error"),
    [
        (lambda: write_json("s3://runs/gone/summary.json", {}), StorageError),
        (lambda: read_json("s3://runs/gone/summary.json"), StorageError),
        (lambda: file_sizes("s3://runs/gone"), StorageError),
        (lambda: save_role("s3://runs/gone", "generator", STATE), StorageError),
        (lambda: load_role("s3://runs/gone", "generator"), StorageError),
        (lambda: hold("s3://runs/gone", "a test").__enter__(), StorageError),
    ],
    ids=["write", "read", "list", "save", "load", "lease"],
)
@pytest.mark.slow
def test_a_server_that_never_answers_ends_in_an_error_within_the_budget(
    through: Callable[..., ProxyBook], work: Callable[[], object], error: type[Exception]
) -> None:
    through(lambda number: Trouble.SILENCE, stall_s=300.0)
    started = time.monotonic()
    with pytest.raises(error, match=r"no whole answer in 3.* AWS_ENDPOINT_URL"):
        work()
    assert time.monotonic() - started < 60.0, "the server would be silent for five minutes"


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_checkpoint_that_breaks_off_in_the_middle_is_given_up_within_the_budget(
    through: Callable[..., ProxyBook], server: S3Server
) -> None:
    book = through(lambda number: Trouble.NONE, stall_s=300.0)
    save_role("s3://runs/stalled", "generator", STATE)
    book.plan = lambda number: Trouble.STALL if "weights" in book.current else Trouble.NONE
    with pytest.raises(StorageError, match="no whole answer in"):
        load_role("s3://runs/stalled", "generator")


@pytest.mark.slow
def test_an_endpoint_without_a_scheme_serves_the_folders_of_runs_too(
    through: Callable[..., ProxyBook], server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = through(lambda number: Trouble.NONE)
    monkeypatch.setenv("AWS_ENDPOINT_URL", book.endpoint.removeprefix("http://"))
    write_json("s3://runs/plain/summary.json", {"step": 2})
    files, path = open_store("s3://runs/plain/")
    assert (path, files.exists(f"{path}/summary.json")) == ("runs/plain", True)


@pytest.mark.slow
def test_doctor_says_of_such_a_server_that_it_does_not_answer(
    through: Callable[..., ProxyBook], monkeypatch: pytest.MonkeyPatch
) -> None:
    through(lambda number: Trouble.SILENCE, stall_s=300.0)
    monkeypatch.setattr("pipelines.doctoring.storage._STORAGE_S", 2.0)
    (found,) = (each for each in examine(storage="s3://runs") if each.name.startswith("storage"))
    assert found.status is Status.MISSING
    # Two seconds, and a second more for each MiB that is written.
    assert "no whole answer in 6 s" in found.found
