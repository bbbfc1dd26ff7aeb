"""Score levels of TMD under which its samples were seen to collapse."""

import pytest

from pipelines.config.recipe import load_recipe


@pytest.mark.parametrize(
    ("settings", "is_said"),
    [
        (["schedule.score_shift=1.0"], True),
        (["schedule.shift=1.0"], True),
        (["schedule.shift=1.0", "schedule.score_shift=5.0"], False),
        ([], False),
        (["schedule.score_shift=1.0", "objective.stage=meanflow"], False),
        (["schedule.score_shift=1.0", "objective={method: dmd2}"], False),
    ],
)
def test_levels_that_are_not_shifted_are_said(
    settings: list[str], is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    load_recipe("tiny-tmd", settings)
    assert ("collapse to one composition" in caplog.text) == is_said
