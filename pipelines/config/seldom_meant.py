"""Settings that are taken as they are, and of which a sentence warns: they are seldom meant."""

from collections.abc import Iterator

from cluster.schedule.program import Team
from sgmd_core.objectives.meanflow import flow_of
from sgmd_core.objectives.phased import PhasedObjective
from sgmd_core.objectives.tmd import TmdObjective
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


def collapsing_levels(objective: object, schedule: FlowMatchSchedule) -> Iterator[str]:
    """Returns a sentence where the score levels are those of samples that collapsed.

    Args:
        objective: Section `objective`.
        schedule: Section `schedule`.
    """
    if not isinstance(objective, TmdObjective) or not objective.matches:
        return
    shift = schedule.shift if schedule.score_shift is None else schedule.score_shift
    if shift <= 1:
        yield (
            f"schedule.score_shift {shift:g} looks at all noise levels alike: in the paper of tmd "
            "samples then collapse to one composition, which its quality score does not show; the "
            "paper has 5. Watch diversity_ratio"
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
    parts = team.parties if team.homes else team.parties * team.replicas
    if teacher.cfg_norm != "scalar" or teacher.guidance_scale == 1:
        return
    if parts > 1:
        yield (
            "teacher.cfg_norm scalar has one factor for all samples of a call, and the samples of "
            f"a micro-batch are shared out among {parts} parts of the teacher: the numbers are "
            "not those of topology.mode=local, nor of another placement; give the teacher one rank "
            "and one replica, or set teacher.cfg_norm=layer_norm"
        )


def departures(objective: object) -> Iterator[str]:
    """Returns a sentence where settings are named after a trainer whose numbers they do not make.

    Args:
        objective: Section `objective`.
    """
    if isinstance(objective, PhasedObjective) and objective.order == "alternate":
        yield (
            "objective.order alternate has the order and the levels of the released trainer, which "
            "has a fake score for each phase; here one learns from both, and follows the mean of "
            "two laws above the boundary until the low phase keeps the law of the high one. The "
            "paper's order, sequential, has no such mean"
        )
