"""A proxy with troubles between a test and the S3 server of its module."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.helpers.faulty_proxy import ProxyBook, Trouble, serve_faulty
from tests.helpers.s3_server import S3Server, use_server


@pytest.fixture
def through(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., ProxyBook]]:
    """Puts a proxy with some troubles between this process and the fixture `server`."""
    use_server(server.environment, monkeypatch)

    def put(plan: Callable[[int], Trouble], stall_s: float = 2.0) -> ProxyBook:
        book = stack.enter_context(
            serve_faulty(server.environment["AWS_ENDPOINT_URL"], plan, stall_s)
        )
        use_server({"AWS_ENDPOINT_URL": book.endpoint}, monkeypatch)
        return book

    with ExitStack() as stack:
        yield put
