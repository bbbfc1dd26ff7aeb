"""Layouts for 8 to 1,024 GPUs at 1.3B and 14B, as the table of docs/planning.md.

    python benchmarks/planning.py                          modelled
    python benchmarks/planning.py --measured gpu.json      from times of benchmarks/gpu_check.py

Nothing is run: it asks the planner, with about four samples a GPU and the batch size nearby that
suits the GPUs best.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.config.roles import FAKE_SCORE, GENERATOR, ROLES, TEACHER
from pipelines.planning.hardware import GB, Hardware
from pipelines.planning.plan import Plan, make_plan
from pipelines.planning.search import find_batch
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
    "generator : teacher : fake score",
    "m, depth",
    "s an iteration",
    "busy, %",
    "GB a rank",
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
            size = find_batch(work, times, hardware, num_gpus)
            sized = replace(work, batch_size=size)
            try:
                print(_row(make_plan(sized, times, hardware, num_gpus)))
            except ConfigError as refused:
                short = refused.remedy.replace("It would fit with ", "")
                print(f"| {num_gpus} | {size} | does not fit; fits with {short} |" + " |" * 6)


def _row(plan: Plan) -> str:
    best, split = plan.best, plan.best.split
    teacher = f"{split.teacher}" + (f"x{split.teacher_ranks}" if split.teacher_ranks > 1 else "")
    fused = plan.fused
    cells = (
        str(plan.num_gpus),
        str(plan.work.batch_size),
        f"{split.generator} : {teacher} : {split.fake_score}",
        f"{split.micro_batches}, {split.depth}",
        f"{best.iteration_s:.0f}",
        " : ".join(f"{100 * best.busy[role]:.0f}" for role in ROLES),
        " : ".join(
            f"{best.memory[role].total / GB:.0f}" for role in (GENERATOR, TEACHER, FAKE_SCORE)
        ),
        f"{fused.iteration_s:.0f}",
        f"{fused.memory.total / GB:.0f}" + ("" if fused.fits else ", does not fit"),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
