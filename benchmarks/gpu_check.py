"""Checks the roles on one GPU and measures them: eight minutes, one command.

    make gpu-check                                    on the machine with the GPU
    python benchmarks/gpu_check.py --missing          what it lacks, and how to fetch that elsewhere
    python benchmarks/gpu_check.py --cpu --folder F   the same steps, small, on a CPU
    python benchmarks/gpu_check.py --write-docs F     fills docs/benchmarks.md from a folder's JSON
    sgmd plan wan21-1.3b --model 1.3b --measured F/gpu.json

It runs from the source tree on any Python that has torch; nothing is installed there but what lies
in a folder of wheels, and that into a folder of its own. Each step is a process with a budget of
seconds and writes its JSON as it goes: a step that fails or is stopped says why and the next one
begins, and a run that is cut off is taken up where it was. `gpu.json` holds them all.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from on_gpu import report, wheels  # noqa: E402
from on_gpu.step import Context, Step, read, write  # noqa: E402
from on_gpu.steps import STEPS  # noqa: E402

TOTAL_S = 480.0
_GRACE_S = 5.0
"""Between asking a step's processes to end and ending them."""
_CPU_FACTOR = 4
"""Budgets are those of a GPU's machine; a CPU that others use, too, gets more."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, runs the steps, prints the table."""
    given = _parse(arguments)
    site = given.folder / "site" if given.site is None else given.site
    if given.write_docs:
        report.write_docs(given.write_docs, ROOT / "docs" / "benchmarks.md")
        return
    if given.missing:
        _show_missing(given, {} if given.have is None else wheels.listed(given.have))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.step:
        _run_step(given)
        return
    device = "cpu" if given.cpu else "cuda"
    lacking = _prepare(given, site)
    _check_device(device)
    _run_all(given, site, lacking)
    print(report.table(given.folder), flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("runs/gpu-check"), help="of the JSON files")
    add("--wheels", type=Path, default=Path("wheels"), help="folder of what may be missing")
    add("--site", type=Path, help="folder that wheels are installed into; default: FOLDER/site")
    add("--total", type=float, help=f"seconds for all steps together; default: {TOTAL_S:g}")
    add("--only", nargs="+", choices=[step.name for step in STEPS], help="these steps alone")
    add("--again", action="store_true", help="run steps that are done, too")
    add("--cpu", action="store_true", help="the same steps at sizes that a CPU runs in a minute")
    add("--model", choices=("1.3b", "14b"), default="1.3b", help="networks of the timed steps")
    add("--missing", action="store_true", help="what this machine lacks, and the command for it")
    add("--have", type=Path, help="with --missing: `pip freeze` of the machine in question")
    add("--python", help="with --missing: its version, such as 3.12; default: this one's")
    add("--write-docs", type=Path, metavar="FOLDER", help="write its figures into the docs")
    add("--step", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _show_missing(given: argparse.Namespace, there: wheels.Packages) -> None:
    python = given.python or f"{sys.version_info.major}.{sys.version_info.minor}"
    if given.have is None:
        there = wheels.installed()
    for groups in (("roles",), ("roles", "runs"), ("roles", "runs", "tests"), tuple(wheels.GROUPS)):
        missing = wheels.find_missing(groups, there, python)
        print(f"# for {', '.join(groups)}: {len(missing)} packages")
        if missing:
            print(wheels.download_command(missing, python, str(given.wheels)))


def _prepare(given: argparse.Namespace, site: Path) -> dict[str, dict[str, str]]:
    """Installs what lies in the folder of wheels; what is missing still, by group."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if site.is_dir():
        sys.path.insert(0, str(site))
    missing = wheels.find_missing(wheels.GROUPS, wheels.installed(), python)
    if missing and given.wheels.is_dir():
        print(f"installing from {given.wheels} into {site}", flush=True)
        try:
            wheels.install(missing, given.wheels, site)
        except RuntimeError as error:
            # The steps that need nothing of it can still run.
            print(error, flush=True)
        if str(site) not in sys.path:
            sys.path.insert(0, str(site))
    there = wheels.installed()
    lacking = {group: wheels.find_missing((group,), there, python) for group in wheels.GROUPS}
    for group, names in lacking.items():
        if names:
            print(f"missing for {group}: {', '.join(names)}")
            print(f"  {wheels.download_command(names, python, str(given.wheels))}", flush=True)
    return lacking


def _check_device(device: str) -> None:
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f"no torch in {sys.executable}: choose another with PYTHON=...") from error
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} of {sys.executable} sees no GPU; --cpu shows that the "
            "steps run"
        )


def _run_all(
    given: argparse.Namespace, site: Path, lacking: Mapping[str, Mapping[str, str]]
) -> None:
    """Every step that is not done: first those that were never tried."""
    total = given.total or TOTAL_S * (_CPU_FACTOR if given.cpu else 1)
    end = time.monotonic() + total
    wanted = [step for step in STEPS if not given.only or step.name in given.only]
    for step in sorted(wanted, key=lambda step: bool(read(given.folder, step.name))):
        if read(given.folder, step.name).get("status") == "done" and not given.again:
            print(f"{step.name}: done before", flush=True)
            continue
        absent = {name for group in step.needs for name in lacking[group]}
        left = end - time.monotonic()
        if absent:
            _note(given.folder, step, "skipped", f"missing: {', '.join(sorted(absent))}")
        elif left < 1:
            _note(given.folder, step, "skipped", f"the {total:g} s of the check are spent")
        else:
            print(f"{step.name}: {step.about}", flush=True)
            budget_s = step.budget_s * (_CPU_FACTOR if given.cpu else 1)
            _run_process(given, site, step, min(budget_s, left))
        report.write_all(given.folder)
        document = read(given.folder, step.name)
        print(f"  {document['status']} {document.get('why', '')}".rstrip(), flush=True)


def _run_process(given: argparse.Namespace, site: Path, step: Step, limit_s: float) -> None:
    """Runs a step in a process group of its own, and stops it when its time is spent."""
    command = [sys.executable, __file__, "--step", step.name, "--folder", str(given.folder)]
    command += ["--model", given.model, *(["--cpu"] if given.cpu else [])]
    log = given.folder / f"{step.name}.log"
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=_environment(given, site),
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    document = read(given.folder, step.name)
    document |= {"seconds": time.monotonic() - started, "limit_s": limit_s}
    if code is None:
        document |= {"status": "stopped", "why": f"over its {limit_s:.0f} s"}
    elif code or document.get("status") != "done":
        document["status"] = "failed"
        document.setdefault("why", f"its process ended with {code}")
        document["log"] = log.read_text(errors="replace")[-3000:]
    write(given.folder, step.name, document)


def _environment(given: argparse.Namespace, site: Path) -> dict[str, str]:
    paths = [str(site)] if site.is_dir() else []
    paths += [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        # Nothing is asked of a network that is not there.
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if given.cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a step and what it has started: commands, ranks, Ray."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        end = time.monotonic() + _GRACE_S
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
    process.wait()


def _run_step(given: argparse.Namespace) -> None:
    """One step, in this process."""
    (step,) = (one for one in STEPS if one.name == given.step)
    context = Context(
        name=step.name,
        folder=given.folder,
        device="cpu" if given.cpu else "cuda",
        small=given.cpu,
        model="tiny" if given.cpu else given.model,
    )
    context.record()
    try:
        with _compiler(given.cpu):
            step.run(context)
    except BaseException as error:
        why = f"{type(error).__name__}: {error}"[:2000]
        document = {"status": "failed", "why": why, "results": context.results}
        write(given.folder, step.name, document)
        raise
    write(given.folder, step.name, {"status": "done", "results": context.results})


def _compiler(on_cpu: bool) -> AbstractContextManager[Any]:
    """Compiling takes a CPU minutes: there the layers stay as they are. The suite compiles some."""
    import torch

    return torch.compiler.set_stance("force_eager") if on_cpu else nullcontext()


def _note(folder: Path, step: Step, status: str, why: str) -> None:
    document: dict[str, Any] = read(folder, step.name) or {"results": {}}
    write(folder, step.name, document | {"status": status, "why": why})


if __name__ == "__main__":
    main()
