"""Every error that the cluster side can raise, as one tree.

    SgmdError (sgmd_core)
    └── ClusterError
        ├── RayStartError                Ray cannot be started or reached
        ├── InsufficientResourcesError   the cluster is too small, or busy, for the pools asked for
        ├── WorkerDiedError              the process behind a rank is gone
        ├── StartTimeoutError            not all ranks of a group came up in time
        ├── CallTimeoutError             a rank did not answer in time
        ├── RemoteCallError              a rank failed with an error that cannot travel
        ├── ResultLostError              a result is gone with the machine that held it
        ├── ScheduleError                a schedule that cannot be worked through
        ├── TransferError                a value that groups cannot hand to one another
        ├── ControllerTensorError        a tensor was on its way to the controller
        ├── StorageError                 a file, folder or bucket cannot be read or written
        ├── LeaseError                   another process is writing to a folder
        ├── LeaseLostError               another process has taken a folder over
        └── JobError                     a job could not be submitted or did not succeed

An error raised by a worker's own method arrives as itself, with a note that names the group, the
rank and the method.
"""

from sgmd_core.errors import SgmdError


class ClusterError(SgmdError):
    """Base of the errors that concern where a run happens rather than what it computes."""


class RayStartError(ClusterError):
    """Ray cannot be started on this machine, or the cluster cannot be reached."""


class InsufficientResourcesError(ClusterError):
    """The cluster has less than the pools ask for."""


class WorkerDiedError(ClusterError):
    """The process behind a rank is gone, and with it the state of that rank.

    Args:
        group: Name of the worker group.
        rank: Rank within the group.
        phase: What the controller was waiting for.
        last_error: What was last heard of the process.
    """

    def __init__(self, group: str, rank: int, phase: str, last_error: str) -> None:
        super().__init__(
            phase,
            f"the process of {group} rank {rank} is gone. {last_error}",
            "every rank to live as long as its group",
            "Its state is lost: resume the run from its last checkpoint. A process that the system"
            " ended for want of memory leaves a line in the kernel log (dmesg)",
        )
        self.args = (group, rank, phase, last_error)
        self.group = group
        self.rank = rank
        self.phase = phase
        self.last_error = last_error


class StartTimeoutError(ClusterError, TimeoutError):
    """Not all ranks of a group came up in time.

    Args:
        group: Name of the worker group.
        states: What each rank has come to, by rank.
        timeout_s: How long they were waited for.
    """

    def __init__(self, group: str, states: tuple[str, ...], timeout_s: float) -> None:
        rows = "\n".join(f"  {group}[{rank}]  {state}" for rank, state in enumerate(states))
        super().__init__(
            f"starting the {len(states)} ranks of {group}",
            f"after {timeout_s:g} s\n{rows}\n",
            "all of them to be ready",
            "A process that has not started waits for its bundle or for its environment (`ray "
            "status`); one that is building reads its networks or waits for its fellows. Raise "
            "topology.start_timeout_s if that takes long here",
        )
        self.args = (group, states, timeout_s)
        self.group = group
        self.states = states
        self.timeout_s = timeout_s


class CallTimeoutError(ClusterError, TimeoutError):
    """A rank did not answer in time.

    Args:
        group: Name of the first group that is late.
        rank: Its rank.
        method: The call that has not come back.
        phase: What the controller was waiting for.
        timeout_s: How long it waited.
    """

    def __init__(self, group: str, rank: int, method: str, phase: str, timeout_s: float) -> None:
        super().__init__(
            phase,
            f"{group} rank {rank} did not finish {method}() within {timeout_s:g} s",
            "an answer in time",
            "A rank that waits for another one's result counts as late too. Raise the timeout if"
            " the work is slow; otherwise look at the stack of that process (py-spy dump)",
        )
        self.args = (group, rank, method, phase, timeout_s)
        self.group = group
        self.rank = rank
        self.method = method
        self.phase = phase
        self.timeout_s = timeout_s


class RemoteCallError(ClusterError):
    """A rank failed with an error that cannot travel between processes, told here in words."""


class ResultLostError(ClusterError):
    """A result that a call needs is gone with the machine that held it."""


class ScheduleError(ClusterError, ValueError):
    """A schedule that cannot be worked through, or a plan without room for it."""


class TransferError(ClusterError, TypeError):
    """A value that groups cannot hand to one another."""


class ControllerTensorError(ClusterError, TypeError):
    """A tensor was on its way to the controller, which moves references and small numbers only."""


class StorageError(ClusterError):
    """A file, folder or bucket cannot be read or written."""


class LeaseError(ClusterError):
    """Another process is writing to the folder that this one wants to write to."""


class LeaseLostError(ClusterError):
    """Another process has taken over the folder that this one was writing to."""


class JobError(ClusterError):
    """A job could not be submitted, was lost, or did not succeed."""
