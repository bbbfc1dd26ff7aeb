"""The tables of docs/planning.md, as the planner and the simulator make them today.

    python benchmarks/planning.py                          prints them as Markdown
    python benchmarks/planning.py --output plans.json      and writes their figures
    python benchmarks/planning.py --write-docs             puts them in their places on the page
    python benchmarks/planning.py --only kinds             one of work, layouts, kinds, walks, sizes
    python benchmarks/planning.py --only sizes --measured gpu.json

Nothing is run: the planner is asked. `--measured` takes stage times from benchmarks/gpu_check.py or
from a run, in place of modelled ones, for the layouts on 8 to 1,024 GPUs.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from documents import write_document
from joint_walk import iterations, plans

from pipelines.config.recipe import load_recipe
from pipelines.planning.hardware import GB, Hardware, parse_kinds
from pipelines.planning.plan import best_layouts, make_mixed_plan, make_plan
from pipelines.planning.planned_layout import Layout
from pipelines.planning.stage_times import measured, modelled
from pipelines.planning.stage_work import units_by_stage
from pipelines.planning.workload import Workload
from sgmd_core.errors import ConfigError
from workers.models.wan_arithmetic import RELEASED_SHAPES

PAGE = Path(__file__).parents[1] / "docs" / "planning.md"
LATENT_SHAPE = (16, 21, 60, 104)
TEXT_LENGTH = 512
SAMPLES_PER_GPU = 4
NUM_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
ASKED = (
    *((8, 16, 40.0), (8, 32, 40.0), (8, 64, 40.0), (64, 16, 40.0), (64, 64, 40.0)),
    *((64, 256, 40.0), (64, 256, 1.0)),
)
"""GPUs, samples and GB/s between machines for which all three layouts are compared."""
FASTEST = "H100=8x80@229"
BESIDE = (
    ("L4=16x24@30",),
    ("L40S=8x48@80",),
    ("A100=8x80@160",),
    ("A100=8x80@160", "L40S=8x48@80"),
)
"""Kinds of GPU beside the fastest."""

_SIZED = (
    *("GPUs", "batch", "learn : score", "m, depth", "map: s", "busy, %", "GB of map"),
    *("pools: s", "GB of pools", "fused: s", "GB of fused"),
)
"""Headings of the layouts on 8 to 1,024 GPUs."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class PageTable:
    """A table of the page.

    Attributes:
        name: Its place on the page.
        rows: Its cells by heading.
        figures: What is written as JSON.
    """

    name: str
    rows: Rows
    figures: Any

    def markdown(self) -> str:
        """The table as the page has it."""
        headings = list(self.rows[0])
        lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
        lines += ["| " + " | ".join(str(cell) for cell in row.values()) + " |" for row in self.rows]
        return "\n".join(lines)

    def placed_in(self, page: str) -> str:
        """The page with this table between the marks of its name."""
        begin, end = f"<!-- table: {self.name} -->", "<!-- end of table -->"
        before, found, rest = page.partition(begin)
        assert found, f"the page has no place for {self.name}"
        own, found, after = rest.partition(end)
        is_whole = bool(found) and "<!-- table: " not in own
        assert is_whole, f"the table {self.name} has no end on the page"
        return f"{before}{begin}\n\n{self.markdown()}\n\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables, or writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--measured", type=Path, help="JSON of benchmarks/gpu_check.py, or a run")
    parser.add_argument(
        "--gpu-memory", type=float, default=Hardware().memory_gb, help="GB, of `sizes`"
    )
    parser.add_argument("--output", type=Path, help="JSON to write")
    parser.add_argument("--write-docs", action="store_true", help="put them into the page")
    given = parser.parse_args(arguments)
    if given.write_docs and (given.measured or given.gpu_memory != Hardware().memory_gb):
        parser.error("--write-docs goes without --measured and --gpu-memory: the page has neither")
    made = {
        "sizes": partial(sizes, given.measured, Hardware(memory_gb=given.gpu_memory)),
        **{name: part for name, part in PARTS.items() if name != "sizes"},
    }
    tables = [table for name in given.only for table in made[name]()]
    for table in tables:
        print(f"\n{table.name}\n\n{table.markdown()}")
    if given.output:
        write_document("planning", {table.name: table.figures for table in tables}, given.output)
    if given.write_docs:
        page = PAGE.read_text(encoding="utf-8")
        for table in tables:
            page = table.placed_in(page)
        PAGE.write_text(page, encoding="utf-8")


def work() -> list[PageTable]:
    """Parameters, tokens and operations of a pass."""
    rows: Rows = []
    for name in ("1.3b", "14b"):
        shape = RELEASED_SHAPES[name]
        flops = shape.forward_flops(LATENT_SHAPE, TEXT_LENGTH)
        rows.append(
            {
                "": name.upper(),
                "parameters": f"{shape.num_parameters / 1e9:.2f}e9",
                "tokens at 480x832, 81 frames": f"{shape.num_tokens(LATENT_SHAPE):,}",
                "operations of a pass": f"{flops / 1e12:,.0f}e12",
            }
        )
    return [PageTable("work", rows, rows)]


def layouts() -> list[PageTable]:
    """Seconds of the three layouts of 1.3B, and where they come from."""
    rows: Rows = []
    for num_gpus, batch, between in ASKED:
        sized = [f"batch.size={batch}", f"batch.micro_batches={min(4, batch)}"]
        one = Workload.of(load_recipe("wan21-1.3b", sized), "1.3b")
        hardware = Hardware(gather_bandwidth_between=1e9 * between)
        found = {
            layout.name: layout
            for layout in best_layouts(one, modelled(one, hardware), hardware, num_gpus)
        }
        mapped, fused, classic = (found[name] for name in ("map", "fused", "pools"))
        rows.append(
            {
                "GPUs": num_gpus,
                "batch": batch,
                "GB/s between machines": f"{between:g}",
                "map: s": f"{mapped.iteration_s:.1f}",
                "m, depth": _in_flight(mapped),
                "fused: s": f"{fused.iteration_s:.1f}",
                "m": fused.settings["batch.micro_batches"],
                "pools: s": f"{classic.iteration_s:.1f}",
                "map over fused": f"{mapped.iteration_s / fused.iteration_s:.2f}",
                "pools over fused": f"{classic.iteration_s / fused.iteration_s:.2f}",
            }
        )
    return [PageTable("layouts", rows, rows)]


def kinds() -> list[PageTable]:
    """The best layout over several kinds of GPU, beside the fastest kind alone."""
    one = Workload.of(load_recipe("wan21-1.3b", ["batch.size=32", "validation.every=0"]), "1.3b")
    (fastest,) = parse_kinds([FASTEST], Hardware())
    times = modelled(one, fastest.hardware)
    alone = make_plan(one, times, fastest.hardware, fastest.num_gpus)
    (fused_s,) = (layout.iteration_s for layout in alone.layouts if layout.name == "fused")
    rows: Rows = []
    for beside in BESIDE:
        several = parse_kinds([FASTEST, *beside], Hardware())
        best = make_mixed_plan(one, times, several).best
        flops = sum(kind.num_gpus * kind.hardware.flops for kind in several)
        limit_s = one.batch_size * sum(units_by_stage(one).values()) * one.forward_flops / flops
        rows.append(
            {
                "beside 8 H100 (229 TFLOP/s)": " and ".join(
                    f"{kind.num_gpus} {kind.name} of {kind.hardware.memory_gb:g} GB, "
                    f"{kind.hardware.flops / 1e12:g} TFLOP/s"
                    for kind in several[1:]
                ),
                "best layout": _in_words(best),
                "s": f"{best.iteration_s:.1f}",
                "over 8 H100 alone, fused": f"{best.iteration_s / fused_s:.2f}",
                "the same if no GPU waited": f"{limit_s / fused_s:.2f}",
            }
        )
    return [PageTable("kinds", rows, rows)]


def walks() -> list[PageTable]:
    """One backward pass for two gradients against two: simulated passes, planned seconds."""
    passes, shallow, planned = iterations((1, 2, 3, 4)), iterations((1,)), plans()
    headings = {name: f"{name}: apart, joint" for name in ("fused", "map", "pools")}

    def row(first: str, key: object, cells: Mapping[str, Mapping[Any, list[float]]]) -> dict:
        of_layouts = {
            heading: ", ".join(f"{value:.1f}" for value in cells[name][key])
            for name, heading in headings.items()
        }
        return {first: key, **of_layouts}

    counted = [row("m", m, passes) for m in passes["fused"]]
    counted.append({**row("m", 16, shallow), "m": "16, depth 1"})
    of_plans = {name: {asked: planned[asked][name] for asked in planned} for name in headings}
    seconds = [row("recipe", asked, of_plans) for asked in planned]
    return [
        PageTable("passes of walks", counted, {"passes": passes, "at depth 1": shallow}),
        PageTable("seconds of walks", seconds, planned),
    ]


def sizes(times_from: Path | None = None, hardware: Hardware | None = None) -> list[PageTable]:
    """Layouts on 8 to 1,024 GPUs, four samples a GPU."""
    hardware = hardware or Hardware()
    return [
        PageTable(f"layouts of {name}", rows, rows)
        for name in ("1.3b", "14b")
        if (rows := [_sized(name, num_gpus, times_from, hardware) for num_gpus in NUM_GPUS])
    ]


def _sized(name: str, num_gpus: int, times_from: Path | None, hardware: Hardware) -> dict[str, Any]:
    one = Workload(RELEASED_SHAPES[name], LATENT_SHAPE, TEXT_LENGTH, SAMPLES_PER_GPU * num_gpus)
    times = measured(times_from, one) if times_from else modelled(one, hardware)
    row: dict[str, Any] = dict.fromkeys(_SIZED, "")
    row |= {"GPUs": num_gpus, "batch": one.batch_size}
    try:
        plan = make_plan(one, times, hardware, num_gpus)
    except ConfigError as refused:
        short = refused.remedy.replace("It would fit with ", "")
        return {**row, "learn : score": f"does not fit; fits with {short}"}
    found = {layout.name: layout for layout in plan.layouts}
    row |= _of_map(found.get("map"))
    row["pools: s"], row["GB of pools"] = _time_and_memory(found.get("pools"))
    row["fused: s"], row["GB of fused"] = _time_and_memory(found.get("fused"))
    return row


def _of_map(mapped: Layout | None) -> dict[str, str]:
    if mapped is None:
        return {"learn : score": "does not fit"}
    pools, teacher = mapped.pools.values(), mapped.settings["topology.roles.teacher"]
    where = "" if len(teacher) == len(pools) else f", teacher on {teacher[0]}"
    return {
        "learn : score": " : ".join(str(pool.gpus) for pool in pools) + where,
        "m, depth": _in_flight(mapped),
        "map: s": f"{mapped.iteration_s:.0f}",
        "busy, %": " : ".join(f"{100 * pool.busy:.0f}" for pool in pools),
        "GB of map": " : ".join(f"{pool.memory.total / GB:.0f}" for pool in pools),
    }


def _in_flight(layout: Layout) -> str:
    return f"{layout.settings['batch.micro_batches']}, {layout.settings['topology.depth']}"


def _time_and_memory(layout: Layout | None) -> tuple[str, str]:
    if layout is None:
        return "does not fit", ""
    most = max(pool.memory.total for pool in layout.pools.values()) / GB
    return f"{layout.iteration_s:.0f}", f"{most:.0f}" + ("" if layout.fits else ", does not fit")


def _in_words(layout: Layout) -> str:
    """Roles and GPUs of each pool."""
    return "; ".join(
        f"{', '.join(role.replace('_', ' ') for role in pool.roles)} on {pool.gpus} {pool.kind}"
        for pool in layout.pools.values()
    )


PARTS: dict[str, Callable[..., list[PageTable]]] = {
    "work": work,
    "layouts": layouts,
    "kinds": kinds,
    "walks": walks,
    "sizes": sizes,
}


if __name__ == "__main__":
    main()
