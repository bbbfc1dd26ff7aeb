"""A run's figures on Ray's Prometheus endpoint, scraped as Prometheus does it."""

import json
import re
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import ray

from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.ray_metrics import FIGURES, RayMetrics
from pipelines.run.records import RunEvent
from tests.e2e.conftest import MakeRecipe

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 60.0


def scraped(run: str, name: str, value: float, label: str = "") -> dict[tuple[str, str], float]:
    """Values of a run by (name, own label), once a figure has the expected value.

    Ray exports every 10 s, so an earlier answer may be of an earlier moment. After `WAIT_S` the
    latest answer is returned as it is, for the caller's comparisons to say what it lacks.

    Args:
        run: Name of the run.
        name: Of the figure, on the endpoint; the one that the run sets last of those compared.
        value: Expected of it.
        label: Its own label.
    """
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    own = {figure.endpoint_name: figure.label for figure in FIGURES}
    deadline_s = time.monotonic() + WAIT_S
    while True:
        found: dict[tuple[str, str], float] = {}
        for line in urlopen(url, timeout=10).read().decode().splitlines():
            found_name, _, rest = line.partition("{")
            labels = dict(re.findall(r'(\w+)="([^"]*)"', rest))
            if found_name in own and labels.get("run") == run:
                key = (found_name, labels.get(own[found_name], ""))
                found[key] = float(rest.rpartition(" ")[2])
        if found.get((name, label)) == value or time.monotonic() > deadline_s:
            return found
        time.sleep(0.5)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_exports_the_figures_of_its_records(
    make_recipe: MakeRecipe, ray_cluster: None
) -> None:
    lag = "lag={every: 1, updates: 1, batches: 1, rates: [1.0]}"
    config = make_recipe("name=scraped", "iterations=2", "topology.mode=pools", lag)
    distill(config)
    line = read_jsonl(RunFolder(config.run_folder).metrics)[-1]
    found = scraped("scraped", "ray_sgmd_samples_total", 8)
    assert found["ray_sgmd_iteration", ""] == 2
    assert found["ray_sgmd_samples_total", ""] == line["samples_seen"] == 8
    assert found["ray_sgmd_iteration_seconds", ""] == pytest.approx(line["seconds"]["total"])
    for name, value in line["losses"].items():
        assert found["ray_sgmd_loss", name] == pytest.approx(value)
    for role, value in line["grad_norms"].items():
        assert found["ray_sgmd_gradient_norm", role] == pytest.approx(value)
    assert found["ray_sgmd_lag", "tracking_lag"] == pytest.approx(line["lag"]["tracking_lag"])
    rollout_s = line["seconds"]["generator.rollout"]
    assert found["ray_sgmd_stage_seconds", "generator.rollout"] == pytest.approx(rollout_s)
    assert found["ray_sgmd_busy_ranks", "generator"] > 0


@pytest.mark.ray
def test_failures_are_counted_by_kind_and_their_seconds_added_up(ray_cluster: None) -> None:
    metrics = RayMetrics("failing")
    for kind, lost_s in (("worker_died", None), ("recovered", 1.5), ("recovered", 2.0)):
        metrics.event(RunEvent(kind=kind, cause="", lost_s=lost_s))  # type: ignore[arg-type]
    found = scraped("failing", "ray_sgmd_lost_seconds_total", 3.5)
    assert found == {
        ("ray_sgmd_events_total", "worker_died"): 1,
        ("ray_sgmd_events_total", "recovered"): 2,
        ("ray_sgmd_lost_seconds_total", ""): 3.5,
    }


def test_the_dashboard_shows_every_figure_once() -> None:
    page = json.loads((ROOT / "docs" / "grafana.json").read_text())
    shown = " ".join(panel["targets"][0]["expr"] for panel in page["panels"])
    assert [shown.count(figure.endpoint_name + "{") for figure in FIGURES] == [1] * len(FIGURES)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in page["panels"]]
    assert len(set(places)) == len(places)
