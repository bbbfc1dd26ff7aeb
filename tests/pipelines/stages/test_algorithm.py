"""An iteration as data: the program that a reader sees, and the passes that are counted for it."""

import inspect
import textwrap

import pytest

from cluster.schedule.program import Pass
from pipelines.config.recipe import load_recipe
from pipelines.stages import algorithm
from pipelines.stages.algorithm import STAGES, START, iteration_program, needs_data
from pipelines.stages.costs import stage_passes
from pipelines.stages.kind import IterationKind
from sgmd_core.objectives import ComparedStates, GradientPath

KINDS = [
    IterationKind(),
    IterationKind(3, mixes_weights=True),
    IterationKind(path=GradientPath.BOTH_SCORES, diversity=True),
    IterationKind(joint=True),
    IterationKind(compared=ComparedStates.STEPS),
    IterationKind(2, compared=ComparedStates.DATA),
    IterationKind(1, consistency=True),
    IterationKind(1, consistency=True, matching=False),
    IterationKind(1, flow=True, matching=False),
]


def test_the_program_that_a_reader_sees_is_that_of_algorithm_1():
    text = inspect.cleandoc(str(iteration_program.__doc__))
    shown = textwrap.dedent(text.partition("the default:\n\n")[2])
    assert "SIGNAL.step(ROLLOUT, DENOISE" in shown
    assert eval(shown.strip(), dict(vars(algorithm))) == iteration_program()
    recipe = IterationKind.of(load_recipe("tiny"))
    assert iteration_program(recipe) == iteration_program()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_passes_are_counted_of_the_stages_that_an_iteration_has_and_of_no_others(kind):
    stages = {
        STAGES[stage.role, stage.name]
        for part in iteration_program(kind)
        if isinstance(part, Pass)
        for stage in part.stages
    }
    counted = stage_passes(
        kind, rollout=2.5, sample=2.5, guided=True, anchor_steps=int(kind.diversity)
    )
    # Where a diversity loss begins no network is asked.
    assert stages - {START} == set(counted)
    assert needs_data(kind) == any(stage.needs_data for stage in stages)
