"""Settings that are taken as they are, and of which a sentence warns: they are seldom meant."""

from collections.abc import Iterator

from cluster.schedule.program import Team
from sgmd_core.objectives.meanflow import flow_of
from sgmd_core.schedule import NUM_SCORE_LEVELS, FlowMatchSchedule
from workers.settings import TeacherSettings


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


def unlearned_guidance(
    objective: object, negative_prompt: str, prompt_dropout: float
) -> Iterator[str]:
    """Returns a sentence where strides are guided away from a caption that is not trained.

    Args:
        objective: Section `objective`.
        negative_prompt: `model.negative_prompt`, under which the head is asked once more.
        prompt_dropout: `data.prompt_dropout`: share of captions replaced by the empty one.
    """
    term = flow_of(objective)
    if term is None or term.guidance == 1 or (prompt_dropout and not negative_prompt):
        return
    why = (
        "model.negative_prompt, and data.prompt_dropout trains the empty prompt in its place"
        if negative_prompt
        else "the empty prompt, which the flow head learns by data.prompt_dropout alone"
    )
    yield (
        f"objective.meanflow.guidance {term.guidance:g} guides strides away from {why}: the head "
        "is asked what this stage never trains. Published are model.negative_prompt='' and "
        "data.prompt_dropout=0.1 in this stage"
    )


def split_factors(teacher: TeacherSettings, team: Team) -> Iterator[str]:
    """Returns a sentence where the teacher's processes have a factor each in one micro-batch.

    Args:
        teacher: Section `teacher`.
        team: Its processes. Of replicas on pools of other roles one takes a whole micro-batch;
            others share its samples.
    """
    parts = team.rank_groups if team.homes else team.rank_groups * team.replicas
    if teacher.cfg_norm != "scalar" or teacher.guidance_scale == 1:
        return
    if parts > 1:
        yield (
            "teacher.cfg_norm scalar has one factor for all samples of a call, and the samples of "
            f"a micro-batch are shared out among {parts} parts of the teacher: the numbers are "
            "not those of topology.mode=local, nor of another placement; give the teacher one rank "
            "and one replica, or set teacher.cfg_norm=layer_norm"
        )
