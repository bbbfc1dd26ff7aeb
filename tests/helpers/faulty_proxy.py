"""A proxy before an S3 server that fails as networks and busy servers do, by plan.

    client -> proxy -> server      503 SlowDown, 500, resets in mid-answer, silence, nobody there

Which request fails how is a function of its number, so a test can be run again. Signatures stay
valid: they cover the host that the client named, and the server checks what it is sent.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_SLOW_DOWN = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
_DENIED = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>no</Message></Error>'
_INTERNAL = b'<?xml version="1.0"?><Error><Code>InternalError</Code><Message>no</Message></Error>'


class Trouble(StrEnum):
    """What happens to a request."""

    NONE = "none"
    SLOW_DOWN = "503 SlowDown"
    INTERNAL = "500"
    DENIED = "403 AccessDenied"
    SILENCE = "no answer"
    RESET = "reset in the middle of the answer"
    STALL = "silence in the middle of the answer"
    DRIBBLE = "a slow answer"


_REFUSALS = {
    Trouble.SLOW_DOWN: (503, _SLOW_DOWN),
    Trouble.INTERNAL: (500, _INTERNAL),
    Trouble.DENIED: (403, _DENIED),
}


@dataclass
class ProxyBook:
    """What a proxy has seen and what it does.

    Attributes:
        endpoint: Where clients reach it.
        plan: Trouble of the n-th request; may be exchanged while it runs.
        stall_s: How long a stalled or missing answer stays silent.
        requests: (method, path with query) of every request, in order.
        troubles: How often each trouble was made.
        sent: Bytes of all answers that came through whole.
        current: Path of the request that the plan is asked about.
        delay_s: Silence before each answer, as of a server that is far away.
        bytes_per_s: Rate of all answers together; 0: as fast as they come.
    """

    endpoint: str
    plan: Callable[[int], Trouble]
    stall_s: float
    requests: list[tuple[str, str]] = field(default_factory=list)
    troubles: dict[Trouble, int] = field(default_factory=dict)
    sent: int = 0
    current: str = ""
    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    _free_at: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, method: str, path: str) -> Trouble:
        with self._lock:
            self.current = path
            trouble = self.plan(len(self.requests))
            self.requests.append((method, path))
            self.troubles[trouble] = self.troubles.get(trouble, 0) + 1
        return trouble

    def count(self, num_bytes: int) -> None:
        with self._lock:
            self.sent += num_bytes

    def hold_back(self, num_bytes: int) -> None:
        """Waits as long as a slow line takes for an answer, behind those before it."""
        if not self.bytes_per_s:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + num_bytes / self.bytes_per_s
            wait_s = self._free_at - time.monotonic()
        time.sleep(max(0.0, wait_s))

    def lists(self) -> int:
        """Pages of listings that were asked for."""
        return sum("list-type=2" in path for _, path in self.requests)


def every(count: int, *troubles: Trouble) -> Callable[[int], Trouble]:
    """Each `count`-th request meets the next of some troubles."""

    def plan(number: int) -> Trouble:
        turn, rest = divmod(number, count)
        return troubles[turn % len(troubles)] if rest == count - 1 else Trouble.NONE

    return plan


@contextmanager
def serve_faulty(
    endpoint: str, plan: Callable[[int], Trouble], stall_s: float = 30.0, port: int = 0
) -> Iterator[ProxyBook]:
    """Stands before the server at `endpoint` until the block ends; port 0 is any free one."""
    target = urlsplit(endpoint).netloc
    book = ProxyBook("", plan, stall_s)

    class Handler(_Handler):
        backend = target
        events = book

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    book.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield book
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Small answers would otherwise wait for each other.
    disable_nagle_algorithm = True
    backend: str
    events: ProxyBook

    def do_GET(self) -> None:
        self._pass_on()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _pass_on(self) -> None:
        trouble = self.events.enter(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if trouble in _REFUSALS:
            status, told = _REFUSALS[trouble]
            self._answer(status, {"Content-Type": "application/xml"}, told)
            return
        if trouble is Trouble.SILENCE:
            time.sleep(self.events.stall_s)
            self._reset()
            return
        time.sleep(self.events.delay_s)
        server = HTTPConnection(self.backend, timeout=60)
        headers = dict(self.headers.items())
        server.request(self.command, self.path, body=body or None, headers=headers)
        answer = server.getresponse()
        content = answer.read()
        found = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("transfer-encoding", "connection", "content-length")
        }
        length = answer.getheader("Content-Length")
        server.close()
        self.events.hold_back(len(content))
        self._answer(answer.status, found, content, trouble, length)

    def _answer(
        self,
        status: int,
        headers: dict[str, str],
        content: bytes,
        trouble: Trouble = Trouble.NONE,
        length: str | None = None,
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        is_head = self.command == "HEAD"
        self.send_header("Content-Length", length if is_head and length else str(len(content)))
        self.end_headers()
        if is_head:
            return
        half = len(content) // 2
        try:
            if trouble is Trouble.RESET:
                self.wfile.write(content[:half])
                self._reset()
                return
            if trouble is Trouble.STALL:
                self.wfile.write(content[:half])
                time.sleep(self.events.stall_s)
                self._reset()
                return
            if trouble is Trouble.DRIBBLE:
                for start in range(0, len(content), 1 + len(content) // 8):
                    self.wfile.write(content[start : start + 1 + len(content) // 8])
                    time.sleep(0.02)
                return
            self.wfile.write(content)
            self.events.count(len(content))
        except OSError:  # The client has lost patience.
            self.close_connection = True

    def _reset(self) -> None:
        self.wfile.flush()
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True
