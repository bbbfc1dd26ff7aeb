"""Updates a role's weights: AdamW on finite and clipped gradients.

    learn, learn, ...  ->  gradient_report(iteration)  ->  step(iteration)     or     discard()

The report comes apart from the step, because generator and fake score only step when the gradients
of both are finite; the controller asks both before it lets either go on. A role may make several
updates an iteration, each after a report of its own.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sgmd_core.errors import NonFiniteError, StaleCallError, non_finite_remedy
from workers.adamw import MOMENTS, WHOLE_MOMENTS, make_adamw, restore_moments
from workers.adapters import lora_of
from workers.network_settings import OptimizerSettings
from workers.rate_courses import CONSTANT, COURSES
from workers.reports import GradientReport
from workers.role_state import RoleState, require_same_adapters, require_same_tensors
from workers.rows import RowRange
from workers.sharding import (
    as_shard,
    full_tensor,
    local_part,
    local_rows,
    parameters_of,
    reshard,
)
from workers.snapshots import RoleSnapshot, copies

_CLIP_MARGIN = 1e-5
"""More than what torch adds to the norm before it divides by it."""


_LAYER = re.compile(r".*?\.\d+(?=\.)")
"""The layer that a parameter belongs to, as its name has it: `transformer.blocks.7`."""

_OUTSIDE = "outside_layers"


def learning_rate(settings: OptimizerSettings, updates: int) -> float:
    """Rate of the update that follows `updates` earlier ones.

        warm-up     lr * (updates + 1) / warmup_iterations
        afterwards  lr * (final + (1 - final) * course(t)),   final = final_lr_ratio
                    t = (updates - warmup) / (decay_iterations - warmup), at most 1

    A function of the count alone, so a resumed run needs no state of a scheduler.
    """
    warmup = settings.warmup_iterations
    if updates < warmup:
        return settings.lr * (updates + 1) / warmup
    if settings.decay == CONSTANT:
        return settings.lr
    t = min(1.0, (updates - warmup) / (settings.decay_iterations - warmup))
    left = COURSES[settings.decay](t)
    return settings.lr * (settings.final_lr_ratio + (1 - settings.final_lr_ratio) * left)


class RoleOptimizer:
    """Updates the weights of one role and counts the updates.

    Args:
        role: Name of the role, for messages.
        network: Whose parameters are updated; all of them, in one group, as the reference does.
        settings: Rates and limits.
        updates_per_iteration: Updates that make an iteration of this role.
    """

    def __init__(
        self,
        role: str,
        network: nn.Module,
        settings: OptimizerSettings,
        updates_per_iteration: int = 1,
    ) -> None:
        self._role = role
        self._settings = settings
        self._updates_per_iteration = updates_per_iteration
        self._network = network
        self._parameters = parameters_of(network)
        self._adamw = make_adamw(
            self._parameters.values(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            offload=settings.moments == "cpu",
            in_8_bits=settings.moment_bits == 8,
        )
        self._updates = 0
        self._skipped = 0
        self._norm: Tensor | None = None
        self._moved: frozenset[str] = frozenset()

    @property
    def updates(self) -> int:
        """Updates made so far."""
        return self._updates

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters that are updated."""
        return list(self._parameters.values())

    @property
    def moved_weights(self) -> dict[str, Tensor]:
        """Those of `weights` that the last update had a gradient of."""
        return {name: value for name, value in self.weights.items() if name in self._moved}

    def require_current(self, iteration: int, attempted: str) -> None:
        """Checks that a call belongs to the iteration that is under way.

        Raises:
            StaleCallError: It belongs to an earlier or a later one.
        """
        current = (self._updates + self._skipped) // self._updates_per_iteration
        if iteration != current:
            raise StaleCallError(
                f"{attempted} of iteration {iteration} on the {self._role}",
                f"the {self._role} has made {self._updates} updates"
                + (f" and skipped {self._skipped}" if self._skipped else ""),
                f"a call of iteration {current}",
                "Resume all roles from one checkpoint, so that they count alike",
            )

    def gradient_report(self, iteration: int) -> GradientReport:
        """Norm of the accumulated gradient before clipping; updates nothing.

        Raises:
            StaleCallError: Another iteration is under way, or nothing was accumulated.
        """
        self.require_current(iteration, "asking for the gradient norm")
        gradients = [value.grad for value in self.parameters if value.grad is not None]
        if not gradients:
            raise StaleCallError(
                f"asking for the gradient norm of iteration {iteration}",
                f"the {self._role} has accumulated no gradient",
                "at least one micro-batch learned since the last update",
            )
        self._norm = nn.utils.get_total_norm(gradients)
        norm = full_tensor(self._norm).item()
        blocks = self._block_norms() if self._settings.log_block_norms else {}
        rate = learning_rate(self._settings, self._updates)
        return GradientReport(norm, math.isfinite(norm), blocks, rate)

    def step(self, iteration: int, skip: bool = False, rate: float = 1.0) -> int:
        """Clips, updates, forgets the gradients.

        A skipped update leaves weights, moments and learning rate as they are: rates, bias
        corrections and averages count the updates that are made.

        Args:
            iteration: The iteration.
            skip: Forget the gradients and count the update as skipped.
            rate: Multiple of the learning rate; 1 is exact.

        Returns:
            Updates made, this one included.

        Raises:
            StaleCallError: Another iteration is under way, or its gradient was not reported on.
            NonFiniteError: The gradient is not finite; nothing was updated.
        """
        self.require_current(iteration, "updating the weights")
        if self._norm is None:
            raise StaleCallError(
                f"updating the {self._role} in iteration {iteration}",
                "its gradients have not been looked at",
                "a gradient report of this iteration, taken after all micro-batches",
                "Call gradient_report first",
            )
        if skip:
            self.discard()
            self._skipped += 1
            return self._updates
        norm = full_tensor(self._norm).item()
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"updating the {self._role} in iteration {iteration}",
                f"a gradient norm of {norm}",
                "finite gradients",
                f"The {self._role} was not updated. "
                + non_finite_remedy(self._updates, "its optimizer.lr"),
            )
        self._update(norm, self._norm, rate)
        self._updates += 1
        return self._updates

    def extra_step(self, rate: float) -> None:
        """Makes an update that is not counted, with whatever gradient was accumulated.

        It is for updates that `restore` takes back: nothing is checked, and a gradient that is not
        finite breaks the weights until then.

        Args:
            rate: Multiple of the present learning rate.
        """
        total = nn.utils.get_total_norm(
            [value.grad for value in self.parameters if value.grad is not None]
        )
        self._update(full_tensor(total).item(), total, rate)

    def _update(self, norm: float, total: Tensor, rate: float) -> None:
        """Clips, updates and forgets the gradients, whose norm is given twice."""
        for group in self._adamw.param_groups:
            group["lr"] = rate * learning_rate(self._settings, self._updates)
        # Gradients below the limit would be multiplied by 1.
        if norm + _CLIP_MARGIN > self._settings.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self._settings.max_grad_norm, total)
        reshard(self._network)
        self._moved = frozenset(
            name for name, value in self._parameters.items() if value.grad is not None
        )
        self._adamw.step()
        self.discard()

    def _block_norms(self) -> dict[str, float]:
        """Norm of the accumulated gradient of each layer, and of all outside of layers."""
        gradients: dict[str, list[Tensor]] = {}
        for name, value in self._parameters.items():
            if value.grad is not None:
                layer = _LAYER.match(name)
                gradients.setdefault(layer[0] if layer else _OUTSIDE, []).append(value.grad)
        return {
            layer: full_tensor(nn.utils.get_total_norm(found)).item()
            for layer, found in gradients.items()
        }

    def discard(self) -> None:
        """Drops the accumulated gradients."""
        self._adamw.zero_grad(set_to_none=True)
        self._norm = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, without a graph: views, and on several ranks parts."""
        return {name: value.detach() for name, value in self._parameters.items()}

    @cached_property
    def rows(self) -> dict[str, RowRange]:
        """Place of this rank's part of each parameter that several ranks share, by name."""
        found: dict[str, RowRange] = {}
        for name, value in self._parameters.items():
            if isinstance(value, DTensor):
                part, first = local_rows(value.detach())
                found[name] = RowRange(first, len(part), tuple(value.shape))
        return found

    def state(self, over: RoleState | None = None) -> RoleState:
        """Copies of this rank's part of weights and moments in main memory, and the counter.

        Args:
            over: An earlier state that is no longer needed; its memory is used again.
        """
        taken = self._copied(over.weights, over.moments) if over else self.snapshot()
        lora = lora_of(self._network)
        return RoleState(
            taken.updates, taken.weights, taken.moments, lora, taken.skipped, self.rows
        )

    def snapshot(self) -> RoleSnapshot:
        """Copies of this rank's parts of weights and moments, and the counter."""
        return self._copied({}, {})

    def _copied(
        self, old_weights: Mapping[str, Tensor], old_moments: Mapping[str, Tensor]
    ) -> RoleSnapshot:
        weights = copies(self.weights.items(), old_weights)
        moments = copies(self._state_by_label(), old_moments)
        return RoleSnapshot(self._updates, weights, moments, skipped=self._skipped)

    def snapshot_bytes(self) -> int:
        """Size of the tensors that `snapshot` would copy now."""
        tensors = [*self.weights.values(), *(value for _, value in self._state_by_label())]
        return sum(local_part(value).nbytes for value in tensors)

    @torch.no_grad()
    def restore(self, snapshot: RoleSnapshot) -> None:
        """Goes on where `snapshot` was taken, bit for bit.

        Raises:
            CheckpointError: The snapshot belongs to another network.
        """
        parts = {name: local_part(value) for name, value in self.weights.items()}
        require_same_tensors(snapshot.weights, parts, f"restoring the {self._role}")
        reshard(self._network)
        for name, part in parts.items():
            part.copy_(snapshot.weights[name])
        # Moments that came after the snapshot must not stay.
        self._adamw.state.clear()
        restore_moments(self._adamw, self._parts_by_index(snapshot.moments))
        self._updates = snapshot.updates
        self._skipped = snapshot.skipped
        self.discard()

    def restart(self, start: RoleSnapshot) -> None:
        """Takes the weights of a snapshot back, and none of its moments; updates count on.

        Raises:
            CheckpointError: The snapshot belongs to another network.
        """
        fresh = replace(start, moments={}, updates=self._updates, skipped=self._skipped)
        self.restore(fresh)

    def _parts_by_index(self, moments: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """Copies of this rank's parts of the moments, in AdamW's own form."""
        offload = self._settings.moments == "cpu"
        parameters = list(self._parameters.items())
        found: dict[int, dict[str, Tensor]] = {}
        for index, (name, parameter) in enumerate(parameters):
            shape = local_part(parameter).shape
            for kind in (*MOMENTS, "step"):
                value = moments.get(f"{kind}/{name}")
                if value is None:
                    continue
                part = value.clone()
                if kind in WHOLE_MOMENTS and value.shape == shape and not offload:
                    part = as_shard(part.to(parameter.device), parameter)
                found.setdefault(index, {})[kind] = part
        return found

    def _state_by_label(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's state as it lies here, by `KIND/NAME`."""
        for name, parameter in self._parameters.items():
            for kind, value in self._adamw.state[parameter].items():
                yield f"{kind}/{name}", value

    def load_state(self, state: RoleState) -> None:
        """Goes on where `state` was taken; it has this rank's parts.

        Raises:
            CheckpointError: The state belongs to another network.
        """
        attempted = f"loading the {self._role}"
        require_same_adapters(state.lora, lora_of(self._network), attempted)
        require_same_tensors(state.whole_shapes, self.weights, attempted)
        self.restore(
            RoleSnapshot(state.updates, state.weights, state.moments, skipped=state.skipped)
        )
