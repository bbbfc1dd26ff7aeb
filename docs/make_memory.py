"""Write the tables of docs/memory.md: what fits which GPUs, with which settings, how fast.

    python docs/make_memory.py            writes them between the markers of the page
    python docs/make_memory.py --check    says whether they are those of the planner

Nothing is run: every row asks the planner, as `sgmd plan --fit` does, with the recipe of each
model, its clips among them, all weights or adapters trained as in wan21-1.3b-lora, and four samples
a GPU of the roles.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.planning.beside import VALIDATOR, bytes_beside
from pipelines.planning.fitting import fastest_fit
from pipelines.planning.hardware import GB, Hardware
from pipelines.planning.networks import released_models
from pipelines.planning.plan import best_layouts
from pipelines.planning.stage_times import modelled
from pipelines.planning.workload import Workload

PAGE = Path(__file__).parent / "memory.md"
BEGIN, END = "<!-- tables of docs/make_memory.py -->", "<!-- end of tables -->"
RECIPES = {"1.3b": "wan21-1.3b", "5b": "wan22-5b", "14b": "wan21-14b", "a14b": "wan22-a14b"}
"""By model."""
ADAPTERS = tuple(
    f"{role}.{setting}"
    for role in ("generator", "fake_score")
    for setting in ("lora.rank=64", "lora.alpha=64", "compute.weights=bf16")
)
TRAINED = {"all weights": (), "adapters": ADAPTERS}
NUM_GPUS, MEMORY_GB = (1, 2, 4, 8, 32), (24, 48, 80)
SAMPLES_PER_GPU = 4
HEADINGS = (
    "GPUs of the roles",
    "GB",
    "layout",
    "s an iteration",
    "GB a GPU",
    "GB of main memory",
    "settings",
    "validator, on one more GPU",
)


def main() -> int:
    """Write the page's tables, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only compare")
    given = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"
    if given.check:
        if made != text:
            sys.stderr.write("Out of date, run python docs/make_memory.py: docs/memory.md\n")
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


def tables() -> str:
    """Return one table a model, and for what is trained of it."""
    parts: list[str] = []
    for (model, recipe), (trained, options) in product(RECIPES.items(), TRAINED.items()):
        video = load_recipe(recipe).video
        size = f"{video.num_frames} frames of {video.height}x{video.width}"
        rows = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
        rows += [row(model, options, gpus, gb) for gpus in NUM_GPUS for gb in MEMORY_GB]
        heading = f"### {model}, {trained}\n\nRecipe `{recipe}`, {size}.\n\n"
        parts.append(heading + "\n".join(rows) + "\n")
    return "\n".join(parts)


def row(model: str, options: Sequence[str], num_gpus: int, memory_gb: int) -> str:
    """Return one row: the fastest layout and settings of those that fit."""
    batch = SAMPLES_PER_GPU * num_gpus
    # Pools of the recipes want more samples than few GPUs get; the planner has pools of its own.
    sized = ["topology.mode=fused", f"batch.size={batch}", f"batch.micro_batches={batch}"]
    config = load_recipe(RECIPES[model], [*options, *sized])
    work, hardware = Workload.of(config, model), Hardware(memory_gb=memory_gb)
    found = fastest_fit(work, partial(modelled, hardware=hardware), hardware, num_gpus)
    if found is None:
        return f"| {num_gpus} | {memory_gb} | does not fit |" + " |" * (len(HEADINGS) - 3)
    best = best_layouts(found.work, modelled(found.work, hardware), hardware, num_gpus)[0]
    pools = best.pools.values()
    cells = [
        str(num_gpus),
        str(memory_gb),
        best.name,
        f"{best.iteration_s:.0f}",
        f"{max(pool.memory.total for pool in pools) / GB:.0f}",
        f"{max(pool.memory.main_memory for pool in pools) / GB:.0f}",
        " ".join(f"`{one}`" for one in found.settings) or "those of the recipe",
        _validator(config, work, model, hardware),
    ]
    return f"| {' | '.join(cells)} |"


def _validator(config: DistillConfig, work: Workload, model: str, hardware: Hardware) -> str:
    """GB of a validator on a GPU of the same kind, or the setting that does without one."""
    encoders = released_models()[model].encoders
    assert encoders is not None, "the sizes of Wan's encoders are known"
    needed = bytes_beside(config, work, encoders, work.shape.num_parameters)[VALIDATOR]
    fits = needed <= hardware.usable_bytes
    return f"{needed / GB:.0f} GB" + ("" if fits else " do not fit: `validation.every=0`")


if __name__ == "__main__":
    sys.exit(main())
