"""Saves a role's state beside its work: a copy is taken at once, a thread writes it.

    begin_save(folder)    copies this rank's part to main memory; the role goes on
    thread                writes, hashes and flushes the copy, or uploads it
    finish_save(folder)   digests of what was written, or the error that stopped it

The files are those of a save that is waited for, bit for bit: both write the same copy. One copy
is held at a time, and the next one is written over it: fresh memory would make the copy, for which
the role waits, several times slower. Weights that are not finite are not written: a run could not
go on from them.
"""

import threading
from abc import ABC
from collections.abc import Mapping

from torch import nn

from sgmd_core.errors import NonFiniteError, StaleCallError
from workers.finite import Diagnosis, FiniteChecks, broken_tensor
from workers.optimizer import RoleOptimizer
from workers.reports import GradientReport
from workers.role_state import RoleState, load_role, save_role
from workers.snapshots import RoleSnapshot

_NAME = "save-state"


class StateWriter:
    """Writes states in a thread, one after another."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._folder = ""
        self._outcome: dict[str, str] | Exception = {}

    def begin(self, folder: str, parts: Mapping[str, RoleState]) -> None:
        """Starts writing; waits for what is still being written before.

        Args:
            folder: The checkpoint: a local folder or an fsspec URL.
            parts: States by subfolder; nobody else may change them.
        """
        self.wait()
        self._folder = folder
        # A daemon: a process that ends need not wait, because no manifest names these files yet.
        self._thread = threading.Thread(
            target=self._write, args=(folder, parts), name=_NAME, daemon=True
        )
        self._thread.start()

    def outcome(self, folder: str) -> dict[str, str] | None:
        """SHA-256 by path of what was written last; None while it is being written.

        Args:
            folder: The checkpoint that `begin` was given.

        Raises:
            StaleCallError: `begin` was given another one, or has not been called.
            StorageError: The disk is full or cannot be written to.
            NonFiniteError: A weight of the state is not finite.
        """
        if folder != self._folder:
            raise StaleCallError(
                f"finishing the save of {folder}",
                f"this process has begun that of {self._folder}"
                if self._folder
                else "this process has begun no save",
                "the process that has copied the state",
            )
        if self._thread is not None and self._thread.is_alive():
            return None
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def wait(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not None:
            self._thread.join()

    def _write(self, folder: str, parts: Mapping[str, RoleState]) -> None:
        digests: dict[str, str] = {}
        try:
            for role, state in parts.items():
                _require_finite(folder, role, state)
                digests |= save_role(folder, role, state)
        except Exception as error:
            self._outcome = error
        else:
            self._outcome = digests


def _require_finite(folder: str, role: str, state: RoleState) -> None:
    name = broken_tensor(state.weights.items())
    if name is not None:
        raise NonFiniteError(
            f"saving {folder}",
            f"the weight {name} of {role} is not finite",
            "finite weights",
            "This state is not kept",
        )


class LearningRole(ABC):
    """A role that learns: what a run asks of each of them alike.

    Its state is saved beside its work.
    """

    _role: str  # subfolder of a checkpoint
    _network: nn.Module
    _optimizer: RoleOptimizer
    _checks: FiniteChecks

    def __init__(self) -> None:
        self._writer = StateWriter()
        self._copied: dict[str, RoleState] = {}

    def begin_save(self, folder: str) -> int:
        """Copies the state as it is, and starts writing it under a checkpoint folder.

        Every rank must be asked. An earlier save is finished first.

        Returns:
            Updates that the state has seen, skipped ones included.
        """
        self._writer.wait()
        # Where it fails on the way, what is left of the former copy is half written over.
        former, self._copied = self._copied, {}
        parts = self._copied = self.states(former)
        self._writer.begin(folder, parts)
        state = next(iter(parts.values()))
        return state.updates + state.skipped

    def finish_save(self, folder: str, *, wait: bool = True) -> dict[str, str] | None:
        """SHA-256 by path of what this rank has written since `begin_save`.

        Args:
            folder: The folder that `begin_save` was given.
            wait: Wait until all is written; otherwise returns None until then.

        Raises:
            StaleCallError: `begin_save` was given another one, or the process is a new one.
            StorageError: The disk is full or cannot be written to.
            NonFiniteError: A weight of the state is not finite.
        """
        if wait:
            self._writer.wait()
        return self._writer.outcome(folder)

    def wait_for_writer(self) -> None:
        """Waits until nothing is being written, whatever came of it."""
        self._writer.wait()

    def save(self, folder: str) -> dict[str, str]:
        """Writes the state under a checkpoint folder and waits for it; every rank must be asked.

        Returns:
            SHA-256 by path of what this rank has written.

        Raises:
            StorageError: The disk is full or cannot be written to.
            NonFiniteError: A weight of the state is not finite.
        """
        self.begin_save(folder)
        return self.finish_save(folder) or {}

    def gradient_report(self, iteration: int) -> GradientReport:
        """Norm of the accumulated gradient; updates nothing.

        Raises:
            StaleCallError: A micro-batch is not finished, another iteration is under way, or
                nothing was accumulated.
        """
        return self._optimizer.gradient_report(iteration)

    def step(self, iteration: int, skip: bool = False) -> int:
        """Updates the weights.

        Args:
            iteration: The iteration.
            skip: Forget the gradients, keep the weights and count the update as skipped.

        Returns:
            Updates made, this one included.

        Raises:
            StaleCallError: There is no gradient report of this iteration.
            NonFiniteError: The gradient is not finite; nothing was updated.
        """
        return self._optimizer.step(iteration, skip)

    def discard(self) -> None:
        """Gives the iteration up: drops graphs and gradients, keeps the weights."""
        self._optimizer.discard()

    def diagnose(self, iteration: int) -> Diagnosis:
        """First fault of an iteration, and a weight that is not finite; of this rank."""
        return self._checks.diagnose(iteration, self._network)

    def states(self, over: Mapping[str, RoleState]) -> dict[str, RoleState]:
        """Copies of this rank's part of everything to save, by subfolder; every rank has one.

        Args:
            over: Earlier ones that are no longer needed; their memory is used again.
        """
        return {self._role: self._optimizer.state(over.get(self._role))}

    def load(self, folder: str) -> int:
        """Goes on where `save` left off, bit for bit; gives the iteration under way up.

        Returns:
            Updates made so far.

        Raises:
            CheckpointError: A file is missing or torn, or belongs to another network.
        """
        state = load_role(folder, self._role, self._optimizer.rows)
        self.discard()
        self._optimizer.load_state(state)
        return state.updates

    def snapshot(self) -> RoleSnapshot:
        """A copy of this rank's part of the state, in main memory; changes nothing."""
        return self._optimizer.snapshot()

    def snapshot_bytes(self) -> int:
        """Size of the snapshot that would be taken now."""
        return self._optimizer.snapshot_bytes()

    def restore(self, snapshot: RoleSnapshot) -> int:
        """Goes on where `snapshot` was taken, bit for bit; gives the iteration under way up.

        Returns:
            Updates made so far.

        Raises:
            CheckpointError: It belongs to another network.
        """
        self.discard()
        self._optimizer.restore(snapshot)
        return snapshot.updates
