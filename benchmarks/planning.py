"""Layouts for 8 to 1,024 GPUs at 1.3B and 14B, as the table of docs/planning.md.

    python benchmarks/planning.py                          modelled
    python benchmarks/planning.py --measured gpu.json      from times of benchmarks/gpu_check.py

Nothing is run: it asks the planner, with four samples a GPU.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipelines.planning.hardware import GB, Hardware
from pipelines.planning.layouts import Layout
from pipelines.planning.plan import Plan, make_plan
from pipelines.planning.stage_times import measured, modelled
from pipelines.planning.workload import Workload
from sgmd_core.errors import ConfigError
from workers.models.wan_arithmetic import RELEASED_SHAPES

LATENT_SHAPE = (16, 21, 60, 104)
TEXT_LENGTH = 512
SAMPLES_PER_GPU = 4
NUM_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
HEADINGS = (
    "GPUs",
    "batch",
    "learn : score",
    "m, depth",
    "map: s",
    "busy, %",
    "GB a GPU",
    "pools: s",
    "GB",
    "fused: s",
    "GB",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one table a size of network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--measured", type=Path, help="JSON of benchmarks/gpu_check.py, or a run")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GB")
    given = parser.parse_args(arguments)
    hardware = Hardware(memory_gb=given.gpu_memory)
    for name, shape in RELEASED_SHAPES.items():
        print(f"\n### {name}\n")
        print(f"| {' | '.join(HEADINGS)} |")
        print("|" + "---|" * len(HEADINGS))
        for num_gpus in NUM_GPUS:
            work = Workload(shape, LATENT_SHAPE, TEXT_LENGTH, SAMPLES_PER_GPU * num_gpus)
            times = measured(given.measured, work) if given.measured else modelled(work, hardware)
            try:
                print(_row(make_plan(work, times, hardware, num_gpus)))
            except ConfigError as refused:
                short = refused.remedy.replace("It would fit with ", "")
                cells = f"| {num_gpus} | {work.batch_size} | does not fit; fits with {short} |"
                print(cells + " |" * (len(HEADINGS) - 3))


def _row(plan: Plan) -> str:
    found = {layout.name: layout for layout in plan.layouts}
    cells = [str(plan.num_gpus), str(plan.work.batch_size)]
    mapped = found.get("map")
    if mapped is None:
        cells += ["does not fit", "", "", "", ""]
    else:
        pools, settings = mapped.pools, mapped.settings
        teacher = settings["topology.roles.teacher"]
        cells += [
            " : ".join(str(pool.gpus) for pool in pools.values())
            + ("" if len(teacher) == len(pools) else f", teacher on {teacher[0]}"),
            f"{settings['batch.micro_batches']}, {settings['topology.depth']}",
            f"{mapped.iteration_s:.0f}",
            " : ".join(f"{100 * pool.busy:.0f}" for pool in pools.values()),
            " : ".join(f"{pool.memory.total / GB:.0f}" for pool in pools.values()),
        ]
    for name in ("pools", "fused"):
        layout = found.get(name)
        cells += _time_and_memory(layout) if layout else ["does not fit", ""]
    return f"| {' | '.join(cells)} |"


def _time_and_memory(layout: Layout) -> list[str]:
    most = max(pool.memory.total for pool in layout.pools.values()) / GB
    return [f"{layout.iteration_s:.0f}", f"{most:.0f}" + ("" if layout.fits else ", does not fit")]


if __name__ == "__main__":
    main()
