"""Settings of recovery: what a run does when a process or a machine of it is lost."""

from typing import Literal

from pydantic import Field

from pipelines.config.section import Section


class RecoverySettings(Section):
    """Processes that are lost are replaced, and the run goes on with the numbers of a calm run.

    With `topology.mode: local` there is one process, so nothing can be replaced.
    """

    failures_per_hour: int = Field(default=12, ge=0)
    """Failures that a run recovers from within an hour; one more ends it. 0: the first ends it."""
    failures_per_iteration: int = Field(default=3, ge=1)
    """Failures at one iteration; one more there ends the run."""
    backoff_s: float = Field(default=1.0, ge=0)
    """Pause before a second failure at one iteration is repaired; doubled with each further one,
    up to a minute."""
    wait_s: float = Field(default=900.0, gt=0)
    """Seconds to wait for a machine in place of one that is lost."""
    snapshot_share: float = Field(default=0.03, ge=0, le=0.5)
    """Share of the training time that copies of the learners' state in other processes' memory may
    take: after every iteration, or every few where they are slow. 0: none; a run then goes back to
    its newest checkpoint."""
    storage_outage_s: float = Field(default=1800.0, ge=0)
    """Seconds for which the object store of a run at an address may fail while training goes on.
    States are then saved once it answers again. 0: its first failure ends the run."""
    shortage: Literal["wait", "replan"] = "wait"
    """End of waiting, where no machine comes for `wait_s` in place of a lost one: `wait` ends the
    run, to be resumed once there is one; `replan` goes on from the newest checkpoint with fewer
    ranks, or all roles in one pool: the largest topology that fits on what is left. Trials of a
    sweep end."""
