"""Stall of training by a save, beside training and waited for; host memory of a rank that saves.

    python benchmarks/checkpoints.py --output checkpoints.json

The three roles train in one process. A save is waited for (`save`), or its state is copied and a
thread writes it while iterations go on (`begin_save`, `finish_save`). The stall is all the time by
which the iterations take longer: the copy, and what the thread takes from the cores meanwhile. It
is compared with the time of the ten iterations from one save to the next. Networks: `tiny`, of
0.6 M parameters, and `large`, of 110 M, whose state is 2.2 GB. An iteration here has few tokens, so
the shares are larger than those of videos.

Then ranks of a gloo group save a sharded network: each its own rows, and as older versions did it,
gathered on the first rank. The peak is that of the kernel (VmHWM, reset before), less what the
process held before.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from diffusers import WanTransformer3DModel
from documents import write_document

from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.seeds import draw
from sgmd_core.types import MicroBatchKey, TextBatch
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.models.wan import WanVelocity
from workers.network_settings import OptimizerSettings
from workers.optimizer import RoleOptimizer
from workers.role_state import RoleState, save_role
from workers.score_teacher import ScoreTeacher
from workers.settings import FakeScoreSettings, GeneratorSettings, TeacherSettings
from workers.sharding import gather_to_rank0, shard

EVERY = 10
LATENT_SHAPE = (16, 1, 16, 16)
TEXT_LENGTH, TEXT_WIDTH, NUM_STEPS = 16, 64, 4
SIZES = {"tiny": (2, 4, 32), "large": (6, 8, 128)}
"""Layers, heads and width of a head."""


def make_network(size: str) -> WanVelocity:
    """A denoiser with random weights."""
    layers, heads, width = SIZES[size]
    torch.manual_seed(0)
    return WanVelocity(
        WanTransformer3DModel(
            num_layers=layers,
            num_attention_heads=heads,
            attention_head_dim=width,
            ffn_dim=4 * heads * width,
            text_dim=TEXT_WIDTH,
            in_channels=LATENT_SHAPE[0],
            out_channels=LATENT_SHAPE[0],
        )
    )


class Training:
    """The three roles in one process.

    Args:
        size: Which network.
    """

    def __init__(self, size: str) -> None:
        self._schedule = FlowMatchSchedule()
        settings = GeneratorSettings(num_steps=NUM_STEPS)
        self.generator = GeneratorLearner(
            make_network(size), self._schedule, settings, LATENT_SHAPE, 0
        )
        self.fake_score = FakeScoreTracker(make_network(size), SgmdObjective(), FakeScoreSettings())
        self._teacher = ScoreTeacher(make_network(size), TeacherSettings())
        self._text = TextBatch(torch.randn(1, TEXT_LENGTH, TEXT_WIDTH), (0,))
        self._negative = torch.randn(1, TEXT_LENGTH, TEXT_WIDTH)
        self._done = 0

    def iterate(self) -> float:
        """Makes one iteration of a rollout of fixed length; returns its seconds."""
        began_s, key = time.perf_counter(), MicroBatchKey(self._done, 0)
        drawn = draw(0, MicroBatchKey(0, 0), (0,), LATENT_SHAPE, self._schedule, NUM_STEPS)
        query = self.generator.rollout(key, self._text, drawn)
        signal = self.fake_score.signal(query, self._teacher.denoise(query, self._negative), 1.0)
        self.fake_score.track(query, 1.0)
        self.generator.learn(signal)
        for role in (self.generator, self.fake_score):
            role.gradient_report(self._done)
            role.step(self._done)
        self._done += 1
        return time.perf_counter() - began_s


def measure_stall(size: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of an iteration, and the stall of each way to save."""
    training = Training(size)
    roles = (training.generator, training.fake_score)
    training.iterate()
    plain, waited, copied, beside, during, writing = ([] for _ in range(6))
    for number in range(rounds):
        plain += [training.iterate() for _ in range(3)]
        began_s = time.perf_counter()
        for role in roles:
            role.save(str(folder / f"waited-{number}"))
        waited.append(time.perf_counter() - began_s)
        plain += [training.iterate() for _ in range(3)]
        usual_s = statistics.median(plain[-6:])
        began_s, target = time.perf_counter(), str(folder / f"beside-{number}")
        for role in roles:
            role.begin_save(target)
        copied.append(time.perf_counter() - began_s)
        slowed: list[float] = []
        while any(role.finish_save(target, wait=False) is None for role in roles):
            slowed.append(training.iterate())
        writing.append(time.perf_counter() - began_s)
        during += slowed
        beside.append(copied[-1] + max(0.0, sum(slowed) - usual_s * len(slowed)))
    iteration_s = statistics.median(plain)
    return {
        "parameters": sum(value.numel() for value in make_network(size).parameters()),
        "state_bytes": sum(
            path.stat().st_size for path in (folder / "waited-0").rglob("*") if path.is_file()
        ),
        "iteration_s": iteration_s,
        "waited_stall_s": statistics.median(waited),
        "beside_copy_s": statistics.median(copied),
        "beside_stall_s": statistics.median(beside),
        "beside_until_written_s": statistics.median(writing),
        "waited_share": statistics.median(waited) / (EVERY * iteration_s),
        "beside_copy_share": statistics.median(copied) / (EVERY * iteration_s),
        "beside_share": statistics.median(beside) / (EVERY * iteration_s),
    }


def measure_memory(num_ranks: int, size: str, folder: Path) -> dict[str, Any]:
    """Peak bytes of each rank while it saves, for both ways."""
    results: dict[str, Any] = {}
    for way in ("rows", "gathered"):
        own = folder / way
        own.mkdir()
        multiprocessing.spawn(_save, (num_ranks, own, size, way), nprocs=num_ranks)
        results[way] = [torch.load(own / f"{rank}.pt") for rank in range(num_ranks)]
    return {"ranks": num_ranks, "peak_bytes": results}


def _save(rank: int, num_ranks: int, folder: Path, size: str, way: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "meeting"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    network = make_network(size)
    shard(network, network.blocks)
    optimizer = RoleOptimizer("role", network, OptimizerSettings(lr=1e-4))
    for value in optimizer.parameters:
        value.grad = torch.ones_like(value)
    optimizer.gradient_report(0)
    optimizer.step(0)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmHWM")
    target = str(folder / "checkpoint")
    if way == "rows":
        save_role(target, "role", optimizer.state())
    else:
        moments = {
            f"{kind}/{name}": value
            for name, parameter in zip(optimizer.weights, optimizer.parameters, strict=True)
            for kind, value in optimizer._adamw.state[parameter].items()
        }
        weights, gathered = (
            gather_to_rank0(tensors.items()) for tensors in (optimizer.weights, moments)
        )
        if rank == 0:
            save_role(target, "role", RoleState(1, weights, gathered))
    torch.save(_status("VmHWM") - before, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    """Measures, and writes the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=4, help="0 leaves the memory out")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured: dict[str, Any] = {"every": EVERY, "rounds": options.rounds, "stall": {}}
    with tempfile.TemporaryDirectory() as scratch:
        for size in options.sizes:
            folder = Path(scratch) / size
            measured["stall"][size] = measure_stall(size, options.rounds, folder)
        if options.ranks:
            largest = options.sizes[-1]
            measured["memory"] = measure_memory(options.ranks, largest, Path(scratch))
    write_document("checkpoints", measured, options.output)


if __name__ == "__main__":
    main()
