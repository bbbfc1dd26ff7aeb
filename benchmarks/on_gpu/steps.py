"""The steps in order of worth; each is a process, so that none leaves memory to the next.

What a step needs is imported when it runs: the first one works on torch alone.
"""

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from on_gpu.step import Context, Step

ROOT = Path(__file__).resolve().parents[2]
_GPU_TESTS = "tests/workers/test_on_gpu.py"
_TESTS_BUDGET_S = 40
_SETTINGS_BUDGET_S = 90.0
"""For the tries of a step, whose process takes some seconds besides."""


def _environment(context: Context) -> None:
    from on_gpu import environment

    environment.run(context)


def _truths(context: Context) -> None:
    from on_gpu import truths
    from on_gpu.tiny_roles import exact_float32

    exact_float32()
    context.record(truths={}, tests=None)
    for name, truth in truths.TRUTHS.items():
        if name == truths.LAST:
            context.record(tests=_pytest())
        found = truth.hold(context.device)
        context.record(truths=context.results["truths"] | {name: found})
        print(f"{name}: {found}", file=sys.stderr, flush=True)


def _pytest() -> dict[str, Any]:
    """The tests that need a GPU; without the suite's own settings, which are for its versions."""
    if find_spec("pytest") is None:
        return {"not_run": "pytest is not installed: its wheel is in the group tests"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "filterwarnings=default"]
    command += ["-o", "addopts=--import-mode=importlib", "--noconftest", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, _GPU_TESTS],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=_TESTS_BUDGET_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"not_run": f"stopped after {_TESTS_BUDGET_S} s"}
    lines = done.stdout.strip().splitlines() or [done.stderr[-500:]]
    # 5: there was nothing to run, as on a CPU, where they are skipped one by one.
    return {"passed": done.returncode in (0, 5), "summary": lines[-1], "output": lines[-30:]}


def _measure_stages(context: Context, *, compiled: bool) -> None:
    from on_gpu.cases import FRAMES, Case
    from on_gpu.role_stages import data_sheet_tflops, longest_that_fits, measure

    ceilings = {
        "data_sheet": data_sheet_tflops(context.device),
        "measured": context.of("environment").get("product_tflops"),
    }
    case = Case(context.model, 0, context.device)
    case = replace(case, compute=replace(case.compute, compile=compiled))
    card = context.of("environment").get("card", {}).get("name", context.device)
    context.record(machine={"device": card, "ceilings_tflops": ceilings})

    def run(one: Case) -> dict[str, Any]:
        return measure(
            one, 1, ceilings, lambda stages: context.record(part={one.num_frames: stages})
        )

    # A compiled step takes the length at which the plain one ran.
    known = context.of("stages").get("runs", [{}])[0].get("num_frames")
    frames = (known,) if compiled and known else FRAMES[context.model]
    context.record(runs=[longest_that_fits(case, frames, run)])


def _stages(context: Context) -> None:
    _measure_stages(context, compiled=False)


def _compiled(context: Context) -> None:
    _measure_stages(context, compiled=True)


def _attention(context: Context) -> None:
    from on_gpu import attention
    from on_gpu.cases import FRAMES, Case

    known = context.of("stages").get("runs", [{}])[0].get("num_frames")
    attention.measure(
        context, Case(context.model, known or FRAMES[context.model][0], context.device)
    )


def _iteration(context: Context) -> None:
    from on_gpu.cases import FRAMES, Case
    from on_gpu.role_stages import longest_that_fits
    from on_gpu.whole_iteration import measure

    found = longest_that_fits(
        Case(context.model, 0, context.device),
        FRAMES[context.model],
        lambda case: measure(context, case),
    )
    context.record(did_not_fit=found["did_not_fit"])


def _memory_settings(context: Context) -> None:
    from on_gpu import memory_settings
    from on_gpu.cases import FRAMES, Case

    # The shortest clip: what differs between settings does so at every length.
    case = Case(context.model, FRAMES[context.model][-1], context.device)
    factor = 4 if context.small else 1
    memory_settings.measure(context, case, factor * _SETTINGS_BUDGET_S)


def _distill(context: Context) -> None:
    from on_gpu import tiny_run

    tiny_run.run_local(context)


def _pools(context: Context) -> None:
    from on_gpu import tiny_run

    tiny_run.run_pools(context)


def _ranks(context: Context) -> None:
    from on_gpu import ranks

    ranks.run(context)


STEPS = (
    Step("environment", "card, versions, ceilings", 30, (), _environment),
    Step("truths", "roles against the CPU, tests that need a GPU", 90, ("roles",), _truths),
    Step("stages", "stages of the roles at Wan 1.3B", 90, ("roles",), _stages),
    Step(
        "iteration",
        "a whole iteration at Wan 1.3B, all roles on the card",
        90,
        ("roles", "runs"),
        _iteration,
    ),
    Step(
        "settings",
        "settings of memory and speed against their plan",
        _SETTINGS_BUDGET_S + 15,
        ("roles", "runs"),
        _memory_settings,
    ),
    Step("distill", "sgmd distill tiny, end to end", 90, ("roles", "runs"), _distill),
    Step("compiled", "the stages with torch.compile", 100, ("roles",), _compiled),
    Step("attention", "kernels of attention", 25, ("roles",), _attention),
    Step("ranks", "sharded roles over NCCL", 45, ("roles",), _ranks),
    Step("pools", "sgmd distill tiny on Ray", 90, ("roles", "runs", "ray"), _pools),
)
"""Together more than eight minutes: the check stops when its own time is spent."""
