"""Guidance scaled by one factor a call, where calls have parts of a micro-batch."""

import pytest
import torch

from pipelines.config.recipe import load_recipe
from sgmd_core.velocity import renormalized

SCALAR = "teacher.cfg_norm=scalar"
TWO = ["topology.mode=fused", "topology.fused.ranks=2"]
REPLICAS = ["topology.mode=pools", "topology.teacher.replicas=2"]
BATCH = ["batch={size: 4, micro_batches: 2}"]


def test_one_factor_for_two_samples_is_not_that_of_each():
    """A sample whose guidance lengthens beside one whose guidance shortens."""
    conditional = torch.ones(2, 1, 1, 1, 4)
    guided = torch.tensor([3.0, 0.5]).reshape(2, 1, 1, 1, 1) * conditional
    together = renormalized(guided, conditional, "scalar")
    apart = torch.cat([renormalized(guided[i : i + 1], conditional[:1], "scalar") for i in (0, 1)])
    assert (together - apart).abs().max() > 0.3
    rows = [renormalized(guided[i : i + 1], conditional[:1], "layer_norm") for i in (0, 1)]
    assert torch.equal(renormalized(guided, conditional, "layer_norm"), torch.cat(rows))


@pytest.mark.parametrize(
    ("settings", "is_said"),
    [
        ([SCALAR, *TWO, *BATCH], True),
        ([SCALAR, *REPLICAS, *BATCH], True),
        ([SCALAR, "topology.mode=local", *BATCH], False),
        # A copy of the teacher on each of two pools of one rank: each takes whole micro-batches.
        ([SCALAR, "topology.mode=map", *BATCH], False),
        ([SCALAR, *TWO, *BATCH, "teacher.guidance_scale=1.0"], False),
        (["teacher.cfg_norm=layer_norm", *TWO, *BATCH], False),
    ],
)
def test_a_factor_that_depends_on_the_placement_is_said(
    settings: list[str], is_said: bool, caplog: pytest.LogCaptureFixture
):
    config = load_recipe("tiny", settings)
    assert ("one factor for all samples of a call" in caplog.text) == is_said
    if "topology.mode=map" in settings:
        assert config.teams["teacher"].replicas == 2
