"""One backward pass for both gradients of the fake score against two: CPU seconds and iterations.

    python benchmarks/joint_walk.py

First the seconds of `signal` and `track` on one micro-batch of a small Wan with checkpointing, both
ways in turns; they must make the same losses. Then iterations of the schedule by the simulator, in
forward passes at Wan 1.3B, 480x832, 81 frames: one rank a role and pool, transfers free. Then the
plans of recipes on GPUs that share weights, in seconds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch
from diffusers import WanTransformer3DModel

from cluster.schedule.program import Home, Team
from cluster.schedule.schedule import order_calls
from cluster.schedule.simulate import Costs, by_stage, simulate
from pipelines.config.recipe import load_recipe
from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER
from pipelines.planning.hardware import Hardware
from pipelines.planning.plan import best_layouts
from pipelines.planning.stage_times import modelled
from pipelines.planning.stage_work import stage_units
from pipelines.planning.workload import Workload
from pipelines.stages.costs import PassCosts
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.types import MicroBatchKey, NoisedBatch, TeacherPrediction
from workers.compute import prepare_network
from workers.fake_score_tracker import FakeScoreTracker
from workers.models.wan import WanVelocity
from workers.models.wan_arithmetic import WanShape
from workers.network_settings import ComputeSettings
from workers.settings import FakeScoreSettings

_LATENTS, _TEXT, _TEXT_WIDTH = (16, 3, 16, 16), 16, 64
_SIZES = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": _TEXT_WIDTH,
    "freq_dim": 64,
    "ffn_dim": 1024,
    "num_layers": 8,
}
_DEPTHS = (1, 2, 3, 4)
_PLANNED = (
    ("wan21-1.3b", "1.3b", 8, 16, 40.0),
    ("wan21-1.3b", "1.3b", 8, 64, 40.0),
    ("wan22-5b", "5b", 32, 32, 40.0),
    ("wan22-5b", "5b", 32, 128, 40.0),
    ("wan21-14b", "14b", 64, 64, 40.0),
    ("wan21-14b", "14b", 64, 256, 40.0),
    ("wan21-14b", "14b", 64, 64, 2.5),
)
"""Recipe, model, GPUs, samples, GB/s between machines of eight."""
_LAYOUTS = {
    "fused": {role: Team.on(Home("all", 1)) for role in (GENERATOR, TEACHER, FAKE_SCORE)},
    "map": {
        GENERATOR: Team.on(Home("learn", 1)),
        TEACHER: Team.on(Home("learn", 1), Home("score", 1)),
        FAKE_SCORE: Team.on(Home("score", 1)),
    },
    "pools": {role: Team() for role in (GENERATOR, TEACHER, FAKE_SCORE)},
}


def main() -> None:
    """Prints both as JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    found = {
        "cpu_seconds": seconds(turns),
        "passes": iterations(_DEPTHS),
        "passes_at_depth_1": iterations((1,)),
        "planned_s": plans(),
    }
    print(json.dumps(found, indent=1))


def seconds(turns: int) -> dict[str, object]:
    """CPU seconds of a micro-batch both ways, in turns."""
    roles = {walk: _tracker(walk) for walk in ("apart", "joint")}
    spent: dict[str, list[float]] = {walk: [] for walk in roles}
    for turn in range(turns + 1):
        losses = []
        for walk in sorted(roles, reverse=bool(turn % 2)):
            before = time.process_time()
            losses.append(_micro_batch(roles[walk]))
            # The first turn warms both up.
            spent[walk] += [time.process_time() - before] if turn else []
            roles[walk].discard()
        assert losses[0] == losses[1]
    pairs = [joint / apart for joint, apart in zip(spent["joint"], spent["apart"], strict=True)]
    shape = WanShape.from_config(_SIZES)
    costs = PassCosts.of(shape.pass_flops(_LATENTS, _TEXT))
    one = 2 + costs.to_input + costs.to_weights
    return {
        "apart_s": statistics.median(spent["apart"]),
        "joint_s": statistics.median(spent["joint"]),
        "ratio": statistics.median(pairs),
        "ratios": [round(pair, 3) for pair in sorted(pairs)],
        "counted": one / (one + 1),
    }


def iterations(depths: Sequence[int]) -> dict[str, dict[int, list[float]]]:
    """Passes that an iteration takes by layout and micro-batches: apart, joint, at the best depth.

    Micro-batches have one sample, so an iteration of m of them does m times the work.

    Args:
        depths: Micro-batches in flight to choose from.
    """
    work = Workload.of(load_recipe("wan21-1.3b"), "1.3b")
    ways = (work, work.walking(joint=True))
    return {
        name: {m: [_best(way, teams, m, depths) for way in ways] for m in (1, 2, 4, 8, 16)}
        for name, teams in _LAYOUTS.items()
    }


def plans() -> dict[str, dict[str, list[float]]]:
    """Seconds of an iteration by recipe, GPUs and layout: apart, joint."""
    found: dict[str, dict[str, list[float]]] = {}
    for recipe, model, gpus, batch, between in _PLANNED:
        hardware = Hardware(gather_bandwidth_between=1e9 * between)
        settings = [f"batch.size={batch}", "batch.micro_batches=4"]
        work = Workload.of(load_recipe(recipe, settings), model)
        rows = found.setdefault(f"{recipe}, {gpus} GPUs, batch {batch}, {between:g} GB/s", {})
        for way in (work, work.walking(joint=True)):
            for layout in best_layouts(way, modelled(way, hardware), hardware, gpus):
                rows.setdefault(layout.name, []).append(round(layout.iteration_s, 1))
    return found


def _best(
    work: Workload, teams: dict[str, Team], micro_batches: int, depths: Sequence[int]
) -> float:
    own = stage_units(work)
    found: list[float] = []
    for depth in depths:
        calls = order_calls(
            work.program,
            teams,
            micro_batches,
            depth,
            samples_per_micro_batch=1,
            iterations=range(4),
            stage_seconds=own,
        )
        timeline = simulate(calls, Costs(seconds=by_stage(own)), teams)
        found.append(round(timeline.iteration_s, 2))
    return min(found)


def _tracker(walk: str) -> FakeScoreTracker:
    torch.manual_seed(0)
    network = WanVelocity(WanTransformer3DModel(**_SIZES))
    compute = ComputeSettings(checkpointing=True)
    settings = FakeScoreSettings(compute=compute, walk="joint" if walk == "joint" else "apart")
    return FakeScoreTracker(prepare_network(network, compute), SgmdObjective(), settings)


def _micro_batch(role: FakeScoreTracker) -> dict[str, float]:
    random = torch.Generator().manual_seed(1)
    x0, noise, velocity = (torch.randn(2, *_LATENTS, generator=random) for _ in range(3))
    text = torch.randn(2, _TEXT, _TEXT_WIDTH, generator=random)
    key = MicroBatchKey(0, 0)
    query = NoisedBatch(x0, torch.tensor([0.3, 0.7]), noise, text, key)
    signal = role.signal(query, TeacherPrediction(key, velocity), 1.0)
    return {**signal.metrics, **role.track(query, 1.0).metrics}


if __name__ == "__main__":
    main()
