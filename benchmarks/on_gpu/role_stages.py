"""Seconds, memory and model-FLOP utilisation of every stage of the three roles, on one device.

    rollout   the mean over all exit steps; steps before the exit are not recorded
    denoise   both halves of guidance as one batch of two
    signal    forward, and backward to the input alone; the graph stays for
    track     backward to the parameters over the same graph
    learn     backward of the rollout
    step      norm, clipping and AdamW; on the generator the average, too

A clip that does not fit is tried shorter. Utilisation counts what the mathematics needs, by the
exact operations of each pass, not what checkpointing makes again, over the peak rate of the device.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from on_gpu.cases import (
    NUM_STEPS,
    Case,
    free,
    peak_bytes,
    reset_peak,
    synchronize,
)
from sgmd_core.types import GeneratorSignal, MicroBatchKey, NoisedBatch, TeacherPrediction
from workers.models.wan_configs import WAN

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0}
"""Dense bfloat16, by what the device's name holds; from the vendor's data sheets."""

Measured = dict[str, list[tuple[float, float]]]
"""Seconds and peak bytes of every turn, by stage."""


class Turns:
    """Times what runs inside, and the memory at its peak."""

    def __init__(self, device: str) -> None:
        self.turns: Measured = {}
        self._device = device

    @contextmanager
    def timed(self, stage: str, *, counts: bool) -> Iterator[None]:
        """Measures one turn of a stage; a first turn, which warms up, does not count."""
        synchronize(self._device)
        reset_peak(self._device)
        started = time.perf_counter()
        yield
        synchronize(self._device)
        spent = time.perf_counter() - started
        if counts:
            self.turns.setdefault(stage, []).append((spent, peak_bytes(self._device)))


def measure_generator(case: Case, repeats: int) -> Measured:
    """`rollout`, `learn` and `step`."""
    generator, found, text = case.generator(), Turns(case.device), case.text_batch()
    for turn in range(1 + repeats):
        # The first turn warms up: the steps before an exit need no kernels of their own.
        exits = range(NUM_STEPS) if turn else (1,)
        for exit_step in exits:
            key = MicroBatchKey(turn, exit_step)
            draws = case.draws(key, exit_step)
            with found.timed("rollout", counts=turn > 0):
                query = generator.rollout(key, text, draws)
            gradient = torch.randn_like(query.x0) / query.x0.numel()
            signal = GeneratorSignal(key, gradient, query.generator_version, {})
            with found.timed("learn", counts=turn > 0):
                generator.learn(signal)
        with found.timed("step", counts=turn > 0):
            generator.gradient_report(turn)
            generator.step(turn)
    return found.turns


def measure_teacher(case: Case, repeats: int) -> Measured:
    """`denoise`."""
    teacher, found, negative = case.teacher(), Turns(case.device), case.text()
    for turn in range(1 + repeats):
        query = _query(case, turn)
        with found.timed("denoise", counts=turn > 0):
            teacher.denoise(query, negative)
    return found.turns


def measure_fake_score(case: Case, repeats: int) -> Measured:
    """`signal`, `track` and `step`, with shared tracking."""
    fake_score, found = case.fake_score(), Turns(case.device)
    for turn in range(1 + repeats):
        query = _query(case, turn)
        prediction = TeacherPrediction(query.key, torch.randn_like(query.x0))
        with found.timed("signal", counts=turn > 0):
            fake_score.signal(query, prediction, 1.0)
        with found.timed("track", counts=turn > 0):
            fake_score.track(query, 1.0)
        with found.timed("step", counts=turn > 0):
            fake_score.gradient_report(turn)
            fake_score.step(turn)
    return found.turns


ROLES: dict[str, Callable[[Case, int], Measured]] = {
    "teacher": measure_teacher,
    "fake_score": measure_fake_score,
    "generator": measure_generator,
}


def passes_of(case: Case) -> dict[str, float]:
    """Forward passes' worth of work by stage, as computed: how `sgmd plan` counts and scales."""
    again, forward = float(bool(case.compute.checkpointing)), case.flops.forward
    needed = {stage: flops / forward for stage, flops in needed_flops(case).items()}
    backward = ("generator.learn", "fake_score.signal", "fake_score.track")
    return needed | {stage: needed[stage] + again for stage in backward}


def needed_flops(case: Case) -> dict[str, float]:
    """Operations that each stage needs for one sample; nothing is made again."""
    flops = case.flops
    return {
        "generator.rollout": (NUM_STEPS + 1) / 2 * flops.forward,
        "generator.learn": flops.to_parameters,
        "teacher.denoise": 2 * flops.forward,
        "fake_score.signal": flops.forward + flops.to_input,
        "fake_score.track": flops.to_parameters,
    }


def measure(
    case: Case,
    repeats: int,
    ceilings: dict[str, float | None],
    on_stage: Callable[[dict[str, Any]], None] = lambda stages: None,
) -> dict[str, Any]:
    """All stages of all roles, one role at a time.

    Args:
        case: What is measured.
        repeats: Turns that count.
        ceilings: `data_sheet` and `measured` TFLOP/s of the device, where they are known.
        on_stage: Called with all stages so far when a role is done.
    """
    started = time.perf_counter()
    stages: dict[str, Any] = {}
    for role, measure_role in ROLES.items():
        for stage, turns in measure_role(case, repeats).items():
            name = f"{role}.{stage}"
            stages[name] = _row(case, name, turns, ceilings)
            print(f"{name}: {json.dumps(stages[name])}", file=sys.stderr, flush=True)
        free(case.device)
        on_stage(stages)
    return {
        "family": WAN,
        "shape": asdict(case.shape),
        "latent_shape": list(case.latent_shape),
        "num_frames": case.num_frames,
        "text_length": case.text_length,
        "settings": {**asdict(case.compute), "steps": NUM_STEPS},
        "stages": stages,
        "seconds": time.perf_counter() - started,
    }


def longest_that_fits(
    case: Case, frames: Sequence[int], run: Callable[[Case], dict[str, Any]]
) -> dict[str, Any]:
    """Runs the longest clip that fits in the memory of the device.

    Raises:
        RuntimeError: Not even the shortest one fits.
    """
    refused: list[int] = []
    for number in frames:
        try:
            return run(replace(case, num_frames=number)) | {"did_not_fit": refused}
        except torch.cuda.OutOfMemoryError as error:
            print(f"{number} frames do not fit: {error}", file=sys.stderr, flush=True)
            refused.append(number)
        # Outside of the handler, whose traceback holds the tensors of what has failed.
        free(case.device)
    raise RuntimeError(f"no clip of {list(frames)} frames fits: the GPU is too small for the model")


def data_sheet_tflops(device: str) -> float | None:
    """Peak rate of a device that is known."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def _row(
    case: Case, name: str, turns: Sequence[tuple[float, float]], ceilings: dict[str, float | None]
) -> dict[str, Any]:
    # Exit steps differ in length, so of rollouts the mean is what counts.
    middle = statistics.fmean if name.endswith("rollout") else statistics.median
    seconds = middle(seconds for seconds, _ in turns)
    row: dict[str, Any] = {
        "seconds_per_sample": seconds,
        "turns": [spent for spent, _ in turns],
        "peak_gb": max(peak for _, peak in turns) / 1e9,
    }
    needed = needed_flops(case).get(name)
    if needed is not None:
        rate = needed / seconds / 1e12
        row |= {"passes": passes_of(case)[name], "flops": needed, "tflops": rate}
        for kind, peak in ceilings.items():
            row["mfu" if kind == "data_sheet" else "of_measured_rate"] = (
                rate / peak if peak else None
            )
    return row


def _query(case: Case, turn: int) -> NoisedBatch:
    key = MicroBatchKey(turn, 0)
    draws = case.draws(key, 0)
    return NoisedBatch(
        key=key,
        x0=draws.initial_noise.to(case.device),
        sigma=draws.sigma.to(case.device),
        noise=draws.noise.to(case.device),
        text=case.text(),
        generator_version=turn,
    )
