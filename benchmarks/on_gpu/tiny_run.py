"""`sgmd distill tiny` on the device: losses against a CPU, seconds, and what the device waits for.

local    this process's roles on the device, the same run on the CPU beside it
host     a few iterations more under torch.profiler: time that kernels take, over wall time
sampled  the exported generator makes a clip
pools    the same on Ray, each role with a share of the card, where Ray is installed
"""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from on_gpu.step import Context
from pipelines.shapes import write_shards

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red circle moves left quickly"


def run_local(context: Context) -> None:
    """In one process, without Ray."""
    iterations = 3 if context.small else 20
    work = _scratch(context)
    _write_captions(context, work)
    # Both at once: the CPU run leaves the device alone.
    beside = _distill(context, work, "cpu", iterations, on_cpu=True)
    started = time.perf_counter()
    _finish(_distill(context, work, "device", iterations), "sgmd distill on the device")
    context.record(command_s=time.perf_counter() - started, iterations=iterations)
    found = _records(work / "device")
    seconds = [record["seconds"]["total"] for record in found]
    context.record(
        seconds_per_iteration=median(seconds[1:]),
        first_iteration_s=seconds[0],
        losses=found[-1]["losses"],
    )
    _finish(beside, "sgmd distill on the CPU")
    context.record(
        against_cpu=_against(found, _records(work / "cpu")),
        cpu_seconds_per_iteration=median(
            record["seconds"]["total"] for record in _records(work / "cpu")[1:]
        ),
    )
    context.record(sampled=_sample(context, work / "device"))
    context.record(host=_host_share(context, work, median(seconds[1:])))
    shutil.rmtree(work, ignore_errors=True)


def run_pools(context: Context) -> None:
    """Each role in actors of its own, which share the card; through the object store."""
    if find_spec("ray") is None:
        raise RuntimeError("Ray is not installed: its wheel is in the group ray")
    # On a CPU starting the actors is nearly all of it.
    iterations = 2 if context.small else 20
    work = _scratch(context)
    _write_captions(context, work)
    share = 0.0 if context.device == "cpu" else 0.25
    pools = [f"topology.{role}.gpus={share}" for role in ("generator", "teacher", "fake_score")]
    run = _distill(context, work, "pools", iterations, *pools, mode="pools")
    _finish(run, "sgmd distill in pools")
    alone = _distill(context, work, "local", iterations)
    _finish(alone, "sgmd distill in one process")
    found, local = _records(work / "pools"), _records(work / "local")
    context.record(
        iterations=iterations,
        seconds_per_iteration=median(one["seconds"]["total"] for one in found[1:]),
        local_seconds_per_iteration=median(one["seconds"]["total"] for one in local[1:]),
        against_local=_against(found, local),
        nixl=_nixl(context.device),
    )
    shutil.rmtree(work, ignore_errors=True)


def _nixl(device: str) -> str:
    """Explains why results were not sent from GPU to GPU: each role would need its own."""
    if find_spec("nixl") is None:
        return "not run: nixl is not installed"
    count = torch.cuda.device_count() if device != "cpu" else 0
    return f"not run: it needs a GPU for each of three roles, and there are {count}"


def _scratch(context: Context) -> Path:
    work = context.folder / f".{context.name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def _write_captions(context: Context, work: Path) -> None:
    clips = 16 if context.small else 512
    write_shards(f"{work / 'shapes' / 'train'}", num_clips=clips, shard_size=clips, seed=0)


def _distill(
    context: Context,
    work: Path,
    name: str,
    iterations: int,
    *settings: str,
    mode: str = "local",
    on_cpu: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts a run of the recipe `tiny` without validation."""
    given = [
        *(f"topology.mode={mode}", "validation.every=0", "checkpoint.every=0", f"name={name}"),
        *(f"output={work}", f"iterations={iterations}", f"data.train={work / 'shapes' / 'train'}"),
    ]
    if context.small:
        given += ["batch.size=4"]
    return _sgmd(context, "distill", "tiny", *given, *settings, on_cpu=on_cpu)


def _sgmd(context: Context, *arguments: str, on_cpu: bool = False) -> subprocess.Popen[bytes]:
    """Starts a command of `sgmd` in a process of its own, on the same packages."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # Convolutions of float32 would take TF32, whose 10 bits hide what is compared.
    environment["NVIDIA_TF32_OVERRIDE"] = "0"
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log = (context.folder / f"{context.name}.sgmd.log").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *arguments, "--json"],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )


def _finish(process: subprocess.Popen[bytes], what: str) -> None:
    if process.wait():
        raise RuntimeError(f"{what} ended with {process.returncode}; see the step's .sgmd.log")


def _records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _against(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, float]:
    """Largest relative difference of a loss: in the first iteration, and in all of them."""
    differences = [
        max(
            abs(one["losses"][name] - value) / max(abs(value), 1e-12)
            for name, value in other["losses"].items()
        )
        for one, other in zip(found, expected, strict=True)
    ]
    return {"first_iteration": differences[0], "all_iterations": max(differences)}


def _sample(context: Context, run: Path) -> dict[str, Any]:
    """A clip of the exported generator."""
    from pipelines.generate import generate

    (clip,) = generate(run, [PROMPT], output=run / "clips", device=context.device)
    return {
        "frames": list(clip.frames.shape) if hasattr(clip.frames, "shape") else len(clip.frames),
        "seconds": clip.seconds,
        "files": [path.name for path in clip.paths],
        "bytes": sum(path.stat().st_size for path in clip.paths),
    }


def _host_share(context: Context, work: Path, plain_s: float) -> dict[str, Any]:
    """Returns the seconds of kernels in an iteration, and the seconds of waiting for the host."""
    from iteration import Stand

    from pipelines.config.recipe import load_recipe
    from pipelines.data.stream.feed import FeedProgress
    from pipelines.distillation.groups import open_groups
    from pipelines.distillation.preflight import run_preflight
    from pipelines.run.folder import RunFolder

    settings = ["topology.mode=local", "validation.every=0", f"output={work}", "name=profiled"]
    settings += [f"data.train={work / 'shapes' / 'train'}"]
    settings += ["batch.size=4"] if context.small else []
    config = load_recipe("tiny", settings)
    on_card = context.device != "cpu"
    activities = [ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]
    rounds = 1 if context.small else 4
    folder = RunFolder(work / "profiled")
    with open_groups(
        config, run_preflight(config), folder, FeedProgress(), 2 * config.batch.size
    ) as groups:
        stand = Stand(config, groups, None)
        for _ in range(rounds):
            stand.run(1)

        def measure() -> list[float]:
            return [stand.run(1).wall_s for _ in range(rounds)]

        with profile(activities=activities) as profiled:
            # Operations of a CPU are not kernels, and listing them takes longer than making them.
            walls = measure() if on_card else []
        walls = walls or measure()
    # Annotations, such as an optimizer's, span kernels that are listed themselves.
    events = [
        event
        for event in profiled.events()
        if event.device_type is DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Optimizer.", "ProfilerStep"))
    ]
    kernels_s = sum(event.time_range.elapsed_us() for event in events) / 1e6 / rounds
    return {
        "wall_s": median(walls),
        "plain_wall_s": plain_s,
        "kernels": len(events) // rounds,
        "kernels_s": kernels_s if on_card else None,
        "host_share": max(0.0, 1 - kernels_s / plain_s) if on_card else None,
    }
