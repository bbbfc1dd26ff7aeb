"""The check of a GPU on a CPU, at sizes that take seconds: each step, and what it counts."""

import json
import subprocess
import warnings
from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipelines.config.recipe import load_recipe
from pipelines.config.roles import ROLES
from pipelines.planning.savings import SAVINGS
from pipelines.planning.stage_times import measured
from pipelines.planning.stage_work import units_by_stage
from pipelines.planning.workload import Workload
from tests.benchmarks.on_gpu import (
    ROOT,
    cases,
    gpu_check,
    memory_settings,
    report,
    role_stages,
    step,
    truths,
)
from tests.helpers.forked_python import forked_python, starting_forks
from workers.network_settings import ComputeSettings

KEYS = {
    "environment": {"card", "driver", "torch", "copy_gb_s", "product_tflops", "to_card_gb_s"},
    "truths": {"truths", "tests"},
    "stages": {"runs", "machine"},
    "iteration": {"iterations", "planned", "against_plan", "num_frames", "did_not_fit"},
    "settings": {"settings", "left_out", "num_frames"},
    "distill": {"seconds_per_iteration", "against_cpu", "sampled", "host"},
    "compiled": {"runs", "machine"},
    "attention": {"backends", "tokens"},
    "ranks": {"errors", "holds", "all_reduce_gb_s", "note"},
}


def check(folder: Path, *arguments: str) -> str:
    """What the command prints; it must not fail, whatever its steps do."""
    command = [forked_python(), "benchmarks/gpu_check.py", "--cpu", "--folder", str(folder)]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all steps have found; those that need the roles in this process, which has them."""
    found = tmp_path_factory.mktemp("gpu-check")
    with starting_forks(), warnings.catch_warnings():
        # As in the processes that steps have to themselves, warnings are not errors.
        warnings.simplefilter("ignore")
        for name in KEYS:
            if name != "environment":
                gpu_check.main(["--cpu", "--folder", str(found), "--step", name])
    check(found, "--only", *KEYS)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", KEYS)
def test_every_step_writes_its_figures(folder, name):
    document = json.loads((folder / f"{name}.json").read_text())
    assert document["status"] == "done", document
    assert document["results"].keys() >= KEYS[name]


@pytest.mark.slow
def test_what_the_steps_find_on_a_cpu_is_right(folder):
    found = json.loads((folder / "gpu.json").read_text())["steps"]
    holding = {name: one["holds"] for name, one in found["truths"]["results"]["truths"].items()}
    assert holding == dict.fromkeys(truths.TRUTHS, True)
    assert found["ranks"]["results"]["holds"]
    assert found["distill"]["results"]["against_cpu"]["all_iterations"] == 0
    assert found["distill"]["results"]["sampled"]["frames"] == [13, 32, 32, 3]
    settings = found["settings"]["results"]["settings"]
    assert not [name for name, row in settings.items() if "failed" in row]
    losses = {name: row.get("losses", {}).get("tracking") for name, row in settings.items()}
    assert losses["ulysses"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["attention _native_math"] == pytest.approx(losses["plain"], rel=1e-3)
    exact = ("checkpointing=offload", memory_settings.SELECTIVE, "optimizer.moments=cpu")
    for name in (*exact, "ema_device=cpu", memory_settings.ONE_WALK):
        assert losses[name] == losses["plain"], name
    assert losses["adapters"] != pytest.approx(losses["plain"], rel=1e-2)
    iterations = found["iteration"]["results"]["iterations"]
    assert all(one["seconds"] > 0 and one["losses"] for one in iterations)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("forked_libraries")
def test_roles_in_actors_of_their_own_make_the_losses_of_one_process(tmp_path):
    gpu_check.main(["--cpu", "--folder", str(tmp_path), "--step", "pools"])
    document = step.read(tmp_path, "pools")
    assert document["status"] == "done", document
    results = document["results"]
    assert results["against_local"] == {"first_iteration": 0, "all_iterations": 0}
    assert results["iterations"] == 2
    assert results["seconds_per_iteration"] > 0
    assert results["local_seconds_per_iteration"] > 0


@pytest.mark.slow
def test_a_plan_reads_what_was_measured(folder):
    stages = json.loads((folder / "stages.json").read_text())["results"]
    (run,) = stages["runs"]
    case = cases.Case("tiny", run["num_frames"], "cpu")
    work = Workload(case.shape, case.latent_shape, case.text_length, batch_size=4)
    times = measured(folder / "gpu.json", work)
    assert "scaled" not in times.source
    assert all(seconds > 0 for seconds in times.seconds.values())


@pytest.mark.slow
def test_the_docs_are_filled_between_their_marks_and_filled_again(folder, tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n\n{report.BEGIN}\n\nNot run yet.\n\n{report.END}\n\nafter\n")
    report.write_docs(folder, page)
    first = page.read_text()
    report.write_docs(folder, page)
    assert page.read_text() == first
    assert first.startswith("before\n")
    assert first.endswith("after\n")
    assert "Not run yet" not in first
    assert "| roles_fp32 | yes |" in first
    assert "| generator.rollout |" in first
    assert "| moments in 8 bits |" in first


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_where_it_was(folder):
    assert "stages: done before" in check(folder, "--only", "stages", "truths")


@pytest.mark.slow
def test_a_failing_step_says_why_and_the_next_one_runs(tmp_path):
    broken = {"status": "done", "results": {"runs": [{"num_frames": "many"}]}}
    step.write(tmp_path, "stages", broken)
    # One that was never tried comes first.
    printed = check(tmp_path, "--only", "attention", "environment", "--again")
    attention = json.loads((tmp_path / "attention.json").read_text())
    assert attention["status"] == "failed"
    assert "TypeError" in attention["why"]
    assert "Traceback" in attention["log"]
    assert json.loads((tmp_path / "environment.json").read_text())["status"] == "done"
    assert "failed TypeError" in printed
    assert "figures that cannot be read" in printed


@pytest.mark.slow
def test_a_step_over_its_time_is_stopped_and_what_is_left_is_skipped(tmp_path):
    check(tmp_path, "--total", "1.5", "--only", "truths", "iteration")
    found = {name: step.read(tmp_path, name) for name in ("truths", "iteration")}
    assert found["truths"]["status"] == "stopped"
    assert "over its" in found["truths"]["why"]
    assert found["iteration"]["status"] == "skipped"
    assert "spent" in found["iteration"]["why"]


@pytest.mark.slow
def test_a_run_on_a_gpu_asks_for_one(tmp_path):
    if cases.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="sees no GPU") as caught:
        gpu_check.main(["--folder", str(tmp_path), "--wheels", str(tmp_path / "wheels")])
    assert "--cpu" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_stages_make_the_operations_that_they_are_credited_with(monkeypatch, checkpointing):
    compute = ComputeSettings(checkpointing=checkpointing)
    case = cases.Case("tiny", 9, "cpu", compute)
    counted: dict[str, list[int]] = {}

    class Counting(role_stages.Turns):
        def timed(self, stage, *, counts):
            counter = FlopCounterMode(display=False)
            own = super().timed(stage, counts=counts)

            class Both:
                def __enter__(self):
                    own.__enter__()
                    counter.__enter__()

                def __exit__(self, *error):
                    counter.__exit__(*error)
                    if counts:
                        counted.setdefault(stage, []).append(counter.get_total_flops())
                    return own.__exit__(*error)

            return Both()

    monkeypatch.setattr(role_stages, "Turns", Counting)
    needed = role_stages.needed_flops(case)
    passes = role_stages.passes_of(case)
    with sdpa_kernel(SDPBackend.MATH):
        for role, measure in role_stages.ROLES.items():
            counted.clear()
            measure(case, 1)
            for stage, flops in counted.items():
                name = f"{role}.{stage}"
                if stage == "step":
                    continue
                mean = sum(flops) / len(flops)
                if not checkpointing:
                    assert mean == needed[name], name
                # Passes are how a plan counts; attention's share makes them inexact.
                assert mean / case.flops.forward == pytest.approx(passes[name], rel=0.12), name


def test_passes_are_those_of_a_plan():
    case = cases.Case("tiny", 9, "cpu")
    work = Workload(
        case.shape, case.latent_shape, case.text_length, batch_size=1,
        checkpointing=frozenset(ROLES),
    )  # fmt: skip
    assert role_stages.passes_of(case) == {
        ".".join(name): passes for name, passes in units_by_stage(work).items()
    }


@pytest.mark.slow
def test_a_truth_sees_a_difference_a_nan_and_a_failure():
    first, second = (truths.Roles("cpu").gather(exit_step=exit_step) for exit_step in (1, 2))
    errors = truths.relative_errors(first, second)
    assert min(errors.values()) > 100 * truths.TRUTHS["roles_fp32"].bound
    nan = {"x": cases.torch.tensor([float("nan")])}
    lost = truths.Truth(1.0, lambda _: truths.relative_errors(nan, {"x": cases.torch.ones(1)}))
    assert not lost.hold("cpu")["holds"]
    assert "ZeroDivisionError" in truths.Truth(1.0, lambda _: {"x": 1 / 0}).hold("cpu")["failed"]


def test_every_saving_that_a_plan_proposes_is_measured_unless_the_recipe_has_it():
    measured = memory_settings.settings_of(cases.Case("tiny", 5, "cpu"))
    plain = load_recipe("wan21-1.3b")
    for saving in SAVINGS:
        if all(setting.startswith("discriminator.") for setting in saving.settings):
            continue  # The recipe's method has none.
        has = load_recipe("wan21-1.3b", saving.settings) == plain
        assert (memory_settings.name_of(saving) in measured) != has, saving.settings
    others = {memory_settings.SELECTIVE, memory_settings.ONE_WALK, "moments in 8 bits", "adapters"}
    assert {"plain", *others} < {*measured}


def test_utilisation_is_told_against_its_goal(tmp_path):
    stages = {
        "generator.rollout": {"seconds_per_sample": 3.0, "mfu": 0.5, "peak_gb": 1.0},
        "generator.step": {"seconds_per_sample": 1.0, "peak_gb": 1.0},
    }
    run = {"num_frames": 81, "latent_shape": [], "settings": {}, "stages": stages}
    for seconds, told in ((1.0, "38% (goal 40%, not met)"), (0.5, "43% (goal 40%, met)")):
        stages["generator.step"]["seconds_per_sample"] = seconds
        step.write(tmp_path, "stages", {"status": "done", "results": {"runs": [run]}})
        assert f"MFU of all stages {told}" in report.table(tmp_path)
    del stages["generator.rollout"]["mfu"]
    step.write(tmp_path, "stages", {"status": "done", "results": {"runs": [run]}})
    assert "not known: no rate of the card (goal 40%)" in report.table(tmp_path)


@pytest.mark.slow
def test_settings_for_which_no_time_is_left_are_named(tmp_path):
    context = step.Context("settings", tmp_path, "cpu", small=True, model="tiny")
    memory_settings.measure(context, cases.Case("tiny", 5, "cpu"), 0.0)
    assert context.results["settings"] == {}
    assert {"plain", "ulysses", "text encoder"} <= {*context.results["left_out"]}
    assert "no time was left for: plain" in report.table(tmp_path)


def test_a_case_knows_its_operations():
    case = cases.Case("1.3b", 81, "cpu")
    assert case.latent_shape == (16, 21, 60, 104)
    assert case.flops.forward == pytest.approx(283e12, rel=0.01)
