"""Services that a stormy run uses, and the faults that they suffer: server, disk and machines."""

import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipelines.shapes import ClipSplit, write_shards  # noqa: E402
from tests.helpers.faulty_proxy import ProxyBook, Trouble, serve_faulty  # noqa: E402
from tests.helpers.s3_server import S3Access, serve_s3  # noqa: E402

_SERVER_S = 8.0
"""Time for which a server is stopped or busy."""

_DOWN_S = 3.0
"""Time between the end and the restart of a server."""

_DISK_MB = 512
_FULL_S, _LONGEST_FULL_S = 3.0, 30.0
"""Seconds a disk stays full after the run has ended of it, and at the longest."""

_MACHINE_S = 3.0
"""Seconds until another machine comes for one that is lost."""

_NODE = {"num_cpus": 4, "object_store_memory": 200 * 2**20}
_NUM_CLIPS, _SHARD_SIZE = 128, 8


def write_clips(root: Path) -> None:
    """Writes the bucket `clips`: small shards, so that they are read all the time."""
    write_shards(str(root / "clips/train"), num_clips=_NUM_CLIPS, shard_size=_SHARD_SIZE, seed=0)
    held_out = str(root / "clips/held_out")
    write_shards(held_out, num_clips=16, shard_size=16, seed=0, split=ClipSplit.HELD_OUT)


class Server:
    """An S3 server behind a proxy.

    Args:
        root: Folder of its buckets.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._access = S3Access()
        self._server = ExitStack()
        self._proxy = ExitStack()
        self._book: ProxyBook | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables through which a client finds and may use it."""
        assert self._book is not None, "not started"
        return {**self._access.environment, "AWS_ENDPOINT_URL": self._book.endpoint}

    @property
    def num_refused(self) -> int:
        """Requests that were answered by 503."""
        assert self._book is not None, "not started"
        return self._book.troubles.get(Trouble.SLOW_DOWN, 0)

    def start(self) -> None:
        """Starts both on their ports."""
        self._server.enter_context(serve_s3(self._root, self._access))
        endpoint = self._access.environment["AWS_ENDPOINT_URL"]
        self._book = self._proxy.enter_context(serve_faulty(endpoint, _healthy))

    def stop(self) -> None:
        """Ends both."""
        self._proxy.close()
        self._server.close()

    def strike(self, fault: str) -> None:
        """Makes it frozen, restarted or busy."""
        if fault == "server frozen":
            servers = [one for one in psutil.Process().children() if one.name() == "rclone"]
            if not servers:
                raise RuntimeError("no process rclone of this one to freeze was found")
            for process in servers:
                process.suspend()
                _later(_SERVER_S, process.resume)
        elif fault == "server restarted":
            self._server.close()
            time.sleep(_DOWN_S)
            self._server.enter_context(serve_s3(self._root, self._access))
        else:
            assert self._book is not None, "not started"
            self._book.plan = lambda number: Trouble.SLOW_DOWN
            _later(_SERVER_S, self._recover)

    def _recover(self) -> None:
        assert self._book is not None, "not started"
        self._book.plan = _healthy


def _healthy(number: int) -> Trouble:
    return Trouble.NONE


def _later(seconds: float, act: Any) -> None:  # noqa: ANN401
    def safely() -> None:
        # The benchmark may have ended before.
        with suppress(psutil.Error):
            act()

    timer = threading.Timer(seconds, safely)
    timer.daemon = True
    timer.start()


class Disk:
    """The disk of a run, which can be full for some seconds.

    A small file system of its own where this process may mount one. Elsewhere the run's own process
    may write no longer files than it has (RLIMIT_FSIZE), which its error tells as a full disk too.

    Args:
        folder: Where the run writes; made.
        may_fill: Whether it will be full.
    """

    def __init__(self, folder: Path, may_fill: bool) -> None:
        folder.mkdir()
        self._folder = folder
        self._filler = folder / "filler"
        self._until_s = 0.0
        self._limited: psutil.Process | None = None
        command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "tmpfs", str(folder)]
        if may_fill:
            with suppress(OSError):
                subprocess.run(command, capture_output=True, check=False)
        self.is_mounted = folder.is_mount()
        self.how = f"tmpfs of {_DISK_MB} MiB, filled" if self.is_mounted else "RLIMIT_FSIZE"

    @property
    def is_full(self) -> bool:
        """True while nothing fits on it."""
        return bool(self._until_s)

    def fill(self, process: int) -> None:
        """Fills it, for a run whose own process this is."""
        self._until_s = time.monotonic() + _LONGEST_FULL_S
        if not self.is_mounted:
            self._limited = psutil.Process(process)
            self._limited.rlimit(psutil.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
            return
        with self._filler.open("wb", buffering=0) as file:
            for size in (2**20, 2**12):
                with suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    def meet(self) -> None:
        """Notes that the run has ended of it: the time until there is space begins."""
        self._until_s = min(self._until_s, time.monotonic() + _FULL_S)

    def look(self) -> None:
        """Makes space when it is time."""
        if self.is_full and time.monotonic() > self._until_s:
            self._until_s = 0.0
            self._filler.unlink(missing_ok=True)
            if self._limited is not None:
                with suppress(psutil.Error):
                    infinity = resource.RLIM_INFINITY
                    self._limited.rlimit(psutil.RLIMIT_FSIZE, (infinity, infinity))

    def close(self, keep: bool = True) -> None:
        """Gives a mounted file system back, its content copied into the folder."""
        if not self.is_mounted:
            return
        self._filler.unlink(missing_ok=True)
        kept = self._folder.with_name("kept")
        if keep:
            shutil.copytree(self._folder, kept, symlinks=True)
        subprocess.run(["umount", "--lazy", str(self._folder)], check=True)
        if keep:
            self._folder.rmdir()
            kept.rename(self._folder)


class Machines:
    """A Ray cluster of two machines, both of them this one; the second can be lost.

    Its token goes into the environment of this process, which has not loaded Ray before.

    Args:
        environment: Variables of the roles on it, which come from the machines, not from the run.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={**_NODE, "labels": {"side": "left"}, "include_dashboard": False},
        )
        self._second = self._add()

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which a run joins the cluster."""
        return {"RAY_ADDRESS": str(self._cluster.address)}

    def lose(self) -> None:
        """Kills the raylet of the second machine; another comes some seconds later."""
        from cluster.procfs import raylet_of

        os.kill(raylet_of(self._second.node_id), signal.SIGKILL)
        time.sleep(_MACHINE_S)
        lost, self._second = self._second, self._add()
        with suppress(Exception):  # Ray complains that its raylet was killed.
            self._cluster.remove_node(lost)

    def close(self) -> None:
        """Ends all machines."""
        self._cluster.shutdown()

    def _add(self) -> Any:  # noqa: ANN401
        return self._cluster.add_node(**_NODE, labels={"side": "right"})
