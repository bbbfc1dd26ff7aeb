"""A short storm: three kinds of faults over one run, which nobody looks after.

The whole one is `benchmarks/chaos.py`.
"""

import json

import pytest

from pipelines.data.stream.plan import Cursor
from tests.benchmarks.storm import chaos, order_faults

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# The server is busy last: a driver that starts meanwhile ends with its refusal.
FAULTS = {2: "kill generator", 4: "driver", 8: "server busy"}


def test_a_run_goes_through_a_storm_to_the_bits_of_a_calm_one(tmp_path):
    # The calm one in a single process, whose bits are those of pools.
    found = chaos.measure(FAULTS, 0, tmp_path, ["topology.mode=local"])["results"]
    storm = found["storms"]["pools"]
    assert found["problems"] == storm["missed"] == []
    assert storm["faults"] == len(FAULTS)
    assert storm["differences"] == []
    assert storm["samples"] == {"used": 4 * storm["iterations"], "lost": 0, "repeated": 0}
    assert storm["ends"] == ["driver"]
    assert storm["seconds_lost"].keys() == set(FAULTS.values())
    assert storm["events"]["recovered"] == storm["events"]["worker_died"] == 1
    assert found["requests_refused"] > 0


def test_a_difference_would_be_found(tmp_path):
    """Compares runs of which one has used a sample twice and lost another."""
    runs = [chaos.StormyRun(str(tmp_path / name), name, 2, {}) for name in ("calm", "stormy")]
    for run, second in zip(runs, ("b", "a"), strict=True):
        folder = run.run_folder
        folder.ledger.mkdir(parents=True)
        line = {"epochs": [[0, 1]], "cursor": Cursor().to_json()}
        lines = [line | {"iteration": n, "ids": [name]} for n, name in enumerate(["a", second])]
        text = "".join(json.dumps(each) + "\n" for each in lines)
        (folder.ledger / "000000000.jsonl").write_text(text)
    assert chaos.samples(runs[1], runs[0]) == {"used": 2, "lost": 1, "repeated": 1}


def test_each_kind_comes_as_often_as_any_other():
    kinds = list(order_faults(30, 7).values())
    assert all(kinds.count(kind) == 2 for kind in kinds)
    assert order_faults(30, 7) == order_faults(30, 7) != order_faults(30, 8)
