"""Seconds, memory and model-FLOP utilisation of every stage of the three roles, on one device.

    python benchmarks/gpu.py --output gpu.json              Wan 1.3B, 480x832, a GPU
    python benchmarks/gpu.py --model 14b --frames 17        a larger network, a shorter clip
    python benchmarks/gpu.py --tiny                         seconds on a CPU: does it run?

It needs torch and diffusers and nothing else: the passes of the roles are written out here, on
networks of the real sizes with random weights, in bfloat16 products over float32 weights, as
`workers` makes them. `sgmd plan RECIPE --measured gpu.json` reads what it writes.

    rollout   the mean over all exit steps; steps before the exit are not recorded
    denoise   both halves of guidance as one batch of two
    signal    forward, and backward to the input alone; the graph stays for
    track     backward to the parameters over the same graph
    learn     backward of the rollout
    step      clipping and AdamW

A clip that does not fit is tried shorter. Utilisation counts what the mathematics needs, not what
checkpointing makes again, over the peak rate of the device.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from workers.models.wan_arithmetic import WanShape

SHAPES = {
    "1.3b": WanShape(num_layers=30, width=1536, ffn_width=8960),
    "14b": WanShape(num_layers=40, width=5120, ffn_width=13824),
    "tiny": WanShape(2, 64, 160, text_width=24, freq_width=16, in_channels=4, out_channels=4),
}
HEAD_SIZES = {"1.3b": 128, "14b": 128, "tiny": 32}
VIDEO_FRAMES = (81, 49, 33, 17)
NUM_STEPS = 4
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0, "A800": 312.0}
"""Dense bfloat16, by what the device's name holds; from the vendor's data sheets."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured.

    Attributes:
        model: Key of `SHAPES`.
        latent_shape: Channels, frames, rows, columns.
        text_length: Text positions.
        checkpointing: Activations of the layers are made again in the backward pass.
        compile: Layers as compiled code.
        device: Where.
    """

    model: str
    latent_shape: tuple[int, int, int, int]
    text_length: int
    checkpointing: bool
    compile: bool
    device: str

    @property
    def shape(self) -> WanShape:
        """The networks."""
        return SHAPES[self.model]

    @property
    def forward_flops(self) -> int:
        """Operations of one pass of one sample."""
        return self.shape.forward_flops(self.latent_shape, self.text_length)


class Stand:
    """One role's network and inputs.

    Args:
        case: What is measured.
        trains: Whether it has gradients and an optimizer.
    """

    def __init__(self, case: Case, *, trains: bool) -> None:
        shape = case.shape
        torch.manual_seed(0)
        with torch.device(case.device):
            self.network = WanTransformer3DModel(
                patch_size=shape.patch_size,
                num_attention_heads=shape.width // HEAD_SIZES[case.model],
                attention_head_dim=HEAD_SIZES[case.model],
                in_channels=shape.in_channels,
                out_channels=shape.out_channels,
                text_dim=shape.text_width,
                freq_dim=shape.freq_width,
                ffn_dim=shape.ffn_width,
                num_layers=shape.num_layers,
            )
            self.x0 = torch.randn(1, *case.latent_shape)
            self.noise = torch.randn(1, *case.latent_shape)
            self.text = torch.randn(1, case.text_length, shape.text_width)
        # Wan's norms take a bfloat16 input and float32 weights: right, only not fused.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        self.network.eval().requires_grad_(trains)
        self.device = case.device
        if case.checkpointing and trains:
            self.network.enable_gradient_checkpointing()
        if case.compile:
            _compile(self.network.blocks)
        self.optimizer = (
            torch.optim.AdamW(self.network.parameters(), lr=1e-6, betas=(0.0, 0.999), foreach=True)
            if trains
            else None
        )

    def velocity(self, x_t: Tensor, level: float, text: Tensor) -> Tensor:
        """One pass of the network."""
        timestep = torch.full((len(x_t),), 1000 * level, device=self.device)
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            out = self.network(x_t, timestep, text, return_dict=False)[0]
        return out.float()

    def step(self) -> None:
        """One update, from whatever gradients there are."""
        assert self.optimizer is not None, "only a network that trains is updated"
        nn.utils.clip_grad_norm_(self.network.parameters(), 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


Measured = dict[str, list[tuple[float, float]]]
"""Seconds and peak bytes of every turn, by stage."""


def measure_generator(case: Case, repeats: int) -> Measured:
    """`rollout`, `learn` and `step`."""
    stand, found = Stand(case, trains=True), _Turns(case.device)
    grid = [1.0, 0.9375, 0.8333, 0.625, 0.0]
    for turn in range(1 + repeats):
        for exit_step in range(NUM_STEPS):
            with found.timed("rollout", counts=turn > 0):
                x_t = stand.noise
                with torch.no_grad():
                    for at in range(exit_step):
                        x_t = x_t + (grid[at + 1] - grid[at]) * stand.velocity(
                            x_t, grid[at], stand.text
                        )
                x0 = x_t - grid[exit_step] * stand.velocity(x_t, grid[exit_step], stand.text)
            with found.timed("learn", counts=turn > 0):
                x0.backward(torch.ones_like(x0) / x0.numel())
            del x0
        with found.timed("step", counts=turn > 0):
            stand.step()
    return found.turns


def measure_teacher(case: Case, repeats: int) -> Measured:
    """`denoise`."""
    stand, found = Stand(case, trains=False), _Turns(case.device)
    for turn in range(1 + repeats):
        with found.timed("denoise", counts=turn > 0), torch.no_grad():
            x_t = 0.5 * (stand.x0 + stand.noise)
            both = stand.velocity(torch.cat([x_t, x_t]), 0.5, torch.cat([stand.text, stand.text]))
            conditional, unconditional = both.chunk(2)
            unconditional + 3.0 * (conditional - unconditional)
    return found.turns


def measure_fake_score(case: Case, repeats: int) -> Measured:
    """`signal`, `track` and `step`, with shared tracking."""
    stand, found = Stand(case, trains=True), _Turns(case.device)
    teacher = torch.randn_like(stand.x0)
    for turn in range(1 + repeats):
        with found.timed("signal", counts=turn > 0):
            x0 = stand.x0.clone().requires_grad_()
            velocity = stand.velocity(0.5 * (x0 + stand.noise), 0.5, stand.text)
            loss = (velocity - teacher).square().mean()
            torch.autograd.grad(loss, x0, retain_graph=True)
        with found.timed("track", counts=turn > 0):
            tracking = (velocity - (stand.noise - stand.x0)).square().mean()
            tracking.backward(inputs=list(stand.network.parameters()))
        del velocity, loss, tracking
        with found.timed("step", counts=turn > 0):
            stand.step()
    return found.turns


ROLES: dict[str, Callable[[Case, int], Measured]] = {
    "generator": measure_generator,
    "teacher": measure_teacher,
    "fake_score": measure_fake_score,
}


def passes_of(case: Case) -> dict[str, tuple[float, float]]:
    """Forward passes' worth of work by stage: as computed, and as the mathematics needs it."""
    again = float(case.checkpointing)
    return {
        "generator.rollout": ((NUM_STEPS + 1) / 2, (NUM_STEPS + 1) / 2),
        "generator.learn": (2.0 + again, 2.0),
        "teacher.denoise": (2.0, 2.0),
        "fake_score.signal": (2.0 + again, 2.0),
        "fake_score.track": (2.0 + again, 2.0),
    }


def measure(case: Case, repeats: int, peak_tflops: float | None) -> dict[str, Any]:
    """All stages of all roles, one role at a time."""
    started = time.perf_counter()
    stages: dict[str, Any] = {}
    passes = passes_of(case)
    for role, measure_role in ROLES.items():
        for stage, turns in measure_role(case, repeats).items():
            name = f"{role}.{stage}"
            # Exit steps differ in length, so of rollouts the mean is what counts.
            middle = statistics.fmean if stage == "rollout" else statistics.median
            seconds = middle(seconds for seconds, _ in turns)
            row: dict[str, Any] = {
                "seconds_per_sample": seconds,
                "peak_gb": max(peak for _, peak in turns) / 1e9,
            }
            if name in passes:
                computed, needed = passes[name]
                rate = needed * case.forward_flops / seconds / 1e12
                row |= {"passes": computed, "tflops": computed / needed * rate}
                row["mfu"] = rate / peak_tflops if peak_tflops else None
            stages[name] = row
            print(f"{name}: {json.dumps(row)}", file=sys.stderr)
        _free(case.device)
    return {
        "shape": asdict(case.shape),
        "latent_shape": list(case.latent_shape),
        "text_length": case.text_length,
        "settings": {
            "precision": "bf16",
            "checkpointing": case.checkpointing,
            "compile": case.compile,
            "steps": NUM_STEPS,
        },
        "stages": stages,
        "seconds": time.perf_counter() - started,
    }


class _Turns:
    """Times what runs inside, and the memory at its peak."""

    def __init__(self, device: str) -> None:
        self.turns: Measured = {}
        self._on_gpu = device.startswith("cuda")

    @contextmanager
    def timed(self, stage: str, *, counts: bool) -> Iterator[None]:
        """Measures one turn of a stage; a first turn, which warms up, does not count."""
        if self._on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        peak = 0
        if self._on_gpu:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        if counts:
            self.turns.setdefault(stage, []).append((time.perf_counter() - started, peak))


def _compile(blocks: Sequence[nn.Module]) -> None:
    from torch._functorch import config as functorch_config

    # The fake score's graph is walked twice.
    functorch_config.donated_buffer = False
    for block in blocks:
        block.compile()


def _free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _latent_shape(frames: int) -> tuple[int, int, int, int]:
    return (16, (frames - 1) // 4 + 1, 60, 104)


def _longest_that_fits(case: Case, frames: Sequence[int]) -> Case:
    """The case with the longest clip that every role has the memory for."""
    for number in frames:
        longest = replace(case, latent_shape=_latent_shape(number), compile=False)
        try:
            for measure_role in ROLES.values():
                measure_role(longest, 0)
                _free(case.device)
        except torch.cuda.OutOfMemoryError:
            print(f"{number} frames do not fit", file=sys.stderr)
            _free(case.device)
            continue
        return replace(case, latent_shape=longest.latent_shape)
    raise SystemExit(f"no clip of {list(frames)} frames fits: take --model 1.3b or a larger GPU")


def _peak_tflops(device: str) -> float | None:
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, measures, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=("1.3b", "14b"), default="1.3b")
    parser.add_argument("--tiny", action="store_true", help="a network that a CPU runs in seconds")
    parser.add_argument("--frames", type=int, help="video frames; default: 81, fewer if they must")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--compile", choices=("on", "off", "both"), help="default: both on a GPU")
    parser.add_argument("--repeats", type=int, default=3, help="turns that count")
    parser.add_argument("--peak-tflops", type=float, help="of the device, where it is not known")
    parser.add_argument("--output", type=Path, help="file for the JSON; standard output without")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() and not given.tiny else "cpu"
    if device == "cpu" and not given.tiny:
        raise SystemExit("no GPU is in sight: --tiny shows on a CPU that the benchmark runs")
    case = Case(
        model="tiny" if given.tiny else given.model,
        latent_shape=(4, 3, 8, 8) if given.tiny else _latent_shape(given.frames or 81),
        text_length=16 if given.tiny else 512,
        checkpointing=not given.no_checkpointing,
        compile=False,
        device=device,
    )
    if not given.tiny:
        case = _longest_that_fits(case, (given.frames,) if given.frames else VIDEO_FRAMES)
    peak = given.peak_tflops or _peak_tflops(device)
    wanted = given.compile or ("off" if given.tiny else "both")
    compiled = {"on": (True,), "off": (False,), "both": (False, True)}[wanted]
    document = {
        "benchmark": "gpu",
        "runs": [measure(replace(case, compile=one), given.repeats, peak) for one in compiled],
        "machine": {
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
            "cores": os.cpu_count(),
            "peak_tflops": peak,
        },
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    text = json.dumps(document, indent=2) + "\n"
    if given.output:
        given.output.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
