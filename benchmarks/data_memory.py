"""Resident memory of every process while many clips are streamed from S3 and decoded.

Pages of the object store are shared and bounded by a setting; they count apart, or each process
would be charged for all of them. What is left is what a process could leak.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from data_sets import BUCKET, serve, write_videos

from cluster.runtime import start_ray
from pipelines.data.clips.clip_decoding import ClipDecoder
from pipelines.data.clips.clip_format import ClipFormat
from pipelines.data.shards.schema import FPS, VIDEO
from pipelines.data.stream.feed import Feed, FeedProgress, StreamSettings
from pipelines.data.stream.ray_stream import ReadAheadSettings
from pipelines.data.stream.source import Source
from pipelines.shapes import FRAME_PX, NUM_FRAMES

NUM_CLIPS = 20_000
_BATCH = 50
_EVERY = 500
# Imports, connections, first buffers: what every process takes once.
_WARM_UP_CLIPS = 4_000


def measure_memory(scratch: Path, rounds: int) -> dict[str, Any]:
    """One pass over 20,000 clips; `rounds` makes no difference."""
    write_videos(scratch / BUCKET / "videos", NUM_CLIPS)
    shape = (NUM_FRAMES, FRAME_PX, FRAME_PX, 3)
    source = Source(
        f"s3://{BUCKET}/videos",
        columns=(VIDEO, FPS),
        decode=ClipDecoder(ClipFormat(*shape[:3])),
        pixel_shape=shape,
    )
    clips: list[int] = []
    samples: list[dict[int, tuple[str, float, float]]] = []
    spilled_mb = 0.0
    with serve(scratch), start_ray(num_cpus=3, temp_dir=str(scratch / "ray")):
        settings = StreamSettings(source, 0, ahead=ReadAheadSettings())
        with Feed(settings, FeedProgress(), NUM_CLIPS) as feed:
            for taken in range(_BATCH, NUM_CLIPS + 1, _BATCH):
                batch = feed.take(_BATCH)
                assert feed.pixels(batch.number).shape == (_BATCH, *shape)
                if taken % _EVERY == 0:
                    clips.append(taken)
                    samples.append(_resident())
                    spilled_mb = max(spilled_mb, _spilled_mb(scratch / "ray"))
    curves = _curves(samples)
    warm = sum(count <= _WARM_UP_CLIPS for count in clips)
    ratios = {
        name: max(values[warm:]) / statistics.median(values[warm:])
        for name, values in curves.items()
    }
    store = [sum(shared for _, _, shared in sample.values()) for sample in samples]
    return {
        "clips": clips,
        "warm_up_clips": _WARM_UP_CLIPS,
        "private_mb": curves,
        "max_over_median_after_warm_up": ratios,
        "worst": max(ratios.values()),
        "shared_mb_max": max(store),
        "spilled_mb": spilled_mb,
    }


def _resident() -> dict[int, tuple[str, float, float]]:
    """(name, private MB, shared MB) of this process and all below it."""
    me = psutil.Process()
    found = {}
    for process in [me, *me.children(recursive=True)]:
        try:
            # Before any argument: Ray names its workers by what they do at the moment.
            name = process.name() if process != me else "feed"
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except (psutil.Error, OSError):
            continue
        sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
        if sizes:
            shared = int(sizes["RssShmem"]) / 1024
            private = (int(sizes["RssAnon"]) + int(sizes["RssFile"])) / 1024
            found[process.pid] = (_kind(name), private, shared)
    return found


def _kind(name: str) -> str:
    return "worker" if name.startswith(("ray::", "python")) else name


def _curves(
    samples: Sequence[dict[int, tuple[str, float, float]]],
) -> dict[str, list[float]]:
    """Private memory of each process that was there all the time after the first sample."""
    steady = set.intersection(*(set(sample) for sample in samples[1:]))
    curves: dict[str, list[float]] = {}
    for pid in sorted(steady):
        kind = samples[-1][pid][0]
        name = kind if kind not in curves else f"{kind} {sum(k.startswith(kind) for k in curves)}"
        first = samples[0].get(pid, samples[1][pid])[1]
        curves[name] = [first, *(sample[pid][1] for sample in samples[1:])]
    return curves


def _spilled_mb(ray_folder: Path) -> float:
    """Returns what Ray has spilled to disk from a full object store and not deleted again."""
    files = ray_folder.glob("session_*/ray_spilled_objects*/**/*")
    return sum(path.stat().st_size for path in files if path.is_file()) / 2**20


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 720, 360, 60, 40, 20, 170
_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")


def draw(found: dict[str, Any]) -> str:
    """The curves as an SVG of their own, readable on a light and on a dark page."""
    clips, curves = found["clips"], found["private_mb"]
    top = 100 * (1 + max(max(values) for values in curves.values()) // 100)

    def place(count: float, mb: float) -> tuple[float, float]:
        across = _LEFT + (_WIDTH - _LEFT - _RIGHT) * count / clips[-1]
        return across, _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * mb / top

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for mb in range(0, int(top) + 1, 100):
        x, y = place(0, mb)
        parts.append(
            f'<path d="M{x:.0f} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>'
            f'<text x="{x - 6:.0f}" y="{y + 4:.1f}" text-anchor="end" fill="#333">{mb}</text>'
        )
    for step in range(5):
        x, y = place(clips[-1] * step / 4, 0)
        parts.append(
            f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle" fill="#333">'
            f"{clips[-1] * step // 4:,}</text>"
        )
    parts.append(
        f'<text x="{_LEFT}" y="{_TOP - 6}" fill="#333">private resident memory, MB</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end" fill="#333">clips</text>'
    )
    ends: list[float] = []
    for number, (name, values) in enumerate(sorted(curves.items(), key=lambda curve: curve[1][-1])):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(
            "{:.1f},{:.1f}".format(*place(*pair)) for pair in zip(clips, values, strict=True)
        )
        x, y = place(clips[-1], values[-1])
        # Names that would lie over each other move up.
        y = min([y + 4, *(end - 13 for end in ends[-1:])])
        ends.append(y)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            f'<text x="{x + 8:.0f}" y="{y:.1f}" fill="{colour}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])
