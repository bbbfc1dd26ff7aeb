"""Growth of what a process takes, told from levels, and what a storm's table says."""

import random

import pytest

from tests.benchmarks.storm import StormyRun, chaos_page, soak


def points(first: int, level: float, per_1000: float, noise: float = 0.0) -> list:
    drawn = random.Random(first)
    iterations = range(first, first + 500, 10)
    return [(at, level + per_1000 * at / 1000 + drawn.gauss(0, noise)) for at in iterations]


def test_growth_is_the_slope_within_processes_not_between_them():
    processes = {1: points(0, 100.0, 8.0), 2: points(500, 300.0, 8.0), 3: points(1000, 50.0, 8.0)}
    grown = soak.growth(processes, warm_up=100, shortest=300)
    assert grown["per_1000"] == pytest.approx(8.0)
    assert grown["error"] == pytest.approx(0.0, abs=1e-6)
    assert grown["iterations"] == 3 * 390


def test_what_a_process_takes_at_its_start_is_no_growth():
    steep = [(at, float(at)) for at in range(0, 100, 10)]
    flat = [(at, 100.0) for at in range(100, 500, 10)]
    assert soak.growth({1: steep + flat}, 100, 300)["per_1000"] == pytest.approx(0.0)
    assert soak.growth({1: steep + flat}, 0, 300)["per_1000"] > 50


def test_the_error_tells_noise_from_growth():
    grown = soak.growth({1: points(0, 100.0, 0.0, noise=5.0)}, 0, 300)
    assert 0 < abs(grown["per_1000"]) < 4 * grown["error"]


def test_a_short_soak_is_not_called_flat():
    assert soak.growth({1: points(0, 1.0, 0.0)}, 300, 300) is None
    assert not soak.judge([], 100, 300)["flat"]


def sample(iteration: int, memory: float) -> dict:
    taken = {"pid": 7, "memory_mb": memory, "pss_mb": 1.0, "descriptors": 9, "threads": 3}
    alone = {"processes": 4, "store_mb": 1.0, "objects": 2}
    return {"iteration": iteration, "parts": {"feed": taken}, **alone}


def test_a_soak_that_broke_is_judged_by_what_it_has_left(tmp_path):
    run = StormyRun(str(tmp_path), "soak", 1000, {})
    lines = [soak.json.dumps(sample(at, 100 + at)) + "\n" for at in range(0, 900, 10)]
    (tmp_path / "samples.jsonl").write_text("".join(lines) + '{"iteration": 9')
    found = soak.evaluate(run, warm_up=100, shortest=300)
    assert found["samples"] == 90
    assert found["grows"] == ["feed: memory_mb"]
    assert not found["flat"]


def test_a_soak_tells_the_faults_that_were_due_and_have_not_struck(tmp_path):
    run = StormyRun(
        str(tmp_path), "soak", 1000, {1: "kill feed", 2: "kill teacher", 9: "kill feed"}
    )
    (tmp_path / "storm.jsonl").write_text('{"iteration": 1, "kind": "kill feed", "time": 1.0}\n')
    run.run_folder.root.mkdir(parents=True)
    line = {"seconds": {"total": 1.0}, "losses": {}, "data_wait_s": 0.0, "samples_seen": 4}
    metrics = [soak.json.dumps({"iteration": at} | line) + "\n" for at in range(5)]
    run.run_folder.metrics.write_text("".join(metrics))
    found = soak.evaluate(run, warm_up=100, shortest=300)
    assert found["missed"] == ["kill teacher (iteration 2)"]


def test_the_table_of_a_storm_has_a_row_a_kind_the_dearest_first():
    storms = {
        "pools": {"seconds_lost": {"driver": [20.0, 30.0], "kill feed": [2.0]}},
        "machines": {"seconds_lost": {"machine": [25.5]}},
    }
    lost = chaos_page.lost_by_kind({"results": {"storms": storms}})
    rows = chaos_page.table(lost).splitlines()
    assert rows[2] == "| machine | 1 | 25.5 | 25.5 |"
    assert rows[3] == "| driver | 2 | 25.0 | 30.0 |"
    assert rows[4] == "| kill feed | 1 | 2.0 | 2.0 |"
    assert chaos_page.draw(lost).count("<circle") == 4
