"""Pools on a cluster of two machines: pinned by label and resource, spread, refused, given back."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.forked_python import forked_python

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [forked_python(), "-m", "tests.cluster.two_machines"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_labels_resources_and_strategies_decide_where_ranks_are(found):
    places = found["places"]
    assert places["labelled"] == ["right"]
    assert places["not labelled"] == ["left"]
    assert places["fast"] == ["right"]
    assert len(set(places["together"])) == 1
    assert sorted(places["apart"]) == ["left", "right"]


def test_raylets_of_one_host_are_looked_at_each_by_its_own_name(found):
    names = found["capacities"]
    assert len(set(names)) == 2
    assert len({name.partition("#")[0] for name in names}) == 1


def test_a_refusal_names_the_rank_and_what_it_misses(found):
    told = found["refusals"]
    assert "lost[0] asks for 0.5 CPU where side=middle no machine has the labels" in told["labels"]
    assert "greedy[0] asks for 0.5 CPU, 1 fast fits on" in told["resources"]
    assert "greedy[1] asks for 0.5 CPU, 1 fast lacks 1 fast on" in told["resources"]
    assert "apart[2] asks for 0.5 CPU no further machine for its strategy" in told["strategy"]
    assert all("fits[0] asks for 0.5 CPU fits on" in words for words in told.values())


def test_nothing_stays_reserved_whatever_way_a_run_ends(found):
    assert found["free after use"]
    assert found["free after refusals"]
    assert found["killed rank"] == "WorkerDiedError"
    assert found["free after a killed rank"]
    assert found["free after a killed run"]


def test_no_report_outlives_a_killed_run(found):
    assert found["reports of a run"] >= 2
    assert found["reports after a killed run"] == []


def test_a_partner_that_dies_on_another_machine_is_named(found):
    killed = found["killed partner"]
    assert (killed["is far"], killed["pid"]) == (True, True)
    assert "it ended without a word" in killed["cause"]


def test_a_killed_raylet_is_a_lost_machine_and_no_death_of_its_ranks(found):
    killed = found["killed raylet"]
    assert killed["lost"] == [["judge", 0], ["painter", 0]]
    assert "its raylet has ended" in killed["cause"]


def test_a_frozen_raylet_is_a_lost_machine_with_all_that_was_on_it(found):
    frozen = found["frozen raylets"]
    assert frozen["other"]["lost"] == [["judge", 0], ["painter", 0]]
    assert frozen["own"]["lost"] == [["teacher", 0]]
    assert frozen["events"] == [["judge rank 0", "painter rank 0"], ["teacher rank 0"]]
    # Ray alone takes a minute for the other one, and never comes back from the own one.
    for each in ("other", "own"):
        assert "its raylet was frozen (stopped) for" in frozen[each]["cause"]
