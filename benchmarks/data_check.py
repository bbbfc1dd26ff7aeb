"""Peak memory of `sgmd check` over the size of a row group of captions.

Each size is checked by a process of its own, so that its peak is that of the check alone.
"""

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = (10_000, 50_000, 200_000, 400_000)
_WORDS = 100
_CHECK = """
import sys
from pipelines.data.checking.check import CheckOptions, check_shards
report = check_shards(sys.argv[1], CheckOptions(num_processes=0))
assert report.is_usable and report.num_rows == int(sys.argv[2]), report
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
"""


def measure_check(scratch: Path, rounds: int) -> dict[str, Any]:
    """Peak memory of checks of one row group each; `rounds` makes no difference."""
    sizes = []
    for rows in ROWS:
        folder = scratch / f"rows-{rows}"
        caption_bytes = _write_group(folder, rows)
        command = [sys.executable, "-c", _CHECK, str(folder), str(rows)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peak_mb = int(done.stdout) * 1024 / 1e6
        sizes.append({"rows": rows, "caption_mb": caption_bytes / 1e6, "peak_mb": peak_mb})
    first, last = sizes[0], sizes[-1]
    grown = last["peak_mb"] - first["peak_mb"]
    return {
        "sizes": sizes,
        "bytes_per_caption_byte": grown / (last["caption_mb"] - first["caption_mb"]),
    }


def _write_group(folder: Path, num_rows: int) -> int:
    """Writes one shard of one row group; returns the bytes of its captions."""
    folder.mkdir(parents=True)
    generator = random.Random(0)
    words = [f"{word}{number}" for word in ("square", "moves", "left") for number in range(700)]
    captions = [" ".join(generator.choices(words, k=_WORDS)) for _ in range(num_rows)]
    ids = [f"clip-{row:08d}" for row in range(num_rows)]
    table = pa.table({"sample_id": ids, "caption": captions})
    pq.write_table(table, folder / "one.parquet", row_group_size=num_rows)
    return sum(map(len, captions))
