"""A cluster of several machines on this one: namespaces with addresses and disks of their own.

    host ── bridge ──┬── head    10.x.y.2   its own /.../disk
      10.x.y.1       ├── left    10.x.y.3   its own /.../disk
                     └── right   10.x.y.4   its own /.../disk

Every machine is a raylet in namespaces of network, processes and mounts: `disk` is one path, behind
which each has a folder of its own, with Ray's files, caches and whatever a program writes there.
All else of the file system is shared, as an image would be. The tests' process is a laptop beside
the cluster: it reaches the dashboard, and has no disk of a machine. A machine is forked off the
server of libraries and goes into its namespaces before it starts anything (`namespaces.py`).
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from tests.helpers.forked_python import PYTHON, forked_python
from tests.helpers.namespaces import python_of

ROOT = Path(__file__).parents[2]
PORT, DASHBOARD = 6379, 8265
_START_S = 180.0
_SYSTEM = (
    '{"health_check_period_ms": 1000, "health_check_failure_threshold": 3, '
    '"prestart_worker_first_driver": false}'
)
"""A machine that is gone counts as lost after three seconds and not after fourteen; and workers are
started when they are asked for, and not a core one before: a job has its own."""


def why_no_machines() -> str:
    """Returns why this system has no namespaces for machines; empty where it has."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "the programs ip and unshare are missing"
    name = f"sgmd-{os.getpid()}-try"
    tried = subprocess.run(
        f"ip netns add {name} && ip netns exec {name} unshare --mount --pid --fork true; "
        f"rc=$?; ip netns del {name}; exit $rc",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class Machines:
    """Machines on one bridge.

    Args:
        root: A folder with a short path: Ray's sockets lie below it.

    Attributes:
        disk: The path of every machine's own disk.
        host: Address of this process for the machines.
        environment: Variables that later machines have besides those of this process.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.environment: dict[str, str] = {}
        self._bridge = f"sgmd{os.getpid() % 100_000}"
        self._net = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self._raylets: dict[str, subprocess.Popen[bytes]] = {}
        self._count = 1
        self.disk = root / "disk"
        self.disk.mkdir()
        self.host = f"{self._net}.1"
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self.host}/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")

    @property
    def dashboard(self) -> str:
        """URL of the job server."""
        return f"http://{self._net}.2:{DASHBOARD}"

    @property
    def gcs(self) -> str:
        """Address of Ray's control service."""
        return f"{self._net}.2:{PORT}"

    def files(self, name: str) -> Path:
        """Folder that is the disk of a machine."""
        return self._root / name

    def log(self, name: str) -> str:
        """Words of a machine's `ray start`."""
        return (self._root / f"{name}.log").read_text()

    def add(
        self, name: str, labels: Mapping[str, str], cpus: int, *, variables: Mapping[str, str] = {}
    ) -> subprocess.Popen[bytes]:
        """Puts a machine beside the others; the first one is the head.

        Args:
            name: What it is called.
            labels: Labels of its node.
            cpus: Logical CPUs.
            variables: What it has otherwise in its environment.
        """
        is_head, self._count = self._count == 1, self._count + 1
        address = f"{self._net}.{self._count}"
        space = self._connect(name, address)
        python = python_of(self.disk)
        role = ["--head", f"--port={PORT}", f"--system-config={_SYSTEM}"]
        role += ["--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD}"]
        command = [
            *(str(python), "-m", "ray.scripts.scripts", "start", "--block"),
            *(role if is_head else [f"--address={self.gcs}"]),
            *(f"--node-ip-address={address}", f"--num-cpus={cpus}", "--num-gpus=0"),
            f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}",
            *(f"--object-store-memory={100 * 2**20}", "--disable-usage-stats"),
            *((f"--temp-dir={self.disk / 'ray'}",) if is_head else ()),
        ]
        self.files(name).mkdir()
        apart = [forked_python(), "-m", "tests.helpers.namespaces", PYTHON]
        inside = [space, str(self.files(name)), str(self.disk), *command]
        environment = {**os.environ, **self.environment, **variables}
        environment |= {"XDG_CACHE_HOME": str(self.disk / "cache")}
        environment |= {"PATH": f"{python.parent}:{os.environ['PATH']}"}
        environment.pop("RAY_ADDRESS", None)
        with (self._root / f"{name}.log").open("w") as log:
            raylet = subprocess.Popen(
                [*apart, *inside],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._raylets[name] = raylet
        return raylet

    def wait_for_head(self) -> None:
        """Returns once jobs can be submitted."""
        end = time.monotonic() + _START_S
        while time.monotonic() < end:
            assert self._raylets["head"].poll() is None, self.log("head")
            with suppress(OSError):
                with suppress(HTTPError):
                    urlopen(f"{self.dashboard}/api/version", timeout=5).close()
                return
            time.sleep(0.3)
        raise AssertionError(self.log("head"))

    def cut_off(self, name: str) -> None:
        """Takes a machine away as a power failure does: nothing of it goes on, nothing is said."""
        space = self._space(name)
        found = subprocess.run(
            ["ip", "netns", "pids", space], capture_output=True, text=True, check=True
        )
        for number in found.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)
        self._raylets.pop(name).wait(timeout=30)
        _run("ip", "netns", "del", space)

    def close(self) -> None:
        """Ends all machines, and takes the bridge down."""
        for name in [*self._raylets]:
            with suppress(Exception):
                self.cut_off(name)
        with suppress(Exception):
            _run("ip", "link", "del", self._bridge)

    def _space(self, name: str) -> str:
        return f"{self._bridge}-{name}"

    def _connect(self, name: str, address: str) -> str:
        """Makes a network namespace with an address on the bridge; returns its name."""
        space, link = self._space(name), f"{self._bridge}v{self._count}"
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run("ip", "link", "set", link, "master", self._bridge, "up")
        for command in (
            ("addr", "add", f"{address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
            ("route", "add", "default", "via", self.host),
        ):
            _run("ip", "-n", space, *command)
        return space


@contextmanager
def some_machines() -> Iterator[Machines]:
    """Yields machines, none yet, that are gone after the block."""
    root = Path(tempfile.mkdtemp(prefix="sm-", dir="/tmp"))
    machines = Machines(root)
    try:
        yield machines
    finally:
        machines.close()
        shutil.rmtree(root, ignore_errors=True)
