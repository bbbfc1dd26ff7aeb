"""Several calls of one process as one call of Ray: one submission, one task, one small answer.

    specs, arguments of all  ->  Host.run_batch  ->  (small results of all), result, result ...
                                                      the controller's         other processes'

What the calls hand to one another stays in the process. A result that other processes take comes
back under a reference of its own, as the result of a single call does; all others, which are small
or stay in the process, come back together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from cluster.transfer import pack

if TYPE_CHECKING:
    from cluster.ray.host import CallSpec
    from cluster.ray.hosts import Hosts


@dataclass(slots=True, eq=False)
class CallAnswer:
    """Answer of a call, as Ray names it once the call is made.

    Attributes:
        reference: Ray's reference; None while the call is held back.
        ranks: (group, rank) of each call that this is the answer of.
    """

    ranks: list[tuple[str, int]]
    reference: "ray.ObjectRef | None" = None

    def require(self) -> "ray.ObjectRef":
        """The reference of a call that was made."""
        assert self.reference is not None, "the call is held back: see `made_together`"
        return self.reference


class HostBatch:
    """Calls of one process that are held back; see `cluster.worker_group.CallBatch`.

    Args:
        hosts: The processes.
        index: Which of them.
    """

    def __init__(self, hosts: "Hosts", index: int) -> None:
        self._hosts = hosts
        self._index = index
        self._specs: list[CallSpec] = []
        self._sent: list[object] = []
        self._apart: list[CallAnswer] = []
        self._answer = CallAnswer([])

    def owns(self, answer: CallAnswer) -> bool:
        """Returns True for the answer of one of these calls."""
        return answer is self._answer or answer in self._apart

    def add(self, place: tuple[str, int], spec: "CallSpec", sent: Sequence[object]) -> CallAnswer:
        """Holds a call back; returns the answer that will have its small result.

        Args:
            place: Group and rank that it goes to.
            spec: The call.
            sent: What is sent for its arguments.
        """
        self._specs.append(spec)
        self._sent += sent
        self._answer.ranks.append(place)
        return self._answer

    def add_apart(self, place: tuple[str, int]) -> CallAnswer:
        """Returns the answer that will be what the last call hands to other processes."""
        self._apart.append(CallAnswer([place]))
        return self._apart[-1]

    @property
    def num_calls(self) -> int:
        """Calls that are held back."""
        return len(self._specs)

    def submit(self) -> None:
        """Makes all calls as one."""
        run: Any = self._hosts.actors[self._index].run_batch
        run = run.options(num_returns=1 + len(self._apart)) if self._apart else run
        made = run.remote(pack(tuple(self._specs)), *self._sent)
        answers = [self._answer, *self._apart]
        references = made if self._apart else [made]
        for answer, reference in zip(answers, references, strict=True):
            answer.reference = reference

    def abandon(self) -> None:
        """Forgets the calls; the next batch tells the process which results were dropped."""
        for spec in self._specs:
            self._hosts.dropped[self._index].extend(spec.drop)
