"""Listed steps whose ends are not pure noise and data."""

from collections.abc import Iterator

from sgmd_core.schedule import NUM_SCORE_LEVELS, FlowMatchSchedule


def odd_ends(schedule: FlowMatchSchedule) -> Iterator[str]:
    """Returns a sentence for each end of `schedule.steps` that is allowed and seldom meant.

    Args:
        schedule: Section `schedule`.
    """
    steps = schedule.steps
    if steps is None:
        return
    if steps[0] < NUM_SCORE_LEVELS:
        missing = 1 - float(schedule.generator_grid(len(steps))[0])
        yield (
            f"schedule.steps start at {steps[0]}: pure noise is taken for a state with "
            f"{missing:.2g} of the data in it; 1000 is pure noise"
        )
    if steps[-1] == 0:
        yield (
            "schedule.steps end at 0: that step goes nowhere, and samples that leave there teach "
            "the generator nothing; leave it out, the end at 0 is added"
        )
