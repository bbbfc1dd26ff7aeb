"""`sgmd doctor --address` on real machines of Ray's, one of them old and one of them bare."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.doctoring.findings import Finding, Status, summarize_machines
from tests.helpers.forked_python import forked_python

ROOT = Path(__file__).parents[3]

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def told() -> dict[str, list]:
    done = subprocess.run(
        [forked_python(), "-m", "tests.pipelines.doctoring.two_machines", sys.executable],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def findings(told) -> list[Finding]:
    return [
        Finding(name, Status(status), found, remedy, machine)
        for name, machine, status, found, remedy in told["rows"]
    ]


def of(findings: list[Finding], name: str) -> list[Finding]:
    return [each for each in findings if each.name.startswith(name)]


def test_a_cluster_that_is_reserved_to_the_last_core_is_examined(findings):
    (cluster,) = of(findings, "Ray at")
    assert cluster.found.startswith("4 machines, 0 of 6 CPUs")
    assert len({each.machine for each in of(findings, "memory")}) == 3


def test_a_machine_that_lacks_a_dependency_is_named_and_costs_no_other_finding(findings):
    (bare,) = of(findings, "probe")
    assert bare.status is Status.MISSING
    assert "no torch here" in bare.found
    assert "install sgmd on it" in bare.remedy
    assert of(findings, "clock") != []
    assert bare.machine not in {each.machine for each in of(findings, "memory")}


def test_another_version_on_one_machine_is_an_error_that_names_it(findings):
    (different,) = of(findings, "version of")
    assert (different.name, different.status) == ("version of ftfy", Status.MISSING)
    assert "0.1 on " in different.found
    assert "pip install" in different.remedy


def test_what_goes_between_machines_is_tried(findings):
    (transfer,) = of(findings, "object transfer")
    (reduction,) = of(findings, "all-reduce")
    assert "MB/s" in transfer.found
    assert reduction.found.startswith("3 ranks, 16.8 MB in ")
    assert "bus" in reduction.found
    assert {transfer.status, reduction.status} == {Status.GOOD}


def test_storage_is_tried_from_each_machine_and_left_clean(told, findings):
    assert len([each for each in of(findings, "storage") if each.status is Status.GOOD]) == 3
    (sharing,) = of(findings, "sharing")
    assert sharing.found == "one folder for 3 machines"
    assert told["left"] == ["bare", "old"]


def test_the_model_is_compared_by_content(findings):
    (model,) = of(findings, "model ")
    assert model.status is Status.GOOD
    assert "the same on 3 machines: transformer " in model.found


def test_for_a_reader_what_machines_have_in_common_is_one_line(findings):
    lines = summarize_machines(findings)
    (codec,) = of(lines, "H.264")
    assert codec.found.endswith("encodes and decodes")
    assert len(lines) < len(findings) / 2
