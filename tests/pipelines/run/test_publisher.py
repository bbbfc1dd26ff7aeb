"""What a run at an address bears of its store: outages for a while, and nothing that stays."""

import errno
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from cluster.background import in_background
from cluster.errors import StorageError, StoreRefusedError
from cluster.lease import Lease
from cluster.storage_errors import storage_errors
from pipelines.run.opened_copy import copy_at, working_copy
from pipelines.run.publisher import AddressPublisher
from pipelines.run.records import RunEvent

OUTAGE_S = 1.0
FAILURE = StorageError("writing a state", "OSError: reset", "an answer", "Look at it")


@pytest.fixture
def told() -> list[RunEvent]:
    return []


@pytest.fixture
def publisher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[RunEvent]
) -> Iterator[AddressPublisher]:
    """Publishes small files, which all come through, every 20 ms."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("pipelines.run.publisher._AGAIN_S", 0.02)
    monkeypatch.setattr("pipelines.run.publisher._EVERY_S", 0.02)
    fsspec.filesystem("memory").store.clear()
    with working_copy("memory://runs/x") as root:
        copy = copy_at(root)
        assert copy is not None
        made = AddressPublisher(copy, Lease(), OUTAGE_S, told.append)
        with in_background("publish", made.work):
            yield made


def never() -> None:
    raise FAILURE


def test_work_that_never_succeeds_ends_the_run_while_small_files_come_through(publisher, told):
    for _ in range(2):
        publisher.tolerate(FAILURE, "saving")
        publisher.wait()
        time.sleep(0.6 * OUTAGE_S)
    with pytest.raises(StorageError, match="failed for 1 s, writing a state; last with OSError"):
        publisher.tolerate(FAILURE, "saving")
    assert [event.kind for event in told][:2] == ["storage_lost", "storage_back"]
    with pytest.raises(StorageError, match="failed for"):
        publisher.check()


def test_work_that_is_insisted_on_is_given_up_in_the_end(publisher):
    with pytest.raises(StorageError, match="failed for"):
        publisher.insist("exporting", never)


@pytest.mark.slow
def test_a_success_of_the_work_ends_the_time_for_which_it_is_borne(publisher):
    for _ in range(2):
        publisher.tolerate(FAILURE, "saving")
        assert publisher.insist("saving", lambda: "saved") == "saved"
        time.sleep(1.2 * OUTAGE_S)
    publisher.tolerate(FAILURE, "another work")


@pytest.mark.parametrize(
    "error",
    [PermissionError("403"), OSError(errno.ENOSPC, "full"), OSError("rank: os error 28")],
)
def test_a_refusal_is_not_borne(publisher, told, error):
    with pytest.raises(StoreRefusedError) as caught, storage_errors("writing s3://runs/x"):
        raise error
    with pytest.raises(StoreRefusedError):
        publisher.tolerate(caught.value, "saving")
    assert told == []


def test_what_passes_is_no_refusal():
    with pytest.raises(StorageError) as caught, storage_errors("writing s3://runs/x"):
        raise OSError("503 SlowDown")
    assert type(caught.value) is StorageError
