"""What an iteration of each objective consists of, as data for `cluster.schedule.schedule`.

    SGMD, shared tracking     rollout denoise signal track learn | update both
    SGMD, fresh tracking      rollout denoise signal learn | update | sample track | update
    DMD2, TSG-Fisher          the same with several fresh updates of the fake score
    SiD                       signal -> pullback through the teacher -> learn, and fresh updates
    with a diversity loss     start before rollout, anchor by the teacher, diversify after learn
    with mixing of weights    the fake score absorbs the generator's, between the two updates

Names of stages are those of the roles' methods.
"""

from cluster.schedule.program import Handover, Pass, Program, Stage, Update
from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER


def iteration_program(
    fresh_updates: int = 0,
    *,
    through_teacher: bool = False,
    diversity: bool = False,
    mixes_weights: bool = False,
) -> Program:
    """The passes and updates of one iteration.

    Args:
        fresh_updates: Updates of the fake score, each on new samples of the updated generator; 0
            tracks the samples that the generator learns from, in the same forward pass.
        through_teacher: The loss reaches the samples through the teacher's input as well, so each
            signal passes through the teacher on its way back.
        diversity: The generator also learns where the teacher goes from its initial noise.
        mixes_weights: With fresh updates, the fake score first takes the generator's weights in.
    """
    shared = fresh_updates == 0
    last = "pullback" if through_teacher else "signal"
    stages = [Stage("start", GENERATOR)] if diversity else []
    stages += [
        Stage("rollout", GENERATOR, keeps_until="learn"),
        Stage(
            "denoise", TEACHER, ("rollout",), keeps_until="pullback" if through_teacher else None
        ),
    ]
    if diversity:
        stages.append(Stage("anchor", TEACHER, ("start",)))
    stages += [
        Stage(
            "signal", FAKE_SCORE, ("rollout", "denoise"), keeps_until="track" if shared else None
        ),
    ]
    if shared:
        stages.append(Stage("track", FAKE_SCORE, ("rollout",), gathers=True))
    if through_teacher:
        stages.append(Stage("pullback", TEACHER, ("rollout", "signal")))
    stages.append(Stage("learn", GENERATOR, (last,), gathers=True))
    if diversity:
        stages.append(Stage("diversify", GENERATOR, ("start", "anchor"), gathers=True))
    distil = Pass(tuple(stages))
    if shared:
        return (distil, Update((GENERATOR, FAKE_SCORE)))
    track = Pass(
        (Stage("sample", GENERATOR), Stage("track", FAKE_SCORE, ("sample",), gathers=True))
    )
    mix = Handover((GENERATOR, "trained_weights"), (FAKE_SCORE, "absorb"))
    return (
        distil,
        Update((GENERATOR,)),
        *((mix,) if mixes_weights else ()),
        *(track, Update((FAKE_SCORE,))) * fresh_updates,
    )
