"""Comparison of machines, without a cluster."""

import pytest

from pipelines.doctoring.comparison import (
    ClockReading,
    compare_models,
    compare_versions,
    judge_clock,
    judge_gpus,
    judge_reduction,
    judge_sharing,
    judge_store,
)
from pipelines.doctoring.findings import GIB, Finding, Status, summarize_machines


def test_equal_versions_are_one_finding():
    (found,) = compare_versions({"a": {"ray": "2.60"}, "b": {"ray": "2.60"}})
    assert (found.status, found.found) == (Status.GOOD, "1 versions are the same on 2 machines")


@pytest.mark.parametrize(
    ("one", "other", "status"),
    [
        ("2.60.0", "2.59.0", Status.MISSING),
        ("2.13.0+cpu", "2.13.0+cu130", Status.LIMITED),
        ("2.13.0", "not there", Status.MISSING),
    ],
)
def test_different_versions_are_errors_and_different_builds_are_not(one, other, status):
    (found,) = compare_versions({"a": {"torch": one}, "b": {"torch": other}})
    assert found.status is status
    assert found.found == f"{one} on a; {other} on b"


def test_sources_that_differ_have_a_remedy_of_their_own():
    (found,) = compare_versions({"a": {"sgmd sources": "x1"}, "b": {"sgmd sources": "x2"}})
    assert "source tree" in found.remedy


def test_a_model_that_differs_is_told_by_the_component():
    contents = {"a": {"vae": "1", "text": "2"}, "b": {"vae": "1", "text": "3"}}
    found = compare_models("/m", contents)
    assert (found.status, found.found) == (Status.MISSING, "text differs: 2 on a, 3 on b")
    assert compare_models("/m", {"a": {"vae": "1"}, "b": {}}).status is Status.MISSING


@pytest.mark.parametrize(
    ("offset_s", "error_s", "status"),
    [
        (0.5, 0.0, Status.GOOD),
        (-2.0, 0.1, Status.LIMITED),
        (2.0, 1.5, Status.GOOD),  # A slow answer tells little.
        (600.0, 0.1, Status.MISSING),
    ],
)
def test_a_clock_is_judged_within_the_error_of_its_reading(offset_s, error_s, status):
    assert judge_clock("a", ClockReading(offset_s, error_s)).status is status


@pytest.mark.parametrize(
    ("ray", "torch", "status"),
    [(8.0, 8, Status.GOOD), (8.0, 0, Status.MISSING), (0.0, 8, Status.LIMITED)],
)
def test_gpus_that_ray_or_torch_does_not_see_are_told(ray, torch, status):
    assert judge_gpus("a", ray, torch).status is status


def test_a_store_outside_of_shared_memory_is_slow():
    assert judge_store("a", 2 * GIB, 4 * GIB).status is Status.GOOD
    assert judge_store("a", 2 * GIB, GIB).status is Status.LIMITED


def test_a_folder_that_one_machine_does_not_share_is_an_error():
    found = judge_sharing("/runs", {"a": True, "b": False})
    assert (found.status, found.found) == (
        Status.MISSING,
        "b has another folder of that name than a",
    )


def test_the_bandwidth_of_an_all_reduce_is_that_of_the_slowest_rank():
    found = judge_reduction("NCCL", 4, 10**9, [0.5, 1.0], is_right=True)
    assert "1 GB/s, bus 1.5 GB/s" in found.found
    assert judge_reduction("NCCL", 4, 10**9, [1.0], is_right=False).status is Status.MISSING


def test_machines_with_different_figures_stand_in_one_line():
    findings = [Finding("disk", Status.GOOD, f"{n} free", machine=f"m{n}") for n in range(6)]
    findings.append(Finding("disk", Status.LIMITED, "0 free", "clear it", "m6"))
    good, limited = summarize_machines(findings)
    assert good.found == "m0: 0 free; m1: 1 free; m2: 2 free; m3: 3 free; and 2 more"
    assert limited.found == "m6: 0 free"
