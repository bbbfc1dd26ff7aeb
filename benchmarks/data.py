"""Speed and memory of the data plane, over S3 from a server on this machine.

    python benchmarks/data.py --output data.json            everything
    python benchmarks/data.py stream decode --output ...    some pieces; the file keeps the others

    stream   captions-only and encoded shards through the feed (read by Ray Data in one process of
             its own, and in the feed's), and through plain pyarrow.dataset with Arrow's own S3
             client and with s3fs, in turns; rows a second of four passes. And where the time goes:
             the feed's stages in one process, with the CPU that each needs
    decode   raw video through the reader of a window, and through a plain PyAV loop, as it is and
             with one thread that converts, in turns; one core
    first    seconds until the first batch of a prefix of 10,000 shards, and until all are listed
    check    peak memory of `sgmd check` for row groups of 10,000 to 400,000 captions
    memory   resident memory of every process while 20,000 clips are streamed and decoded
    wait     how long the roles of `sgmd distill tiny` wait for data from S3
    apart, far, objects      see data_far.py

Both sides of a comparison read the same files from the same server, one after the other, so that a
machine whose speed drifts slows both.
"""

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import torch
from av.video.reformatter import VideoReformatter
from data_check import measure_check
from data_far import measure_apart, measure_far, measure_objects
from data_memory import draw, measure_memory
from data_sets import (
    BUCKET,
    ENCODING,
    serve,
    write_captions,
    write_encoded,
    write_many,
    write_videos,
)
from data_stages import read_in_stages
from data_wait import measure_wait
from pyarrow.fs import S3FileSystem
from s3fs import S3FileSystem as FsspecS3

from cluster.runtime import start_ray
from pipelines.data.clips.clip_decoding import ClipDecoder
from pipelines.data.clips.clip_format import ClipFormat
from pipelines.data.shards.filesystem import open_folder
from pipelines.data.shards.listing import list_chapters
from pipelines.data.shards.schema import FPS, LATENTS, TEXT_EMBEDS, VIDEO
from pipelines.data.stream.catalogue import Catalogue
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.plan import ShuffleSettings
from pipelines.data.stream.ray_stream import ReadAheadSettings
from pipelines.data.stream.source import Source
from pipelines.data.stream.stream import plan_windows
from pipelines.data.stream.window import read_window
from pipelines.data.stream.window_decoding import decode_rows
from pipelines.run.revision import git_revision, versions
from pipelines.shapes import FRAME_PX, NUM_FRAMES

_PASSES = 4


def measure_stream(scratch: Path, rounds: int) -> dict[str, Any]:
    """Captions-only and encoded shards, through the feed and through pyarrow.dataset."""
    folder = scratch / BUCKET
    torch.set_num_threads(1)  # As in the actor in which a run has its feed.
    write_captions(folder / "captions", num_shards=64, shard_rows=16_384)
    write_encoded(folder / "encoded", num_shards=32, shard_rows=64)
    found: dict[str, Any] = {}
    with serve(scratch), start_ray(num_cpus=3):
        for kind, columns, num_rows, batch in (
            ("captions", (), 64 * 16_384, 1024),
            ("encoded", (LATENTS, TEXT_EMBEDS), 32 * 64, 16),
        ):
            source = Source(
                f"s3://{BUCKET}/{kind}", columns=columns, encoding=ENCODING if columns else None
            )
            _stream(source, batch * 4, batch, readers=1)  # Processes start, modules load.
            names = ("pyarrow", "s3fs", "feed", "with_start", "here")
            runs: dict[str, list[float]] = {name: [] for name in names}
            wanted = [*columns, "sample_id", "caption"]
            for _ in range(rounds):
                runs["pyarrow"].append(_plain(_arrow_client(), kind, wanted, num_rows))
                runs["s3fs"].append(_plain(FsspecS3(), kind, wanted, num_rows))
                # One process that reads keeps two cores busy; the server and we share them with it.
                first_s, rest = _stream(source, _PASSES * num_rows, batch, readers=1)
                runs["feed"].append(rest)
                taken = _PASSES * num_rows
                runs["with_start"].append(taken / (first_s + (taken - batch) / rest))
                runs["here"].append(_stream(source, taken, batch, readers=0)[1])
            each = np.divide(runs["feed"], runs["pyarrow"]).tolist()
            here = np.divide(runs["here"], runs["pyarrow"]).tolist()
            found[kind] = {
                "rows": num_rows,
                "bytes": sum(path.stat().st_size for path in (folder / kind).iterdir()),
                "pyarrow_rows_per_s": statistics.median(runs["pyarrow"]),
                "s3fs_rows_per_s": statistics.median(runs["s3fs"]),
                "feed_rows_per_s": statistics.median(runs["feed"]),
                "feed_rows_per_s_with_start": statistics.median(runs["with_start"]),
                "feed_over_pyarrow": statistics.median(each),
                "feed_over_pyarrow_each": each,
                "here_rows_per_s": statistics.median(runs["here"]),
                "here_over_pyarrow": statistics.median(here),
                "here_over_pyarrow_each": here,
                "here_over_s3fs": statistics.median(np.divide(runs["here"], runs["s3fs"])),
                "s3fs_over_pyarrow": statistics.median(np.divide(runs["s3fs"], runs["pyarrow"])),
                "feed_over_s3fs": statistics.median(np.divide(runs["feed"], runs["s3fs"])),
                "stages": read_in_stages(source, num_rows, batch, rounds),
            }
            print(kind, json.dumps(found[kind]), file=sys.stderr)
    return found


def _arrow_client() -> S3FileSystem:
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    return S3FileSystem(endpoint_override=endpoint, scheme="http")


def _plain(client: S3FileSystem | FsspecS3, kind: str, columns: list[str], num_rows: int) -> float:
    """Rows a second of some passes with pyarrow.dataset."""
    began = time.perf_counter()
    dataset = ds.dataset(f"{BUCKET}/{kind}", filesystem=client)
    for _ in range(_PASSES):
        assert sum(batch.num_rows for batch in dataset.to_batches(columns=columns)) == num_rows
    return _PASSES * num_rows / (time.perf_counter() - began)


def _stream(source: Source, num_rows: int, batch: int, readers: int) -> tuple[float, float]:
    """Seconds until the first batch, and rows a second from then on to the end."""
    settings = StreamSettings(source, seed=0, ahead=ReadAheadSettings(readers=readers))
    began = time.perf_counter()
    with Feed(settings, FeedProgress(), num_rows) as feed:
        _take(feed, source, batch)
        first_s = time.perf_counter() - began
        for _ in range(num_rows // batch - 1):
            _take(feed, source, batch)
        rest_s = time.perf_counter() - began - first_s
    return first_s, (num_rows - batch) / rest_s


def _take(feed: Feed, source: Source, size: int) -> None:
    batch = feed.take(size)
    assert batch.rows.num_rows == size
    if source.columns:
        assert len(feed.latents(batch.number)) == size


def measure_decode(scratch: Path, rounds: int) -> dict[str, Any]:
    """Raw video: windows read, checked and decoded, against nothing but PyAV; in this process."""
    found = {}
    for zoom, num_clips in ((1, 512), (8, 64)):
        folder = scratch / BUCKET / f"zoom{zoom}"
        write_videos(folder, num_clips, shard_rows=num_clips // 4, zoom=zoom)
        side = FRAME_PX * zoom
        films = ds.dataset(str(folder)).to_table(columns=[VIDEO]).column(VIDEO).to_pylist()
        runs = []
        for _ in range(rounds):
            used_s: list[float] = []
            for threads in (0, 1):
                with _timed(used_s, time.process_time):
                    for film in films:
                        _decode_plainly(film, threads)
            with _timed(used_s, time.process_time):
                _decode_windows(str(folder), side, num_clips)
            runs.append([num_clips / each for each in used_s])
        found[f"{NUM_FRAMES} frames of {side} x {side}"] = {
            "clips": num_clips,
            "pyav_clips_per_core_s": statistics.median(run[0] for run in runs),
            "pyav_one_thread_clips_per_core_s": statistics.median(run[1] for run in runs),
            "window_clips_per_core_s": statistics.median(run[2] for run in runs),
            "window_over_pyav": statistics.median(run[2] / run[0] for run in runs),
            "window_over_pyav_one_thread": statistics.median(run[2] / run[1] for run in runs),
        }
    return found


def _decode_plainly(film: bytes, threads: int) -> None:
    """Decodes as a short loop does; 0 threads leave it to FFmpeg with how many it converts."""
    with av.open(io.BytesIO(film)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        # One converter a clip: what `frame.to_ndarray` sets up for each frame is slower.
        converter = VideoReformatter()
        frames = [
            converter.reformat(frame, format="rgb24", threads=threads).to_ndarray()
            for frame in container.decode(video=0)
        ]
    assert np.stack(frames).shape[0] == NUM_FRAMES


def _decode_windows(folder: str, side: int, num_clips: int) -> None:
    decoder = ClipDecoder(ClipFormat(NUM_FRAMES, side, side))
    shape = (NUM_FRAMES, side, side, 3)
    source = Source(folder, columns=(VIDEO, FPS), decode=decoder, pixel_shape=shape)
    catalogue = Catalogue(*open_folder(folder), 1000)
    reader = source.open_reader()
    clips = 0
    for planned in plan_windows(catalogue, 0, ShuffleSettings()):
        if planned.window.cursor.epoch:
            break
        table = pa.concat_tables(decode_rows(source, read_window(reader, source, planned.window)))
        assert table.column("reason").null_count == table.num_rows
        clips += table.num_rows
    assert clips == num_clips


def measure_first(scratch: Path, rounds: int) -> dict[str, Any]:
    """Time to the first batch of very many shards, in a Ray that has read nothing yet."""
    num_shards = 10_000
    write_many(scratch / BUCKET / "many", num_shards)
    source = Source(f"s3://{BUCKET}/many")
    seconds: dict[str, list[float]] = {"with_ray": [], "in_process": [], "listing_all": []}
    with serve(scratch):
        for _ in range(rounds):
            with _timed(seconds["in_process"]):
                assert (
                    len(Feed(StreamSettings(source, 0), FeedProgress(), 16).take(16).captions) == 16
                )
            with start_ray(num_cpus=3):
                settings = StreamSettings(source, 0, ahead=ReadAheadSettings())
                began = time.perf_counter()
                with Feed(settings, FeedProgress(), 1600) as feed:
                    feed.take(16)
                    seconds["with_ray"].append(time.perf_counter() - began)
            with _timed(seconds["listing_all"]):
                listed = sum(map(len, list_chapters(*open_folder(source.url), 1000)))
            assert listed == num_shards
    medians = {f"{name}_s": statistics.median(taken) for name, taken in seconds.items()}
    return {"shards": num_shards, **medians, "each": seconds}


@contextmanager
def _timed(seconds: list[float], clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    began = clock()
    yield
    seconds.append(clock() - began)


_PIECES: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "stream": measure_stream,
    "decode": measure_decode,
    "first": measure_first,
    "check": measure_check,
    "memory": measure_memory,
    "wait": measure_wait,
    "apart": measure_apart,
    "far": measure_far,
    "objects": measure_objects,
}


def main() -> None:
    """Parses the arguments, measures, writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=", ".join(_PIECES))
    parser.add_argument("--rounds", type=int, default=3, help="of each comparison")
    parser.add_argument("--output", type=Path, help="file for the JSON; standard output without")
    parser.add_argument("--plot", type=Path, help="SVG of the memory that was measured")
    arguments = parser.parse_args()
    unknown = set(arguments.pieces) - set(_PIECES)
    if unknown:
        parser.error(f"no piece {', '.join(sorted(unknown))}; there are {', '.join(_PIECES)}")
    output: Path | None = arguments.output
    # As in the processes of a run: threads beyond the cores only wait for each other.
    torch.set_num_threads(1)
    pieces = json.loads(output.read_text())["pieces"] if output and output.exists() else {}
    for name in arguments.pieces or _PIECES:
        with tempfile.TemporaryDirectory(prefix="bench") as scratch:
            found = _PIECES[name](Path(scratch), arguments.rounds)
        pieces[name] = {
            **found,
            "date": time.strftime("%Y-%m-%d"),
            "git_revision": git_revision(),
        }
        print(name, json.dumps(found)[:600], file=sys.stderr)
        result = {
            "benchmark": "data",
            "pieces": pieces,
            "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
            "versions": versions(),
        }
        text = json.dumps(result, indent=2) + "\n"
        if output:
            output.write_text(text)
    if arguments.plot and "memory" in pieces:
        arguments.plot.write_text(draw(pieces["memory"]))
    if not output:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
