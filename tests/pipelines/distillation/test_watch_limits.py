"""The watch ends what is stuck before the controller gives up."""

from dataclasses import replace

import pytest

pytest.importorskip("ray")

from cluster.ray.progress import ProgressReport
from pipelines.config.topology import TopologySettings
from pipelines.distillation.watch import watch_limits

FIRST = ProgressReport(
    1, 7, 9, "node", "host", "", "", 3, "S", 0, 2**30, {}, "generator", "learn", iteration=0
)


def test_whatever_is_stuck_is_ended_before_the_controller_gives_up():
    settings = TopologySettings(watch_s=20.0, call_timeout_s=600.0, start_timeout_s=300.0)
    limits = watch_limits(settings, 7200.0)
    assert limits.watch_s == settings.watch_s
    assert limits.of(FIRST) < settings.call_timeout_s
    assert limits.of(FIRST) == pytest.approx(480.0)
    # Five times the median would be far more.
    assert limits.of(replace(FIRST, num_earlier=9, usual_s=300.0)) == limits.of(FIRST)
    building = replace(FIRST, method="build", iteration=None)
    assert limits.of(building) == pytest.approx(240.0)
