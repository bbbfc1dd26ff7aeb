"""AdamW as one kernel over all parameters, where the device has one, with the state that it needs.

    beta1 above 0      exp_avg, exp_avg_sq, step     torch's own class
    beta1 = 0          exp_avg_sq, step              the gradient is its own first moment
    moments on a CPU   the same, of which the device holds one parameter's at a time
    second in 8 bits   codes and exponents in place of exp_avg_sq, `workers.moment_codes`

On a CPU the update of a role of 69 tensors then takes a fifth of the time. The kernel rounds
differently from the update by single operations, so which of the two runs is decided by the device
alone and never by a checkpoint. Where the moments lie, and whether a first one is kept for a decay
of 0, changes no bit; moments in 8 bits do.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sgmd_core.errors import CheckpointError
from workers.moment_codes import MomentCodes, decode_moments, encode_moments, has_codes
from workers.sharding import local_part, own_rank, to_main_memory

FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
"""Types of devices with the kernel; torch refuses another one only at the first update."""
FIRST, SECOND = "exp_avg", "exp_avg_sq"
CODES, BASES = "exp_avg_sq_codes", "exp_avg_sq_bases"
WHOLE_MOMENTS = (FIRST, SECOND)
MOMENTS = (*WHOLE_MOMENTS, CODES, BASES)


def make_adamw(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float = 1e-8,
    weight_decay: float,
    offload: bool = False,
    in_8_bits: bool = False,
) -> torch.optim.Optimizer:
    """Makes the optimizer of these parameters: all of them, in one group.

    Args:
        parameters: What is updated; on several ranks, this rank's parts.
        lr: Learning rate.
        betas: Decay of the first and second moment; a first one of 0 keeps no first moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, in units of the learning rate.
        offload: Keep the moments in main memory.
        in_8_bits: Keep second moments in 8 bits; for a first decay of 0 and no offload.
    """
    assert not in_8_bits or (betas[0] == 0 and not offload), "settings refuse it"
    updated = list(parameters)
    fused = all(value.device.type in FUSED_DEVICES for value in updated)
    if offload or betas[0] == 0:
        return LeanAdamW(
            updated,
            lr,
            betas,
            eps,
            weight_decay,
            fused=fused,
            offload=offload,
            in_8_bits=in_8_bits,
        )
    return torch.optim.AdamW(
        updated, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused
    )


class LeanAdamW(torch.optim.Optimizer):
    """AdamW without a first moment where its decay is 0, with moments on the device or the CPU.

    Args:
        parameters: What is updated.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, in units of the learning rate.
        fused: Update by one kernel.
        offload: Keep the moments in main memory, pinned where the parameters are on a GPU; an
            update takes them to the device and back, one parameter after another.
        in_8_bits: Keep second moments as codes; an update decodes one parameter's at a time.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        fused: bool,
        offload: bool,
        in_8_bits: bool = False,
    ) -> None:
        self._offload = offload
        self._in_8_bits = in_8_bits
        self._kinds = (SECOND,) if betas[0] == 0 else (FIRST, SECOND)
        # `fused` is a key that torch looks at when it places a loaded step count.
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, options | {"fused": fused})
        listed = (value for group in self.param_groups for value in group["params"])
        self._places = {value: place for place, value in enumerate(listed)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient."""
        assert closure is None, "an update follows one backward pass"
        for group in self.param_groups:
            moved = [value for value in group["params"] if value.grad is not None]
            for value in moved:
                self._prepare_state(value)
            coded = [value for value in moved if CODES in self.state[value]]
            whole = [value for value in moved if CODES not in self.state[value]]
            parts = [[value] for value in whole] if self._offload else [whole]
            for part in parts:
                self._update(part, group)
            for value in coded:
                self._update_coded(value, group)
        if self._offload and torch.cuda.is_available():
            # The copies to main memory are on their way.
            torch.cuda.synchronize()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state over; moments go where this optimizer keeps them."""
        if not (self._offload or self._in_8_bits):
            super().load_state_dict(state_dict)
            return
        # torch would put all moments on the devices of their parameters first, in their type.
        parameters = [value for group in self.param_groups for value in group["params"]]
        for index, saved in state_dict["state"].items():
            parameter = parameters[index]
            state = self.state[parameter]
            state["step"] = self._step_count(parameter).copy_(saved["step"])
            for kind in self.kinds_of(parameter):
                if self._offload:
                    state[kind] = to_main_memory(saved[kind]).to(parameter.dtype)
                else:
                    state[kind] = saved[kind].to(parameter.device)

    def kinds_of(self, parameter: Tensor) -> tuple[str, ...]:
        """Moments that are kept of a parameter, by name."""
        if self._in_8_bits and has_codes(parameter):
            return CODES, BASES
        return self._kinds

    def _update_coded(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """Updates a parameter whose second moments are codes."""
        state = self.state[parameter]
        state[SECOND] = decode_moments(MomentCodes(state[CODES], state[BASES]))
        self._update([parameter], group)
        counters = int(state["step"]), self._places[parameter], own_rank()
        state[CODES], state[BASES] = encode_moments(state.pop(SECOND), *counters)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        gradients = [local_part(value.grad) for value in parameters if value.grad is not None]
        states = [self.state[value] for value in parameters]
        kept = {kind: [local_part(state[kind]) for state in states] for kind in self._kinds}
        devices = [one.device for one in gradients]
        used = {
            kind: [
                one.to(device, non_blocking=True) for one, device in zip(ones, devices, strict=True)
            ]
            for kind, ones in kept.items()
        }
        beta1, beta2 = group["betas"]
        adamw(
            [local_part(value) for value in parameters],
            gradients,
            # With a decay of 0 it becomes the gradient, whatever it was.
            used.get(FIRST, gradients),
            used[SECOND],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for kind, ones in kept.items():
            for one, now in zip(ones, used[kind], strict=True):
                if one is not now:
                    one.copy_(now, non_blocking=True)

    def _prepare_state(self, parameter: Tensor) -> None:
        """Makes the state of a parameter at its first update, and puts loaded moments in place."""
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = self._step_count(parameter)
            if CODES in self.kinds_of(parameter):
                none = torch.zeros_like(local_part(parameter))
                state[CODES], state[BASES] = encode_moments(none)
                return
            for kind in self._kinds:
                state[kind] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        for kind in self.kinds_of(parameter):
            if self._offload:
                state[kind] = to_main_memory(state[kind])

    def _step_count(self, parameter: Tensor) -> Tensor:
        """A count of 0 where the kernel reads it."""
        device = parameter.device if self.param_groups[0]["fused"] else "cpu"
        return torch.zeros((), dtype=torch.float32, device=device)


def restore_moments(optimizer: torch.optim.Optimizer, moments: Mapping[int, Any]) -> None:
    """Takes saved moments and step counts over; rates and kernel stay those of this process.

    First moments of an optimizer that needs none are left out: their decay of 0 makes them
    the gradient of the last update, which no later update uses.

    Args:
        optimizer: Whose state is replaced.
        moments: Section `state` of an optimizer's `state_dict`, of either kernel.
    """
    needless = {FIRST} if optimizer.param_groups[0]["betas"][0] == 0 else set()
    state = {
        index: {kind: value for kind, value in saved.items() if kind not in needless}
        for index, saved in moments.items()
    }
    _require_moments(optimizer, state)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _require_moments(optimizer: torch.optim.Optimizer, state: Mapping[int, Any]) -> None:
    beta1 = optimizer.param_groups[0]["betas"][0]
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    for index, saved in state.items():
        if isinstance(optimizer, LeanAdamW):
            kinds = optimizer.kinds_of(parameters[index])
        else:
            kinds = (FIRST, SECOND)
        if missing := sorted({*kinds, "step"} - saved.keys()):
            raise CheckpointError(
                "loading the state of an optimizer",
                f"no {' and no '.join(missing)} in it, and a decay of the first moment of {beta1}",
                "the moments that its betas and moment_bits need",
                "Set betas and moment_bits of the optimizer as they were when it was written",
            )
