"""Predicted against measured iteration time, over pool sizes, stage times, micro-batches, depth."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import MachineCosts, Setting, measure_machine, rehearse_setting, sleepers

from cluster.schedule.simulate import simulate
from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER
from pipelines.media.charts import Series, line_chart

SETTINGS = (
    Setting("one at a time", (1, 1, 1), (120, 80, 60, 50, 90), 4, 1),
    Setting("depth 2", (1, 1, 1), (120, 80, 60, 50, 90), 4, 2),
    Setting("depth 4", (1, 1, 1), (120, 80, 60, 50, 90), 8, 4),
    Setting("one micro-batch", (1, 1, 1), (200, 150, 120, 100, 160), 1, 1),
    Setting("slow teacher", (1, 1, 1), (80, 220, 60, 50, 70), 6, 3),
    Setting("slow teacher, 3 copies", (1, 3, 1), (80, 220, 60, 50, 70), 6, 3),
    Setting("slow fake score", (1, 2, 1), (80, 100, 150, 120, 60), 6, 2),
    Setting("slow fake score, 2 ranks", (1, 2, 2), (80, 100, 150, 120, 60), 6, 2, samples=2),
    Setting("2 : 3 : 1", (2, 3, 1), (150, 120, 50, 40, 110), 6, 3, samples=2),
    Setting("3 : 2 : 3", (3, 2, 3), (110, 60, 60, 50, 90), 4, 2, samples=3),
    Setting("fresh tracking", (1, 1, 1), (110, 90, 60, 70, 80), 4, 2, fresh_updates=1),
    Setting("3 fresh updates", (1, 1, 2), (90, 70, 60, 70, 70), 4, 2, fresh_updates=3, samples=2),
    Setting("1 MB per sample", (1, 2, 1), (120, 160, 60, 50, 90), 8, 3, megabytes=1),
    Setting("8 MB per sample", (1, 2, 1), (160, 200, 90, 70, 120), 8, 3, megabytes=8),
    Setting("staleness 1", (1, 1, 1), (120, 80, 70, 120, 60), 4, 3, staleness=1),
    Setting("16 micro-batches", (1, 2, 1), (70, 110, 40, 30, 50), 16, 3),
)


_HEAD = """# Validation of the simulator

Iteration time as `cluster/schedule/simulate.py` predicts it and as Ray's actors take it, \
whose stages sleep; m is the number of micro-batches. Command, machine and date: \
[Benchmarks](../benchmarks.md#the-simulator-against-ray).

"""


def measure_validation(rounds: int, num_iterations: int) -> dict[str, Any]:
    """Predictions from the machine's costs, measured before, and medians of what happened."""
    sizes = {
        role: max(setting.teams[place] for setting in SETTINGS)
        for place, role in enumerate((GENERATOR, TEACHER, FAKE_SCORE))
    }
    with sleepers(sizes) as groups:
        rehearse_setting(SETTINGS[0], groups, 1)
        machine = measure_machine(groups)
        predicted = [predict_s(setting, machine, num_iterations) for setting in SETTINGS]
        measured: list[list[float]] = [[] for _ in SETTINGS]
        for _ in range(rounds):
            for times, setting in zip(measured, SETTINGS, strict=True):
                times.append(rehearse_setting(setting, groups, num_iterations).iteration_s)
    rows = [
        _row(setting, prediction, statistics.median(times), setting.bound_s(num_iterations))
        for setting, prediction, times in zip(SETTINGS, predicted, measured, strict=True)
    ]
    return {
        "machine": asdict(machine),
        "largest_error": max(abs(row["error"]) for row in rows),
        "configurations": rows,
    }


def predict_s(setting: Setting, machine: MachineCosts, num_iterations: int) -> float:
    """Seconds an iteration by the simulator."""
    calls = setting.calls(num_iterations)
    return simulate(calls, setting.costs(machine), setting.team_of()).iteration_s


def write_docs(validation: Mapping[str, Any], folder: Path) -> None:
    """Writes validation.md and validation.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = validation["configurations"]
    (folder / "validation.md").write_text(_HEAD + _table(rows))
    (folder / "validation.svg").write_text(_plot(rows))


def _row(setting: Setting, predicted_s: float, measured_s: float, bound_s: float) -> dict[str, Any]:
    return {
        "name": setting.name,
        "processes": setting.teams,
        "stage_ms": setting.stage_ms,
        "micro_batches": setting.micro_batches,
        "depth": setting.depth,
        "bound_s": bound_s,
        "predicted_s": predicted_s,
        "measured_s": measured_s,
        "error": predicted_s / measured_s - 1,
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| configuration | generator : teacher : fake score |"
        " rollout, denoise, signal, track, learn (ms) |"
        " m | depth | bound (s) | predicted (s) | measured (s) | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        teams = " : ".join(map(str, row["processes"]))
        stages = ", ".join(f"{ms:g}" for ms in row["stage_ms"])
        times = " | ".join(f"{row[key]:.3f}" for key in ("bound_s", "predicted_s", "measured_s"))
        lines.append(
            f"| {row['name']} | {teams} | {stages} | {row['micro_batches']} | {row['depth']} | "
            f"{times} | {100 * row['error']:+.1f} % |"
        )
    return "\n".join(lines) + "\n"


def _plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """Both times by configuration, the shortest first; a file that stands for itself."""
    ordered = sorted(rows, key=lambda row: row["predicted_s"])
    numbers = [float(number) for number in range(1, len(ordered) + 1)]
    chart = line_chart(
        [
            Series("predicted (s)", numbers, [row["predicted_s"] for row in ordered]),
            Series("measured (s)", numbers, [row["measured_s"] for row in ordered]),
        ]
    )
    style = (
        "<style>text{font:10px sans-serif;fill:#555}.y{text-anchor:end}.x{text-anchor:middle}"
        ".grid{stroke:#ddd}path{fill:none;stroke-width:1.5}"
        "path.c0{stroke:#3b6fb6}.dot.c0{fill:#3b6fb6}path.c1{stroke:#c2571a}.dot.c1{fill:#c2571a}"
        "</style>"
    )
    legend = (
        '<text x="60" y="22" style="fill:#3b6fb6">predicted seconds an iteration</text>'
        '<text x="60" y="36" style="fill:#c2571a">measured</text>'
    )
    head, _, rest = chart.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{legend}{rest}\n'
