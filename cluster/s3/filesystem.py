"""An S3 file system whose requests end within a budget of time, and are reported meanwhile.

    list, head, put, delete    repeated by the SDK; all tries together bounded
    list                       also asked for again while the server is busy (SlowDown)
    bytes (cat_file, open)     also asked for again where the answer breaks off

So `info`, `ls`, `exists`, `open`, `cat_file` and `pipe_file` need no patience of their own.
"""

import ipaddress
import os
from pathlib import Path
from typing import Any, cast

from fsspec.asyn import sync_wrapper
from fsspec.callbacks import DEFAULT_CALLBACK, Callback
from s3fs import S3FileSystem
from s3fs.core import S3File

from cluster.s3.patience import (
    Waiting,
    ask_again,
    ask_once,
    budget_of,
    is_busy,
    reporting,
)
from cluster.s3.settings import S3Settings
from sgmd_core.errors import DataError

RUNS = S3Settings()
"""Patience with the folders of runs."""

_OF_LISTINGS = {"Name", "Prefix", "KeyCount", "MaxKeys", "IsTruncated", "Contents"}
"""Parts of a listing, of which an empty folder has some too."""

# A part of a file that is downloaded has a budget of its own.
_PART_BYTES = 64 * 2**20


def open_s3(settings: S3Settings | None = None) -> "PatientS3FileSystem":
    """The client of the S3 server that the AWS variables name.

    Args:
        settings: How to speak to the server; None takes those of the folders of runs.

    Raises:
        DataError: A host of the internet is named without a scheme.
    """
    settings = RUNS if settings is None else settings
    return PatientS3FileSystem(patience=settings, **_options(settings))


class PatientS3FileSystem(S3FileSystem):
    """S3 with patience.

    Args:
        patience: Tries and time of a request.
        options: As `s3fs.S3FileSystem` takes them.
    """

    # The SDK repeats requests; s3fs would repeat each of them five times again.
    retries = 1

    def __init__(self, *, patience: S3Settings = S3Settings(), **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self.patience = patience

    async def cat_once(
        self, path: str, start: int | None, end: int | None, version_id: str | None = None
    ) -> bytes:
        """Reads a range of an object with one request; for those who count tries themselves."""
        # One request also of a whole object: parts of two versions of it would not fit together.
        found = await super()._cat_file(path, version_id, start, end, max_concurrency=1)
        return cast("bytes", found)

    async def _cat_file(  # pyright: ignore[reportIncompatibleMethodOverride] - keyword options
        self,
        path: str,
        version_id: str | None = None,
        start: int | None = None,
        end: int | None = None,
        **options: Any,  # noqa: ANN401
    ) -> bytes:
        await self.set_session()
        budget_s = budget_of(None if end is None else end - (start or 0), self.patience)
        async with reporting({0: Waiting(f"reading {path}", budget_s)}, self.patience):
            answer, _ = await ask_again(
                lambda: self.cat_once(path, start, end, version_id), self.patience, budget_s
            )
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _get_file(  # pyright: ignore[reportIncompatibleMethodOverride] - keyword options
        self,
        rpath: str,
        lpath: str,
        callback: Callback = DEFAULT_CALLBACK,
        version_id: str | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        size = int((await self._info(rpath, refresh=True))["size"])
        callback.set_size(size)
        with Path(lpath).open("wb") as file:
            for start in range(0, size, _PART_BYTES):
                part = await self._cat_file(
                    rpath, version_id, start, min(start + _PART_BYTES, size)
                )
                file.write(part)
                callback.relative_update(len(part))

    async def _call_s3(self, method: str, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        if method == "get_object":
            # Its bytes come later; who reads them has a budget for both.
            return await super()._call_s3(method, *arguments, **options)
        # Making the client takes seconds on a busy machine, and is not the server's delay.
        await self.set_session()
        body = options.get("Body")
        budget_s = budget_of(len(body) if isinstance(body, bytes) else 0, self.patience)
        call = super()._call_s3
        place = f"{options.get('Bucket')}/{options.get('Key') or options.get('Prefix') or ''}"
        waiting = {0: Waiting(f"waiting for the answer to {method} of {place}", budget_s)}
        async with reporting(waiting, self.patience):
            if method != "list_objects_v2":
                return await ask_once(lambda: call(method, *arguments, **options), budget_s)
            # What a run begins with: one that starts again meets the busy server that ended it.
            answer, _ = await ask_again(
                lambda: call(method, *arguments, **options), self.patience, budget_s, is_busy
            )
        if isinstance(answer, Exception):
            raise answer
        if not _OF_LISTINGS & set(answer):
            # As of a portal that asks for a login: the SDK reads an empty folder out of it.
            raise ConnectionError(f"what answers for {place} is not an S3 server: it lists nothing")
        return answer

    # The one of s3fs is bound to its own method.
    call_s3 = sync_wrapper(_call_s3)

    def _open(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest are keywords
        self,
        path: str,
        mode: str = "rb",
        **options: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        if mode != "rb":
            return super()._open(path, mode, **options)
        options["block_size"] = options.get("block_size") or self.default_block_size
        options["cache_type"] = options.get("cache_type") or self.default_cache_type
        return _PatientFile(self, path, mode, **options)


class _PatientFile(S3File):
    def _fetch_range(self, start: int, end: int) -> Any:  # noqa: ANN401 - as s3fs has it
        if start == end:
            return b""
        return self.fs.cat_file(self.path, start=start, end=end)


# Whoever clears the clients of s3fs, because keys or addresses are others now, means these too.
PatientS3FileSystem._cache = S3FileSystem._cache


def _options(s3: S3Settings) -> dict[str, Any]:
    """Returns the options of s3fs and of the SDK under it."""
    config: dict[str, Any] = {
        "connect_timeout": s3.connect_timeout_s,
        "read_timeout": s3.read_timeout_s,
        "retries": {"total_max_attempts": s3.max_attempts, "mode": s3.retry_mode},
        "s3": {"addressing_style": s3.addressing},
    }
    if s3.checksums is not None:
        config["request_checksum_calculation"] = s3.checksums
        config["response_checksum_validation"] = s3.checksums
    # Without its own read-ahead, s3fs fetches what is asked for and not 50 MB around it.
    options: dict[str, Any] = {"config_kwargs": config, "default_cache_type": "none"}
    endpoint = endpoint_with_scheme()
    return options if endpoint is None else {**options, "endpoint_url": endpoint}


def endpoint_with_scheme() -> str | None:
    """The endpoint of the environment as a URL, where it stands there without a scheme.

    A host of this machine or network (`localhost:9000`, `10.0.0.5:9000`, `minio:9000`) is spoken to
    by http, as such servers are.

    Raises:
        DataError: A host of the internet is named without a scheme.
    """
    name = next(
        (one for one in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(one)), None
    )
    if name is None or "://" in os.environ[name]:
        return None
    given = os.environ[name]
    host = given.partition("/")[0].partition(":")[0]
    try:
        is_near = ipaddress.ip_address(host).is_private
    except ValueError:
        is_near = "." not in host
    if not is_near:
        raise DataError(
            f"reading {name}",
            f"{given!r}, which has no scheme",
            "a URL such as https://host:port",
            f"Set {name}=https://{given} (or http://, if the server does not encrypt)",
        )
    return f"http://{given}"
