"""The GPU benchmark on a CPU, at a size that takes seconds: what it counts is what it runs."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipelines.config.roles import ROLES
from pipelines.planning.stage_times import measured
from pipelines.planning.workload import Workload

ROOT = Path(__file__).parents[2]
TINY = ((4, 3, 8, 8), 16)


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["gpu"] = module
    spec.loader.exec_module(module)
    return module


def test_it_writes_every_stage_and_a_plan_reads_it(gpu, tmp_path):
    gpu.main(["--tiny", "--repeats", "1", "--output", str(tmp_path / "gpu.json")])
    document = json.loads((tmp_path / "gpu.json").read_text())
    (run,) = document["runs"]
    assert {f"{role}.step" for role in ("generator", "fake_score")} < set(run["stages"])
    assert all(stage["seconds_per_sample"] > 0 for stage in run["stages"].values())
    work = Workload(gpu.SHAPES["tiny"], *TINY, batch_size=4)
    times = measured(tmp_path / "gpu.json", work)
    for name, seconds in times.seconds.items():
        assert seconds == pytest.approx(run["stages"][".".join(name)]["seconds_per_sample"])
    assert "scaled" not in times.source


@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_are_those_that_the_stages_make(gpu, checkpointing):
    case = gpu.Case("tiny", *TINY, checkpointing=checkpointing, compile=False, device="cpu")
    counted: dict[str, list[int]] = {}

    class Counting(gpu._Turns):
        def timed(self, stage, *, counts):
            counter = FlopCounterMode(display=False)
            own = super().timed(stage, counts=counts)

            class Both:
                def __enter__(self):
                    own.__enter__()
                    counter.__enter__()

                def __exit__(self, *error):
                    counter.__exit__(*error)
                    counted.setdefault(stage, []).append(counter.get_total_flops())
                    return own.__exit__(*error)

            return Both()

    plain, gpu._Turns = gpu._Turns, Counting
    try:
        with sdpa_kernel(SDPBackend.MATH):
            for role, measure in gpu.ROLES.items():
                counted.clear()
                measure(case, 0)
                for stage, flops in counted.items():
                    if stage == "step":
                        continue
                    computed, _ = gpu.passes_of(case)[f"{role}.{stage}"]
                    mean = sum(flops) / len(flops) / case.forward_flops
                    # Weights at both ends are made again by nobody; inputs need no gradient.
                    assert mean == pytest.approx(computed, rel=0.06), (role, stage)
    finally:
        gpu._Turns = plain
    again = frozenset(ROLES if checkpointing else ())
    work = Workload(case.shape, *TINY, batch_size=1, checkpointing=again)
    expected = {".".join(name): passes for name, passes in work.passes.items()}
    assert {name: computed for name, (computed, _) in gpu.passes_of(case).items()} == expected


def test_without_a_gpu_it_says_what_to_do(gpu):
    if gpu.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="--tiny"):
        gpu.main([])


def test_a_case_knows_its_operations(gpu):
    case = gpu.Case("1.3b", (16, 21, 60, 104), 512, True, False, "cpu")
    assert case.forward_flops == pytest.approx(283e12, rel=0.01)
    shorter = replace(case, latent_shape=gpu._latent_shape(17))
    assert shorter.latent_shape == (16, 5, 60, 104)
