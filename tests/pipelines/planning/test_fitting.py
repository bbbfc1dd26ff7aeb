"""The settings with which a run that fits is fastest."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.planning.fitting import fastest_fit
from pipelines.planning.hardware import Hardware
from pipelines.planning.plan import best_layouts, make_plan
from pipelines.planning.request import Request, answer
from pipelines.planning.savings import all_savings, fitting_savings
from pipelines.planning.stage_times import StageTimes, modelled, rescaled
from pipelines.planning.workload import Workload
from sgmd_core.errors import ConfigError

AS_FAST = 1.02
"""Layouts and settings within half a percent of the fastest are taken for equal, twice."""
ADAPTED = ("wan21-1.3b-lora", ("batch.size=8", "batch.micro_batches=8"), "14b")
WHOLE = ("wan21-1.3b", ("batch.size=8", "batch.micro_batches=8"), "1.3b")


def workload(recipe: str, options: tuple[str, ...], model: str) -> Workload:
    return Workload.of(load_recipe(recipe, list(options)), model)


def fitted_s(work: Workload, hardware: Hardware, num_gpus: int) -> float:
    """Seconds of the plan with the settings that are found; infinite where nothing fits."""
    found = fastest_fit(work, partial(modelled, hardware=hardware), hardware, num_gpus)
    if found is None:
        return float("inf")
    times = modelled(found.work, hardware)
    return make_plan(found.work, times, hardware, num_gpus).best.iteration_s


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "gpus", "memory"), [(WHOLE, 4, 24), (ADAPTED, 4, 80)])
def test_no_combination_of_savings_is_faster_than_the_one_that_is_taken(asked, gpus, memory):
    work, hardware = workload(*asked), Hardware(memory_gb=memory)
    seconds: list[float] = []
    for saved in all_savings(work):
        best = best_layouts(saved.work, modelled(saved.work, hardware), hardware, gpus)[0]
        seconds += [best.iteration_s] if best.fits else []
    found = fitted_s(work, hardware, gpus)
    assert min(seconds) <= found < AS_FAST * min(seconds)
    # The first settings that fit are slower by much more than that.
    first, _ = fitting_savings(work, hardware, gpus) or (work, ())
    slow = make_plan(first, modelled(first, hardware), hardware, gpus).best.iteration_s
    assert slow > 1.2 * found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "gpus", "memory"),
    [(WHOLE, (1, 2, 4, 8), (24, 48, 80)), (ADAPTED, (1, 2, 4), (48, 80, 160))],
)
def test_more_gpus_or_more_memory_never_make_a_fitted_plan_slower(asked, gpus, memory):
    work = workload(*asked)
    table = [[fitted_s(work, Hardware(memory_gb=gb), number) for gb in memory] for number in gpus]
    for line in (*table, *zip(*table, strict=True)):
        for fewer, more in pairwise(line):
            assert more <= AS_FAST * fewer, table
    assert table[0][0] == float("inf") > table[-1][-1]


@pytest.mark.slow
def test_a_plan_is_changed_on_request_alone_and_says_what_that_would_gain():
    asked = Request("wan21-1.3b", ["validation.every=0"], 7, 24, model="1.3b")
    as_it_is, fitted = answer(asked), answer(replace(asked, fit=True))
    assert fitted.plan.memory_settings
    assert fitted.plan.best.iteration_s < 0.8 * as_it_is.plan.best.iteration_s
    (line,) = (line for line in as_it_is.advice if "(--fit)" in line)
    assert all(setting in line for setting in fitted.plan.memory_settings)
    assert f"{fitted.plan.best.iteration_s:.4g} s" in line
    assert not any("(--fit)" in line for line in fitted.advice)


def test_measured_times_follow_the_settings_by_operations_and_bytes():
    hardware = Hardware()
    before = workload("wan21-1.3b", ("generator.compute.checkpointing=false",), "1.3b")
    after = workload("wan21-1.3b", ("generator.compute.checkpointing=offload",), "1.3b")
    measured = StageTimes({k: 2 * v for k, v in modelled(before, hardware).seconds.items()}, "")
    half = replace(hardware, flops=hardware.flops / 2)
    found, expected = rescaled(measured, before, after, hardware), modelled(after, half)
    assert found.seconds == pytest.approx(expected.seconds)
    assert max(found.seconds[name] / measured.seconds[name] for name in found.seconds) > 1.2


def test_one_gpu_of_24_gb_trains_adapters_without_validations_as_the_refusal_says():
    asked = Request("wan21-1.3b-lora", [], 1, 24, model="1.3b")
    with pytest.raises(ConfigError, match=r"Set validation.every=0, and `sgmd evaluate RUN`") as no:
        answer(asked)
    assert "topology.validator.gpus=0" not in str(no.value)
    assert "or give --gpus 2" in str(no.value)
    plan = answer(replace(asked, overrides=["validation.every=0"])).plan
    assert plan.best.name == "fused"
    assert plan.best.pools["fused"].memory.total < Hardware(memory_gb=24).usable_bytes
