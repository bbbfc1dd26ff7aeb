"""Write the tables of docs/memory.md: what fits which GPUs, with which settings, how fast.

    python docs/make_memory.py            writes them between the markers of the page
    python docs/make_memory.py --check    says whether they are those of the planner

Nothing is run: every row asks the planner, as `sgmd plan --fit` does, with 81 frames of 480x832,
the recipes of 1.3B, that of all weights and that of adapters, and a sample a GPU in each
micro-batch.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

from pipelines.config.recipe import load_recipe
from pipelines.planning.hardware import GB, Hardware
from pipelines.planning.plan import make_plan
from pipelines.planning.savings import fitting_savings
from pipelines.planning.stage_times import modelled
from pipelines.planning.workload import Workload

PAGE = Path(__file__).parent / "memory.md"
BEGIN, END = "<!-- tables of docs/make_memory.py -->", "<!-- end of tables -->"
RECIPES = {"all weights": "wan21-1.3b", "adapters": "wan21-1.3b-lora"}
MODELS = ("1.3b", "5b", "14b", "a14b")
NUM_GPUS, MEMORY_GB = (1, 2, 4, 8, 32), (24, 48, 80)
SAMPLES_PER_GPU = 4
HEADINGS = ("GPUs", "GB", "layout", "s an iteration", "GB a GPU", "GB of main memory", "settings")


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
    for model, (trained, recipe) in product(MODELS, RECIPES.items()):
        rows = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
        rows += [row(recipe, model, gpus, gb) for gpus in NUM_GPUS for gb in MEMORY_GB]
        parts.append(f"### {model}, {trained}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def row(recipe: str, model: str, num_gpus: int, memory_gb: int) -> str:
    """Return one row: the fastest layout with the cheapest settings that fit."""
    batch = SAMPLES_PER_GPU * num_gpus
    options = [f"batch.size={batch}", f"batch.micro_batches={batch}"]
    work = Workload.of(load_recipe(recipe, options), model)
    hardware = Hardware(memory_gb=memory_gb)
    found = fitting_savings(work, hardware, num_gpus)
    if found is None:
        return f"| {num_gpus} | {memory_gb} | does not fit |" + " |" * (len(HEADINGS) - 3)
    saved, settings = found
    best = make_plan(saved, modelled(saved, hardware), hardware, num_gpus).best
    pools = best.pools.values()
    cells = [
        str(num_gpus),
        str(memory_gb),
        best.name,
        f"{best.iteration_s:.0f}",
        f"{max(pool.memory.total for pool in pools) / GB:.0f}",
        f"{max(pool.memory.main_memory for pool in pools) / GB:.0f}",
        " ".join(f"`{one}`" for one in settings) or "those of the recipe",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
