"""Folders are opened in one place, and what is wrong with a server is told without its keys."""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from aiohttp import ClientConnectionError
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from cluster.errors import StorageError
from cluster.redaction import without_secrets
from cluster.s3.patience import is_busy, is_transient
from cluster.s3.settings import S3Settings
from cluster.storage_errors import storage_errors
from pipelines.data.shards.filesystem import data_errors, open_folder
from sgmd_core.errors import ConfigError, DataError, SgmdError
from tests.helpers.s3_server import S3Server, serve_s3, use_server

QUICK = S3Settings(max_attempts=2, connect_timeout_s=1, read_timeout_s=5)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    root = tmp_path_factory.mktemp("s3")
    (root / "clips" / "set").mkdir(parents=True)
    (root / "clips" / "set" / "one.txt").write_text("one")
    with serve_s3(root) as running:
        yield running


@pytest.fixture
def keys(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    use_server(server.environment, monkeypatch)
    return server.environment


def test_a_path_that_leads_nowhere_is_told_without_a_number_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught, data_errors("reading captions"):
        (tmp_path / "gone.txt").read_bytes()
    assert caught.value.found == f"no such file or folder: {tmp_path}/gone.txt"


def test_a_local_folder_needs_no_server(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one")
    filesystem, root = open_folder(f"{tmp_path}/")
    assert filesystem.ls(root, detail=False) == [f"{tmp_path}/one.txt"]


@pytest.mark.slow
def test_a_folder_on_s3_is_read(keys: dict[str, str]) -> None:
    filesystem, root = open_folder("s3://clips/set/")
    assert root == "clips/set"
    assert filesystem.cat_file(f"{root}/one.txt") == b"one"


@pytest.mark.slow
def test_the_checksum_setting_takes_the_place_of_the_variables(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_RESPONSE_CHECKSUM_VALIDATION")
    monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION")
    filesystem, root = open_folder("s3://clips/set", S3Settings(checksums="when_required"))
    filesystem.pipe_file(f"{root}/two.txt", b"two")
    assert filesystem.cat_file(f"{root}/two.txt") == b"two"


def test_a_missing_bucket_is_named(keys: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"s3://nobucket/set: .*a bucket of that name"):
        open_folder("s3://nobucket/set", QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_keys_are_told_and_never_shown(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setenv(wrong, "certainly-not-the-key")
    with pytest.raises(DataError, match=r"keys that the server knows") as caught:
        open_folder("s3://clips/set", QUICK)
    told = str(caught.value)
    shown = [value for name, value in keys.items() if "KEY" in name] + ["certainly-not-the-key"]
    assert not any(value in told for value in shown)


def test_no_keys_at_all_are_told(keys: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(DataError, match=r"keys that the server knows"):
        open_folder("s3://clips/set", QUICK)


@pytest.mark.slow
def test_a_server_that_is_down_is_told(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(DataError, match=r"a server that answers.*AWS_ENDPOINT_URL"):
        open_folder("s3://clips/set", QUICK)


def test_an_address_of_an_unknown_kind_is_told() -> None:
    with pytest.raises(DataError, match=r"a local path or s3://bucket/prefix"):
        open_folder("ftpx://somewhere/set")


@pytest.mark.parametrize("url", ["https://127.0.0.1:9/set", "http://127.0.0.1:9/list.csv"])
def test_an_address_of_the_web_is_refused_before_it_is_asked(url: str) -> None:
    with pytest.raises(DataError, match=r"an address of the web.*AWS_ENDPOINT_URL"):
        open_folder(url)
    assert open_folder(url, from_web=True)[1] == url


def test_keys_are_blotted_out_of_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    assert (
        without_secrets("at https://me:word@host/x with hidden") == "at https://***@host/x with ***"
    )


def test_waiting_helps_against_a_server_and_not_against_broken_data() -> None:
    import errno

    assert is_transient(OSError(errno.EBUSY, "Please reduce your request rate"))
    assert is_transient(TimeoutError())
    assert is_transient(ConnectionResetError())
    assert not is_transient(FileNotFoundError("gone"))
    assert not is_transient(PermissionError("no"))
    assert not is_transient(OSError("Couldn't deserialize thrift"))


def test_a_setting_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.s3\.max_attempts: 0"):
        S3Settings(max_attempts=0)


@pytest.mark.slow
def test_signs_in_a_name_are_characters(keys: dict[str, str], tmp_path: Path) -> None:
    for url in ("s3://clips/a::b #?%é/.set", f"{tmp_path}/a::b #?%é/.set"):
        filesystem, root = open_folder(url)
        if not url.startswith("s3"):
            filesystem.makedirs(root)
        filesystem.pipe_file(f"{root}/one.txt", b"one")
        assert filesystem.cat_file(f"{open_folder(url)[1]}/one.txt") == b"one"


@pytest.mark.slow
def test_an_endpoint_without_a_scheme_is_understood(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", keys["AWS_ENDPOINT_URL"].removeprefix("http://"))
    filesystem, root = open_folder("s3://clips/set")
    assert filesystem.cat_file(f"{root}/one.txt") == b"one"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "s3.example.com:9000")
    with pytest.raises(DataError, match=r"no scheme.*https://s3\.example\.com:9000"):
        open_folder("s3://clips/set")


def test_a_missing_local_path_says_nothing_of_s3(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"Check the address") as caught,
        data_errors("reading x"),
    ):
        (tmp_path / "my-bucket").read_bytes()
    assert "AWS" not in str(caught.value)


def test_a_server_of_another_kind_has_a_remedy_of_its_own() -> None:
    with (
        pytest.raises(DataError, match=r"Check the address and the network") as caught,
        data_errors("reading x"),
    ):
        raise ClientConnectionError("no answer")
    assert "AWS" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("PermanentRedirect", "AWS_DEFAULT_REGION"),
        ("AuthorizationHeaderMalformed", "AWS_DEFAULT_REGION"),
        ("RequestTimeTooSkewed", "Set the clock of this machine"),
        ("ExpiredToken", "Fetch new ones, with their AWS_SESSION_TOKEN"),
        ("InvalidToken", "Fetch new ones, with their AWS_SESSION_TOKEN"),
        ("RequestExpired", "Set the clock of this machine"),
        # Answers to HEAD have no body, and so no code but the status.
        ("301", "AWS_DEFAULT_REGION"),
        ("400", "that AWS_SESSION_TOKEN has not expired, AWS_DEFAULT_REGION"),
        ("TooManyRequests", "Try again later"),
    ],
)
def test_a_refused_request_is_told_with_what_to_do_about_it(code: str, remedy: str) -> None:
    status = {"HTTPStatusCode": 429 if code == "TooManyRequests" else 400}
    answer = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": status}
    refused = ClientError(answer, "GetObject")
    assert is_busy(refused) == is_busy(translate_boto_error(refused)) == (remedy[:3] == "Try")
    worded = translate_boto_error(refused)
    with pytest.raises(DataError, match=remedy), data_errors("reading s3://b/x"):
        raise worded
    with pytest.raises(StorageError, match=remedy), storage_errors("writing to s3://b/x"):
        raise worded
    with pytest.raises(DataError) as other, data_errors("reading s3://b/x"):
        raise translate_boto_error(ClientError({"Error": {"Code": "NoSuchKey"}}, "GetObject"))
    assert remedy not in str(other.value)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_takes_no_more_has_one_remedy_wherever_it_is_told(number: int) -> None:
    told: list[SgmdError] = []
    for errors in (data_errors, storage_errors):
        with pytest.raises((DataError, StorageError)) as caught, errors("writing x"):
            raise OSError(number, os.strerror(number), "x")
        told.append(caught.value)
    assert (told[0].expected, told[0].remedy) == (told[1].expected, told[1].remedy)
    words = "mounted read-only: choose" if number == errno.EROFS else "Free space there"
    assert words in told[0].remedy


class Portal(BaseHTTPRequestHandler):
    """Asks for a login, whatever it is asked for."""

    def do_GET(self) -> None:
        page = b"<html><body>Please log in</body></html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.slow
def test_a_page_in_place_of_a_listing_is_not_taken_for_an_empty_folder(
    keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with HTTPServer(("127.0.0.1", 0), Portal) as portal:
        thread = threading.Thread(target=portal.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        address = f"http://127.0.0.1:{portal.server_address[1]}"
        use_server({**keys, "AWS_ENDPOINT_URL": address}, monkeypatch)
        with pytest.raises(DataError, match=r"is not an S3 server.*Check AWS_ENDPOINT_URL"):
            open_folder("s3://clips/set", QUICK)
        portal.shutdown()
        thread.join()
