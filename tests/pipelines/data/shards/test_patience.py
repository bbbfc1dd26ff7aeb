"""Every request to an S3 server is repeated, reported and given up within its budget."""

import io
import pickle
import time
from collections.abc import Callable, Iterator

import pytest

from cluster.s3.settings import S3Settings
from pipelines.data.shards.filesystem import data_errors, open_folder
from sgmd_core.errors import DataError
from tests.helpers.faulty_proxy import ProxyBook, Trouble, every
from tests.helpers.s3_server import S3Server, serve_s3

CONTENT = bytes(range(256)) * 2**12
PATIENT = S3Settings(read_timeout_s=0.5, connect_timeout_s=1.0, backoff_s=0.05)
TROUBLES = (Trouble.SLOW_DOWN, Trouble.RESET, Trouble.INTERNAL, Trouble.DRIBBLE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    root = tmp_path_factory.mktemp("s3")
    (root / "clips" / "set").mkdir(parents=True)
    (root / "clips" / "set" / "one.bin").write_bytes(CONTENT)
    with serve_s3(root) as running:
        yield running


def healthy(number: int) -> Trouble:
    return Trouble.NONE


@pytest.mark.slow
def test_files_are_read_listed_and_written_whole_through_a_busy_server(
    through: Callable[..., ProxyBook], server: S3Server
) -> None:
    book = through(every(3, *TROUBLES))
    filesystem, root = open_folder("s3://clips/set", PATIENT)
    path = f"{root}/one.bin"
    for turn in range(4):
        with filesystem.open(path, "rb", block_size=2**18, cache_type="readahead") as file:
            assert b"".join(iter(lambda: file.read(2**17), b"")) == CONTENT
        with io.BufferedReader(filesystem.open(path, "rb")) as file:
            file.seek(-5, io.SEEK_END)
            assert file.read() == CONTENT[-5:]
        assert filesystem.cat_file(path) == CONTENT
        assert filesystem.cat_file(path, start=7, end=700_000) == CONTENT[7:700_000]
        filesystem.invalidate_cache()
        assert filesystem.info(path)["size"] == len(CONTENT)
        assert path in filesystem.ls(root, detail=False)
        filesystem.pipe_file(f"{root}/two-{turn}.bin", CONTENT)
        assert (server.root / "clips" / "set" / f"two-{turn}.bin").read_bytes() == CONTENT
    assert all(book.troubles.get(trouble, 0) >= 3 for trouble in TROUBLES)


@pytest.mark.slow
@pytest.mark.parametrize(("refusals", "opens"), [(3, True), (4, False)])
def test_a_folder_is_asked_for_again_after_the_sdk_has_given_a_busy_server_up(
    through: Callable[..., ProxyBook], refusals: int, opens: bool
) -> None:
    book = through(lambda number: Trouble.SLOW_DOWN if number < refusals else Trouble.NONE)
    impatient = S3Settings(max_attempts=1, read_attempts=4, backoff_s=0.01)
    if opens:
        _, root = open_folder("s3://clips/set", impatient)
        assert root == "clips/set"
    else:
        with pytest.raises(DataError, match="reduce your request rate"):
            open_folder("s3://clips/set", impatient)
    assert book.troubles[Trouble.SLOW_DOWN] == refusals


@pytest.mark.slow
def test_a_server_that_accepts_and_never_answers_is_given_up_and_reported_meanwhile(
    through: Callable[..., ProxyBook], caplog: pytest.LogCaptureFixture
) -> None:
    book = through(healthy, stall_s=30.0)
    # The SDK alone would wait five times the 30 s that ship.
    filesystem, root = open_folder("s3://clips/set", S3Settings(read_budget_s=4.0), probe=False)
    file = filesystem.open(f"{root}/one.bin")
    assert file.read(1) == CONTENT[:1]
    book.plan = lambda number: Trouble.SILENCE
    for ask in (lambda: filesystem.ls(f"{root}/deep"), lambda: file.read(2)):
        caplog.clear()
        started = time.monotonic()
        with pytest.raises(DataError, match=r"no whole answer in 4 s") as raised:  # noqa: SIM117
            with data_errors("asking"):
                ask()
        assert "Check AWS_ENDPOINT_URL" in str(raised.value)
        assert time.monotonic() - started < 25.0, "it waited for the proxy and not for the budget"
        lines = [one.getMessage() for one in caplog.records]
        assert any(line.startswith("still ") and "clips/set" in line for line in lines), lines
    file.close()


def test_patience_travels_to_other_processes(server: S3Server, through: object) -> None:
    filesystem, _ = open_folder("s3://clips/set", PATIENT, probe=False)
    copy = pickle.loads(pickle.dumps(filesystem))
    assert (copy.patience, copy.retries) == (PATIENT, 1)
