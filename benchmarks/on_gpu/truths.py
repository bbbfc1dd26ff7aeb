"""Roles on the device against the same roles on the CPU, and ways of computing against another.

A truth is the largest difference over the largest entry of what is expected, beside its bound:

    roles_fp32    samples, teacher's velocity, signal (the vector-Jacobian product at the input) and
                  gradients of both networks, in float32 without TF32; roles_late: at the last exit
    roles_bf16    the same in bfloat16 products, against float32 on the CPU
    fresh         a signal from frozen parameters, tracking on samples of its own
    methods       the signal of every objective
    update        AdamW and the averaged weights, from the same gradients
    shared        two backward passes over one graph = over two graphs, all on the device
    accumulation  gradients accumulated over two micro-batches = those of one batch
    checkpointing, compile    = without
    checkpoint    saved on the device, loaded on the CPU, and back: every bit
    models        text encoder and autoencoder
    wire          through arrays, as between actors: every bit

The networks are the tiny Wan that ships, with seeded noise on the weights of generator and fake
score: between three equal networks the losses would vanish.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.transfer import from_wire, to_wire
from on_gpu.cases import NUM_STEPS, SEED
from on_gpu.tiny_roles import (
    BATCH,
    LATENT_SHAPE,
    TEXT_LENGTH,
    TINY_WAN,
    Errors,
    Named,
    Roles,
    flat,
    relative_errors,
)
from sgmd_core.objectives import Objective
from sgmd_core.objectives.dmd import DmdObjective
from sgmd_core.objectives.dmd2 import Dmd2Objective
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.objectives.sid import SidObjective
from sgmd_core.objectives.tsg_fisher import TsgFisherObjective
from sgmd_core.objectives.tsg_sim import TsgSimObjective
from sgmd_core.types import MicroBatchKey, Purpose
from workers.models.wan import load_vae
from workers.models.wan_text import load_text
from workers.network_settings import ComputeSettings

OBJECTIVES: Mapping[str, Objective] = {
    "sgmd released": SgmdObjective(),
    "sgmd paper": SgmdObjective(form="paper"),
    "dmd": DmdObjective(),
    "dmd2": Dmd2Objective(fake_updates=1),
    "tsg_fisher": TsgFisherObjective(fake_updates=1),
    "tsg_sim": TsgSimObjective(fake_updates=1),
    "sid": SidObjective(),
}


def on_roles(exit_step: int, **settings: Any) -> Callable[[str], Errors]:  # noqa: ANN401
    """An iteration on the device against one on the CPU in float32."""

    def compare(device: str) -> Errors:
        return relative_errors(
            Roles(device, **settings).gather(exit_step=exit_step),
            Roles("cpu").gather(exit_step=exit_step),
        )

    return compare


def fresh(device: str) -> Errors:
    """Tracking on samples of its own, after a signal that leaves the parameters alone."""

    def outcome(place: str) -> Named:
        roles = Roles(place, tracking="fresh")
        found = roles.gather(track=False)
        if "gradient of the fake_score" in found:
            raise AssertionError("the signal has left a gradient in the fake score's parameters")
        key = MicroBatchKey(0, 0, Purpose.TRACK)
        roles.fake_score.track(roles.roll_out(key, BATCH[0], 2), 1.0)
        return found | roles.gradients()

    return relative_errors(outcome(device), outcome("cpu"))


def methods(device: str) -> Errors:
    """The signal of every objective."""
    errors: Errors = {}
    for name, objective in OBJECTIVES.items():
        found, expected = (
            Roles(place, objective=objective).gather(track=True)["signal"]
            for place in (device, "cpu")
        )
        errors |= relative_errors({name: found}, {name: expected})
    return errors


def update(device: str) -> Errors:
    """The change of weights and averaged weights in two updates from the same gradients."""
    source = Roles("cpu")
    source.gather()

    def changes(place: str) -> Named:
        roles = Roles(place)
        found: Named = {}
        for name, role in (("generator", roles.generator), ("fake_score", roles.fake_score)):
            network = roles.networks[name]
            before = flat(network.parameters()).clone()
            for iteration in range(2):
                for value, other in zip(
                    network.parameters(), source.networks[name].parameters(), strict=True
                ):
                    given = other.grad
                    value.grad = None if given is None else given.to(place) * (1 + iteration)
                role.gradient_report(iteration)
                role.step(iteration)
            found[name] = flat(network.parameters()) - before
            if name == "generator":
                average = flat(roles.generator.final_weights().values())
                found["average"] = average - before
        return found

    return relative_errors(changes(device), changes("cpu"))


def shared(device: str) -> Errors:
    """One forward pass of the fake score that serves both losses, against one for each."""
    return relative_errors(
        Roles(device).gather(), Roles(device, tracking="fresh").gather(track=True)
    )


def accumulation(device: str) -> Errors:
    """Gradients of one batch in two parts."""
    halves, whole = Roles(device), Roles(device)
    halves.gather(((0,), (1,)))
    whole.gather()
    return relative_errors(halves.gradients(), whole.gradients())


def computed(**settings: Any) -> Callable[[str], Errors]:  # noqa: ANN401
    """A setting of computing, against the plain one on the same device."""

    def compare(device: str) -> Errors:
        plain = replace(ComputeSettings(**settings), checkpointing=False, compile=False)
        return relative_errors(
            Roles(device, ComputeSettings(**settings)).gather(), Roles(device, plain).gather()
        )

    return compare


def checkpoint(device: str) -> Errors:
    """Weights, moments and average: from the device to the CPU and back."""
    first = Roles(device)
    first.gather()
    for role in (first.generator, first.fake_score):
        role.gradient_report(0)
        role.step(0)
    wanted = _state(first)
    errors: Errors = {}
    saved = first
    with tempfile.TemporaryDirectory() as scratch:
        for place in ("cpu", device):
            folder = str(Path(scratch) / place.replace(":", "-"))
            saved.generator.save(folder)
            saved.fake_score.save(folder)
            loaded = Roles(place)
            loaded.generator.load(folder)
            loaded.fake_score.load(folder)
            found = relative_errors(_state(loaded), wanted)
            errors |= {f"{name}, on {place}": error for name, error in found.items()}
            saved = loaded
    return errors


def models(device: str) -> Errors:
    """Embeddings of captions, and latents and pictures of the autoencoder."""
    captions = ["a red circle moves left quickly", ""]
    generator = torch.Generator().manual_seed(SEED)
    latents = torch.randn(1, *LATENT_SHAPE, generator=generator)

    def outcome(place: str) -> Named:
        text, vae = load_text(TINY_WAN), load_vae(TINY_WAN)
        nn.Module.to(text.text_encoder, place)
        nn.Module.to(vae.vae, place)
        video = vae.decode(latents.to(place))
        return {
            "embeddings": text.encode(captions, TEXT_LENGTH),
            "pictures": video,
            "latents": vae.encode(video),
        }

    return relative_errors(outcome(device), outcome("cpu"))


def wire(device: str) -> Errors:
    """A query as arrays and back."""
    query = Roles(device).roll_out(MicroBatchKey(0, 0), BATCH[0], 1)
    sent: Any = from_wire(to_wire(query, "a query"))
    return relative_errors({"samples": sent.x0}, {"samples": query.x0})


@dataclass(frozen=True, slots=True)
class Truth:
    """Something that must hold on every device.

    Attributes:
        bound: Largest error that will do.
        compare: Finds the errors on a device, by what was compared.
    """

    bound: float
    compare: Callable[[str], Errors]

    def hold(self, device: str) -> dict[str, Any]:
        """The errors, whether they hold, or why there are none."""
        try:
            errors = self.compare(device)
        except Exception as error:  # Whatever it is: the next truth is tried all the same.
            return {"holds": False, "failed": f"{type(error).__name__}: {error}"[:2000]}
        # A comparison that NaN fails.
        holds = all(error <= self.bound for error in errors.values())
        return {"holds": holds, "bound": self.bound, "errors": errors}


TRUTHS: Mapping[str, Truth] = {
    "roles_fp32": Truth(1e-4, on_roles(1)),
    "roles_late": Truth(1e-4, on_roles(NUM_STEPS - 1)),
    "roles_bf16": Truth(0.1, on_roles(1, compute=ComputeSettings(precision="bf16"))),
    "fresh": Truth(1e-4, fresh),
    "methods": Truth(1e-4, methods),
    "update": Truth(1e-4, update),
    "shared": Truth(1e-4, shared),
    "accumulation": Truth(1e-4, accumulation),
    "checkpointing": Truth(1e-5, computed(checkpointing=True)),
    "checkpointing_bf16": Truth(1e-2, computed(precision="bf16", checkpointing=True)),
    "checkpoint": Truth(0.0, checkpoint),
    "models": Truth(1e-3, models),
    "wire": Truth(0.0, wire),
    "compile": Truth(1e-4, computed(compile=True, checkpointing=True)),
}
LAST = "compile"
"""It takes longest, and may take all the time there is: everything else comes before it."""


def _state(roles: Roles) -> Named:
    """Returns the state that checkpoints keep, by way of the roles and their optimizers."""
    found = {
        "generator": flat(roles.generator.trained_weights().values()),
        "average": flat(roles.generator.final_weights().values()),
        "fake score": flat(roles.networks["fake_score"].parameters()),
    }
    for name, role in (("generator", roles.generator), ("fake score", roles.fake_score)):
        moments = role._optimizer.state().moments
        found[f"moments of the {name}"] = flat(
            moments[key].float().cpu() for key in sorted(moments)
        )
    return found
