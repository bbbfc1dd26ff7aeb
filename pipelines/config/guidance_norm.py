"""Guided velocities that are scaled by one factor for all samples of a call."""

from collections.abc import Iterator

from cluster.schedule.program import Team
from workers.settings import TeacherSettings


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
