"""Data of a server on other cores, of one that is far away, and of very many objects.

    apart     the server on one core, readers on another: the feed in its own process and
              pyarrow.dataset, in turns
    far       `sgmd distill tiny` from a server 50 ms away whose line carries 4 MB/s
    objects   the first batch of a prefix of 100,000 shards, each answer of the server 50 ms away

Rates are by the clock and by CPU time, which other programs on the machine do not lengthen.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
from data_sets import BUCKET, ENCODING, serve, write_captions, write_encoded, write_many
from data_stages import read_in_stages
from data_wait import measure_wait
from pyarrow.fs import S3FileSystem
from s3fs import S3FileSystem as FsspecS3

from pipelines.data.shards.schema import LATENTS, TEXT_EMBEDS
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.source import Source

# Executed as a program, this folder is on the path, and not the one above it.
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers.faulty_proxy import ProxyBook, Trouble, serve_faulty

_LATENCY_S = 0.05
_SLOW_BYTES_PER_S = 4e6
_NUM_OBJECTS = 100_000


@contextmanager
def far_server(bytes_per_s: float = 0.0) -> Iterator[ProxyBook]:
    """Puts a proxy before the server of this process's environment: each answer comes later."""
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    with serve_faulty(endpoint, lambda number: Trouble.NONE) as book:
        book.delay_s, book.bytes_per_s = _LATENCY_S, bytes_per_s
        os.environ["AWS_ENDPOINT_URL"] = book.endpoint
        FsspecS3.clear_instance_cache()
        try:
            yield book
        finally:
            os.environ["AWS_ENDPOINT_URL"] = endpoint


def measure_apart(scratch: Path, rounds: int) -> dict[str, Any]:
    """The feed and pyarrow.dataset on one core each in turns, the server on another."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed: one for the server, one for the readers")
    folder = scratch / BUCKET
    write_captions(folder / "captions", num_shards=32, shard_rows=16_384)
    write_encoded(folder / "encoded", num_shards=16, shard_rows=64)
    found: dict[str, Any] = {}
    os.sched_setaffinity(0, {cores[0]})  # The server inherits it.
    try:
        with serve(scratch):
            os.sched_setaffinity(0, {cores[1]})
            for kind, columns, num_rows, batch in (
                ("captions", (), 32 * 16_384, 1024),
                ("encoded", (LATENTS, TEXT_EMBEDS), 16 * 64, 16),
            ):
                encoding = ENCODING if columns else None
                source = Source(f"s3://{BUCKET}/{kind}", columns=columns, encoding=encoding)
                found[kind] = _compare(source, kind, num_rows, batch, rounds)
    finally:
        os.sched_setaffinity(0, set(cores))
    return {**found, "load": os.getloadavg()[0]}


def _compare(source: Source, kind: str, num_rows: int, batch: int, rounds: int) -> dict[str, Any]:
    wanted = [*source.columns, "sample_id", "caption"]
    sides: dict[str, Callable[[], None]] = {
        "pyarrow": lambda: _read_plainly(kind, wanted, num_rows),
        "feed": lambda: _read_by_feed(source, num_rows, batch),
    }
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for read in sides.values():
        read()  # Modules load, connections open.
    for _ in range(rounds):
        for name, read in sides.items():
            clock, cpu = time.perf_counter(), time.process_time()
            read()
            taken = (time.perf_counter() - clock, time.process_time() - cpu)
            runs[name].append((num_rows / taken[0], num_rows / taken[1]))
    ratios = np.divide(runs["feed"], runs["pyarrow"])
    return {
        "rows": num_rows,
        **{
            f"{name}_rows_per_{unit}": statistics.median(run[index] for run in each)
            for name, each in runs.items()
            for index, unit in enumerate(("s", "cpu_s"))
        },
        "feed_over_pyarrow": float(np.median(ratios[:, 0])),
        "feed_over_pyarrow_by_cpu": float(np.median(ratios[:, 1])),
        "feed_over_pyarrow_by_cpu_each": ratios[:, 1].tolist(),
        "stages": read_in_stages(source, num_rows, batch, rounds),
    }


def _read_plainly(kind: str, columns: list[str], num_rows: int) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    # A busy machine may keep the server from its core for longer than the usual 3 s.
    client = S3FileSystem(endpoint_override=endpoint, scheme="http", request_timeout=60)
    dataset = ds.dataset(f"{BUCKET}/{kind}", filesystem=client)
    assert sum(batch.num_rows for batch in dataset.to_batches(columns=columns)) == num_rows


def _read_by_feed(source: Source, num_rows: int, batch: int) -> None:
    with Feed(StreamSettings(source, seed=0), FeedProgress(), num_rows) as feed:
        for _ in range(num_rows // batch):
            taken = feed.take(batch)
            if source.columns:
                assert len(feed.latents(taken.number)) == batch


def measure_far(scratch: Path, rounds: int) -> dict[str, Any]:
    """Runs of the command from a far server on a slow line; without Ray, and on it."""
    found: dict[str, Any] = {"latency_s": _LATENCY_S, "bytes_per_s": _SLOW_BYTES_PER_S}
    for mode in ("local", "pools"):
        folder = scratch / mode
        folder.mkdir()
        settings = [f"topology.mode={mode}"]
        far = partial(far_server, _SLOW_BYTES_PER_S)
        found[mode] = measure_wait(folder, rounds, far, settings)
        print(mode, found[mode], file=sys.stderr)
    return {**found, "load": os.getloadavg()[0]}


def measure_objects(scratch: Path, rounds: int) -> dict[str, Any]:
    """Time to the first batch of 100,000 shards of a server that is far away."""
    folder = scratch / BUCKET / "many"
    write_many(folder, 100)
    for number in range(100, _NUM_OBJECTS):
        # Links: a file of its own for each would say the same and take minutes.
        os.link(folder / f"part-{number % 100:05d}.parquet", folder / f"part-{number:05d}.parquet")
    source = Source(f"s3://{BUCKET}/many")
    seconds: list[float] = []
    requests: list[int] = []
    with serve(scratch), far_server() as book:
        for _ in range(rounds):
            before, began = len(book.requests), time.perf_counter()
            with Feed(StreamSettings(source, seed=0), FeedProgress(), 16) as feed:
                assert len(feed.take(16).captions) == 16
            seconds.append(time.perf_counter() - began)
            requests.append(len(book.requests) - before)
    return {
        "shards": _NUM_OBJECTS,
        "latency_s": _LATENCY_S,
        "first_batch_s": statistics.median(seconds),
        "each_s": seconds,
        "requests": requests,
    }
