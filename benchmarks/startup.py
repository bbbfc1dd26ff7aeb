"""CPU seconds of a start: `sgmd --help`, and `sgmd distill tiny` up to its first iteration.

    sgmd shapes data/shapes
    python benchmarks/startup.py --against ../earlier --output startup.json

Both trees take turns where an earlier one is given: a checkout of its own, whose sources go before
those that are installed. All processes of a run are counted, Ray's own included: each inherits a
variable of its environment by which it is found. CPU seconds, because a machine at work on other
things makes every other time longer.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from documents import write_document
from process_tree import MARK, ProcessTree

_ROOT = Path(__file__).resolve().parents[1]
_EVERY_S = 0.1
_TIMEOUT_S = 900.0


def measure_run(tree: Path, data: Path, overrides: list[str]) -> dict[str, Any]:
    """Starts a run and ends it after its first iteration.

    Args:
        tree: The sources.
        data: Folder of the shapes.
        overrides: Settings besides those of the recipe `tiny`.

    Raises:
        RuntimeError: The run has ended before, or takes too long.
    """
    mark = uuid4().hex
    processes = ProcessTree(mark)
    with tempfile.TemporaryDirectory(prefix="startup-", dir="/tmp") as folder:
        log = Path(folder) / "log"
        metrics = Path(folder) / "runs" / "tiny" / "metrics.jsonl"
        command = [*_python(), "distill", "tiny", f"output={folder}/runs"]
        command += [f"data.train={data}/train", f"data.validation={data}/held_out", *overrides]
        begin_s = time.monotonic()
        with log.open("w") as written:
            run = subprocess.Popen(
                command, cwd=folder, env=_environment(tree, mark), stdout=written, stderr=written
            )
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                processes.look()
                if run.poll() is not None or time.monotonic() - begin_s > _TIMEOUT_S:
                    raise RuntimeError(f"no iteration of {tree}:\n{log.read_text()}")
                time.sleep(_EVERY_S)
            processes.look()
            wall_s = time.monotonic() - begin_s
        finally:
            run.send_signal(signal.SIGKILL)
            run.wait()
            processes.end()
    by_name = processes.seconds_by_name()
    return {"cpu_s": sum(by_name.values()), "wall_s": wall_s, "by_process": by_name}


def measure_command(tree: Path, *arguments: str) -> float:
    """CPU seconds of a command that starts no process of its own."""
    before_s = _children_s()
    subprocess.run(
        [*_python(), *arguments], env=_environment(tree, ""), check=True, stdout=subprocess.DEVNULL
    )
    return _children_s() - before_s


def _children_s() -> float:
    """CPU seconds of the processes that were started from here and have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _python() -> list[str]:
    return [sys.executable, "-m", "pipelines.cli"]


def _environment(tree: Path, mark: str) -> Mapping[str, str]:
    # Compiled files are written, as they are where a package is installed.
    dropped = ("PYTHONDONTWRITEBYTECODE", "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"PYTHONPATH": str(tree), MARK: mark}


def main() -> None:
    """Measures both trees in turns and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="settings of the run, as of `sgmd distill`")
    parser.add_argument("--against", type=Path, help="an earlier checkout")
    parser.add_argument("--data", type=Path, default=Path("data/shapes"))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    trees = {"this": _ROOT} | ({"earlier": options.against.resolve()} if options.against else {})
    data = options.data.resolve()
    for tree in trees.values():
        # Once unmeasured: files are compiled and read from the disk.
        shards = [f"data.train={data}/train", f"data.validation={data}/held_out"]
        measure_command(tree, "distill", "tiny", "--dry-run", *shards)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    helps: dict[str, list[float]] = {name: [] for name in trees}
    for _ in range(options.pairs):
        for name, tree in trees.items():
            runs[name].append(measure_run(tree, data, options.overrides))
            helps[name].append(measure_command(tree, "--help"))
            print(f"{name}: {runs[name][-1]['cpu_s']:.1f} CPU s", file=sys.stderr)
    results: dict[str, Any] = {
        name: {
            "help_cpu_s": statistics.median(helps[name]),
            "first_iteration_cpu_s": statistics.median(run["cpu_s"] for run in runs[name]),
            "runs": runs[name],
        }
        for name in trees
    }
    if options.against:
        ratios = [
            this["cpu_s"] / earlier["cpu_s"]
            for this, earlier in zip(runs["this"], runs["earlier"], strict=True)
        ]
        results["ratios"] = {"median": statistics.median(ratios), "pair_by_pair": ratios}
    settings = {"settings": ["tiny", *options.overrides], "pairs": options.pairs}
    write_document("startup", settings | {"results": results}, options.output)


if __name__ == "__main__":
    main()
