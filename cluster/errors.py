"""Every error that the cluster side can raise, as one tree.

    SgmdError (sgmd_core)
    └── ClusterError
        ├── RayStartError                Ray cannot be started or reached
        ├── InsufficientResourcesError   the cluster is too small, or busy, for the pools asked for
        ├── WorkerDiedError              the process behind a rank is gone
        │   ├── WorkerFrozenError        it no longer answered, or was stuck, and was ended
        │   └── NodeLostError            its whole machine is gone
        ├── StartTimeoutError            not all ranks of a group came up in time
        ├── CallTimeoutError             a rank did not answer in time
        ├── RemoteCallError              a rank failed with an error that cannot travel
        ├── ResultLostError              a result is gone with the machine that held it
        ├── ScheduleError                a schedule that cannot be worked through
        ├── TransferError                a value that groups cannot hand to one another
        ├── ControllerTensorError        a tensor was on its way to the controller
        ├── StorageError                 a file, folder or bucket cannot be read or written
        │   └── StoreRefusedError        it answers, and refuses: waiting does not help
        ├── LeaseError                   another process is writing to a folder
        ├── LeaseLostError               another process has taken a folder over
        └── JobError                     a job could not be submitted or did not succeed

An error raised by a worker's own method arrives as itself, with a note that names the group, the
rank and the method.
"""

from sgmd_core.errors import SgmdError
from sgmd_core.words import count_in_words


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
        attempted: What the controller was waiting for.
        cause: One sentence about how it ended.
        node: Address of its machine; empty where it is not known.
        pid: Its process id there; 0 where it is not known.
        last_lines: The last lines that it wrote to its log, secrets blotted out.
    """

    def __init__(
        self,
        group: str,
        rank: int,
        attempted: str,
        cause: str,
        node: str = "",
        pid: int = 0,
        last_lines: tuple[str, ...] = (),
    ) -> None:
        where = ", ".join([*([f"pid {pid}"] if pid else []), *([f"on {node}"] if node else [])])
        said = "".join(f"\n  | {line}" for line in last_lines)
        super().__init__(
            attempted,
            f"the process of {group} rank {rank}{f' ({where})' if where else ''} is gone: {cause}"
            + (f". Its last log lines:{said}\n" if said else ""),
            "every rank to live as long as its group",
            "Its state is lost: resume the run from its last checkpoint",
        )
        self.args = (group, rank, attempted, cause, node, pid, last_lines)
        self.group = group
        self.rank = rank
        self.cause = cause
        self.node = node
        self.pid = pid
        self.last_lines = last_lines


class WorkerFrozenError(WorkerDiedError):
    """A process was ended because it no longer answered, or was stuck in a call.

    Args:
        group: Name of the worker group.
        rank: Rank within the group.
        attempted: What the controller was waiting for.
        cause: One sentence: its call, and for how long it was silent or stuck.
        node: Address of its machine.
        pid: Its process id there.
        last_lines: The last lines that it wrote to its log.
        dump: File with its stack and those of its partners; empty where there is none.
    """

    def __init__(
        self,
        group: str,
        rank: int,
        attempted: str,
        cause: str,
        node: str = "",
        pid: int = 0,
        last_lines: tuple[str, ...] = (),
        dump: str = "",
    ) -> None:
        super().__init__(group, rank, attempted, cause, node, pid, last_lines)
        self.args = (group, rank, attempted, cause, node, pid, last_lines, dump)
        self.dump = dump
        if dump:
            self.remedy += f". Stacks of it and of its partners are in {dump}"


class NodeLostError(WorkerDiedError):
    """A machine, or the Ray process that stands for it, is gone, with every process on it.

    Args:
        group: Group of the first process that was there.
        rank: Its rank.
        attempted: What the controller was waiting for.
        cause: One sentence about how the machine was lost.
        node: Its address.
        lost: (group, rank) of every worker that was there.
    """

    def __init__(
        self,
        group: str,
        rank: int,
        attempted: str,
        cause: str,
        node: str = "",
        lost: tuple[tuple[str, int], ...] = (),
    ) -> None:
        super().__init__(group, rank, attempted, cause, node)
        self.args = (group, rank, attempted, cause, node, lost)
        self.lost = lost or ((group, rank),)
        there = ", ".join(f"{name} rank {number}" for name, number in self.lost)
        self.found = f"the machine {node or 'of some workers'} is gone: {cause}. It had {there}"
        self.expected = "every machine to stay as long as the run"
        self.remedy = "Their state is lost: resume the run from its last checkpoint"


class StartTimeoutError(ClusterError, TimeoutError):
    """Not all ranks of a group came up in time.

    Args:
        group: Name of the worker group.
        states: What each rank has come to, by rank.
        timeout_s: How long they were waited for.
        printed: Sentence with the output of processes that ended as they started, or empty.
    """

    def __init__(
        self, group: str, states: tuple[str, ...], timeout_s: float, printed: str = ""
    ) -> None:
        rows = "\n".join(f"  {group}[{rank}]  {state}" for rank, state in enumerate(states))
        super().__init__(
            f"starting the {count_in_words(len(states), 'rank')} of {group}",
            f"after {timeout_s:g} s\n{rows}\n{printed}",
            "all of them to be ready",
            "A process that has not started waits for its bundle or for its environment (`ray "
            "status`), or ends as it starts (raylet.err among Ray's logs on its machine). One that "
            "is building reads its networks or waits for the other ranks. Raise "
            "topology.start_timeout_s if that takes long here",
        )
        self.args = (group, states, timeout_s, printed)
        self.group = group
        self.states = states
        self.timeout_s = timeout_s


class CallTimeoutError(ClusterError, TimeoutError):
    """A rank did not answer in time.

    Args:
        group: Name of the first group that is late.
        rank: Its rank.
        method: The call that has not come back.
        attempted: What the controller was waiting for.
        timeout_s: How long it waited.
    """

    def __init__(
        self, group: str, rank: int, method: str, attempted: str, timeout_s: float
    ) -> None:
        super().__init__(
            attempted,
            f"{group} rank {rank} did not finish {method}() within {timeout_s:g} s",
            "an answer in time",
            "A rank that waits for another one's result counts as late too. Raise the timeout if"
            " the work is slow; otherwise look at the stack of that process (py-spy dump)",
        )
        self.args = (group, rank, method, attempted, timeout_s)
        self.group = group
        self.rank = rank
        self.method = method
        self.timeout_s = timeout_s


class RemoteCallError(ClusterError):
    """A rank failed with an error that cannot be pickled; its text is here."""


class ResultLostError(ClusterError):
    """A result that a call needs is gone with the machine that held it."""


LOST = (WorkerDiedError, ResultLostError)
"""Failures after which a run can go on: what failed is where it runs, not what it computes."""


class ScheduleError(ClusterError, ValueError):
    """A schedule that cannot be worked through, or a plan without room for it."""


class TransferError(ClusterError, TypeError):
    """A value that groups cannot hand to one another."""


class ControllerTensorError(ClusterError, TypeError):
    """A tensor was on its way to the controller, which moves references and small numbers only."""


class StorageError(ClusterError):
    """A file, folder or bucket cannot be read or written."""


class StoreRefusedError(StorageError):
    """A file cannot be written for a reason that does not pass: no rights, no room, no folder."""


class LeaseError(ClusterError):
    """Another process is writing to the folder that this one wants to write to."""


class LeaseLostError(ClusterError):
    """Another process has taken over the folder that this one was writing to."""


class JobError(ClusterError):
    """A job could not be submitted, was lost, or did not succeed.

    Args:
        attempted: As of every error.
        found: As of every error.
        expected: As of every error.
        remedy: As of every error.
        exit_code: Exit code of the job's command; None where it has none.
    """

    def __init__(
        self,
        attempted: str,
        found: str,
        expected: str = "",
        remedy: str = "",
        exit_code: int | None = None,
    ) -> None:
        super().__init__(attempted, found, expected, remedy)
        self.args = (attempted, found, expected, remedy, exit_code)
        self.exit_code = exit_code
