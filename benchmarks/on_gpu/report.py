"""Results of the steps: one JSON for `sgmd plan`, one table, one section of the docs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from on_gpu.step import read, write

BEGIN, END = "<!-- gpu-check: begin -->", "<!-- gpu-check: end -->"
ALL = "gpu"
MFU_GOAL = 0.4
"""Share of the data sheet's rate that the stages of an iteration are to reach together."""


def write_all(folder: Path) -> None:
    """Writes `gpu.json`: every step, and the timed runs as `sgmd plan --measured` reads them."""
    documents = _documents(folder)
    timed = [documents.get(name, {}).get("results", {}) for name in ("stages", "compiled")]
    found = {
        "benchmark": "gpu_check",
        "runs": [run for one in timed for run in one.get("runs", [])],
        "machine": next((one["machine"] for one in timed if "machine" in one), {}),
        "steps": documents,
    }
    write(folder, ALL, found)


def table(folder: Path) -> str:
    """One line a step, and the figures that matter most."""
    lines = ["", f"{'step':<12} {'status':<8} {'s':>6}  found"]
    for name, document in _documents(folder).items():
        words = _words(name, document)
        spent = document.get("seconds", 0.0)
        lines.append(f"{name:<12} {document.get('status', '?'):<8} {spent:>6.1f}  {words}")
    return "\n".join(lines)


def write_docs(folder: Path, page: Path) -> None:
    """Replaces the section of the docs between its two marks.

    Raises:
        SystemExit: The folder has no step's JSON, or the page has no marks.
    """
    documents = _documents(folder)
    text = page.read_text(encoding="utf-8")
    if not documents:
        raise SystemExit(f"no step's JSON in {folder}: run make gpu-check first")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{page} has no place for it: {BEGIN} ... {END}")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    section = "\n".join(_section(documents))
    page.write_text(f"{before}{BEGIN}\n\n{section}\n\n{END}{after}", encoding="utf-8")


def _words(name: str, document: dict[str, Any]) -> str:
    """Returns why a step did not end well, and its results so far."""
    try:
        text = "; ".join(_SHORT[name](document.get("results", {})))
    except (KeyError, TypeError, ValueError) as error:
        text = f"figures that cannot be read ({type(error).__name__}: {error})"
    return ". ".join(filter(None, (document.get("why", ""), text)))


def _documents(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON of each step that has one."""
    found = {name: read(folder, name) for name in _SHORT}
    return {name: document for name, document in found.items() if document}


def _section(documents: dict[str, dict[str, Any]]) -> Iterator[str]:
    environment = documents.get("environment", {}).get("results", {})
    card = environment.get("card", {}).get("name", "an unknown card")
    yield (
        f"{card}, driver {environment.get('driver')}, torch {environment.get('torch')}, Python "
        f"{environment.get('python')}, {environment.get('started', '')} UTC (`make gpu-check`)."
    )
    yield ""
    yield "| step | status | seconds | found |"
    yield "|---|---|---|---|"
    for name, document in documents.items():
        words = " ".join(_words(name, document).replace("|", "/").split())
        yield f"| {name} | {document['status']} | {document.get('seconds', 0):.1f} | {words} |"
    for name in ("stages", "compiled"):
        for run in documents.get(name, {}).get("results", {}).get("runs", []):
            yield ""
            yield from _stage_rows(name, run)
    settings = documents.get("settings", {}).get("results", {})
    if settings.get("settings"):
        yield ""
        yield from _setting_rows(settings)
    truths = documents.get("truths", {}).get("results", {}).get("truths", {})
    if truths:
        yield ""
        yield from _truth_rows(truths)


def _stage_rows(name: str, run: dict[str, Any]) -> Iterator[str]:
    compiled = "compiled" if name == "compiled" else "not compiled"
    yield (
        f"Stages at {run['num_frames']} frames, latents {run['latent_shape']}, {compiled}, "
        f"settings {json.dumps(run['settings'])}:"
    )
    yield ""
    yield (
        f"| stage | s a sample | peak GB | TFLOP/s | of the data sheet (goal {MFU_GOAL:.0%}) | of "
        "the measured rate |"
    )
    yield "|---|---|---|---|---|---|"
    for stage, row in run["stages"].items():
        yield (
            f"| {stage} | {row['seconds_per_sample']:.4g} | {row['peak_gb']:.1f} | "
            f"{_number(row.get('tflops'), '.0f')} | {_number(row.get('mfu'), '.1%')} | "
            f"{_number(row.get('of_measured_rate'), '.1%')} |"
        )


def _truth_rows(truths: dict[str, Any]) -> Iterator[str]:
    yield "| truth | holds | largest error | bound |"
    yield "|---|---|---|---|"
    for name, found in truths.items():
        worst = max(found.get("errors", {"": None}).values(), key=lambda value: value or 0.0)
        failed = " ".join(found.get("failed", "").split()).replace("|", "/")[:200]
        figure = failed or _number(worst, ".2g")
        holds = "yes" if found["holds"] else "no"
        yield f"| {name} | {holds} | {figure} | {found.get('bound', '')} |"


def _environment(found: dict[str, Any]) -> Iterator[str]:
    if "card" in found:
        yield str(found["card"]["name"])
    if "copy_gb_s" in found:
        yield f"copies {found['copy_gb_s']:.0f} GB/s"
    if "product_tflops" in found:
        yield f"bf16 products {found['product_tflops']:.4g} TFLOP/s"


def _truths(found: dict[str, Any]) -> Iterator[str]:
    truths = found.get("truths", {})
    failing = [name for name, one in truths.items() if not one["holds"]]
    if truths:
        yield f"{len(truths) - len(failing)} of {len(truths)} hold"
    if failing:
        yield f"not: {', '.join(failing)}"
    tests = found.get("tests") or {}
    if tests:
        yield f"tests: {tests.get('summary') or tests.get('not_run')}"


def overall_mfu(stages: dict[str, Any]) -> float | None:
    """Share of the data sheet's rate over all stages, the updates' seconds included."""
    rows = stages.values()
    if not any(row.get("mfu") for row in rows):
        return None
    used_s = sum((row.get("mfu") or 0.0) * row["seconds_per_sample"] for row in rows)
    return used_s / sum(row["seconds_per_sample"] for row in rows)


def _against_goal(stages: dict[str, Any]) -> str:
    found = overall_mfu(stages)
    text = "not known: no rate of the card" if found is None else f"{found:.0%}"
    verdict = "" if found is None else f", {'met' if found >= MFU_GOAL else 'not met'}"
    return f"MFU of all stages {text} (goal {MFU_GOAL:.0%}{verdict})"


def _stages(found: dict[str, Any]) -> Iterator[str]:
    for run in found.get("runs", []):
        yield f"{run['num_frames']} frames"
        for stage, row in run["stages"].items():
            rate = "" if row.get("mfu") is None else f" ({row['mfu']:.0%} MFU)"
            yield f"{stage} {row['seconds_per_sample']:.3g} s{rate}"
        yield _against_goal(run["stages"])


def _attention(found: dict[str, Any]) -> Iterator[str]:
    for name, row in found.get("backends", {}).items():
        rate = row.get("forward_tflops")
        yield f"{name} {row['failed'][:80]}" if rate is None else f"{name} {rate:.3g} TFLOP/s"


def _iteration(found: dict[str, Any]) -> Iterator[str]:
    if found.get("iterations"):
        last = found["iterations"][-1]
        yield f"{found['num_frames']} frames, {found['samples']} samples: {last['seconds']:.3g} s"
        yield f"{last['peak_gb']:.1f} GB at the peak"
    for name, ratio in found.get("against_plan", {}).items():
        if ratio is not None:
            yield f"{name} {ratio:.2f} of planned"


def _settings(found: dict[str, Any]) -> Iterator[str]:
    for name, row in found.get("settings", {}).items():
        text = row.get("failed") or row.get("skipped")
        if text is not None:
            kind = "failed" if "failed" in row else "skipped"
            yield f"{name} {kind} ({text[:80]})"
            continue
        ratio = row.get("over_plan")
        beside = "" if ratio is None else f", {row['peak_gb']:.1f} GB, {ratio:.2f} of planned"
        yield f"{name} {row['seconds']:.3g} s{beside}"
    if found.get("left_out"):
        yield f"no time was left for: {', '.join(found['left_out'])}"


def _setting_rows(found: dict[str, Any]) -> Iterator[str]:
    """A table of the settings that were measured."""
    yield f"Settings at {found['num_frames']} frames, one sample, all roles on the card:"
    yield ""
    yield "| setting | s an iteration | peak GB | planned GB | of planned | within a tenth |"
    yield "|---|---|---|---|---|---|"
    for name, row in found["settings"].items():
        text = row.get("failed") or row.get("skipped")
        if text is not None:
            yield f"| {name} | {' '.join(text.split()).replace('|', '/')[:120]} | | | | |"
            continue
        holds = {True: "yes", False: "no", None: ""}[row["holds"]]
        yield (
            f"| {name} | {row['seconds']:.3g} | {row['peak_gb']:.1f} | {row['planned_gb']:.1f} | "
            f"{_number(row['over_plan'], '.2f')} | {holds} |"
        )


def _distill(found: dict[str, Any]) -> Iterator[str]:
    if "seconds_per_iteration" in found:
        yield f"{found['seconds_per_iteration']:.3g} s an iteration"
    for name in ("against_cpu", "against_local"):
        if name in found:
            first, whole = found[name]["first_iteration"], found[name]["all_iterations"]
            yield f"losses {name.replace('_', ' ')}: {first:.2g} at first, {whole:.2g} at most"
    share = found.get("host", {}).get("host_share")
    if share is not None:
        yield f"the card waits {share:.0%} of an iteration"


def _ranks(found: dict[str, Any]) -> Iterator[str]:
    if "note" in found:
        yield f"{found['note']}, {found['backend']}"
    if "errors" in found:
        yield f"largest error {max(found['errors'].values()):.2g}"


_SHORT = {
    "environment": _environment,
    "truths": _truths,
    "stages": _stages,
    "iteration": _iteration,
    "settings": _settings,
    "distill": _distill,
    "compiled": _stages,
    "attention": _attention,
    "ranks": _ranks,
    "pools": _distill,
}
"""Words of each step, in the order of the table."""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
