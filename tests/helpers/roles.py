"""The roles over tiny networks in one process, and an iteration written out plainly."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgmd_core.buckets import LatentBuckets
from sgmd_core.objectives import GradientPath, Objective
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.types import Draws, MicroBatchKey, NoisedBatch, Purpose, Text, TextBatch
from tests.helpers.tiny_wan import LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, tiny_velocity
from workers.adapters import add_adapters
from workers.base_networks import view_of
from workers.compute import prepare_network
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.network_settings import ComputeSettings, LoraSettings, OptimizerSettings
from workers.score_teacher import ScoreTeacher
from workers.settings import (
    DiversitySettings,
    FakeScoreSettings,
    GeneratorSettings,
    TeacherSettings,
)
from workers.sharding import num_ranks, shard

SEED = 11


@dataclass
class Roles:
    """The three roles and the networks inside of them."""

    generator: GeneratorLearner
    fake_score: FakeScoreTracker
    teacher: ScoreTeacher
    networks: dict[str, nn.Module]
    shared_tracking: bool
    objective: Objective
    diversity: DiversitySettings
    mixes_weights: bool
    together: int = 1
    """Ranks that work on samples together."""


def tiny_roles(
    tracking: str = "shared",
    form: str = "released",
    ema_decay: float = 0.99,
    lr: float = 1e-3,
    guidance_scale: float = 2.0,
    objective: Objective | None = None,
    diversity: DiversitySettings | None = None,
    ida_decay: float = 1.0,
    compute: ComputeSettings | None = None,
    lora: LoraSettings | None = None,
    betas: tuple[float, float] = (0.0, 0.999),
    offloaded: bool = False,
    moment_bits: Literal[8, 32] = 32,
    latent_shape: tuple[int, int, int, int] | LatentBuckets = LATENT_SHAPE,
    walk: Literal["apart", "joint"] = "apart",
) -> Roles:
    """Three different tiny Wans, so that no term of the objective vanishes.

    In a process group, generator and fake score are sharded over its ranks.
    """
    networks = {
        "generator": tiny_velocity(1),
        "fake_score": tiny_velocity(2),
        "teacher": tiny_velocity(3),
    }
    for role in ("generator", "fake_score") if lora is not None else ():
        networks[role] = view_of(networks[role])
        add_adapters(networks[role], lora, SEED, role)
    for network in networks.values():
        prepare_network(network, compute or ComputeSettings())
    for role in ("generator", "fake_score"):
        network = networks[role]
        shard(network, network.blocks, dtype=network.autocast_dtype)
    place = "cpu" if offloaded else "device"
    optimizer = OptimizerSettings(
        lr=lr, max_grad_norm=1.0, betas=betas, moments=place, moment_bits=moment_bits
    )
    objective = objective or SgmdObjective(form=form)
    diversity = diversity or DiversitySettings()
    return Roles(
        generator=GeneratorLearner(
            networks["generator"],
            FlowMatchSchedule(),
            GeneratorSettings(
                ema_decay=ema_decay,
                ema_device=place,
                diversity=diversity,
                optimizer=optimizer,
                compute=compute or ComputeSettings(),
            ),
            latent_shape,
            SEED,
        ),
        fake_score=FakeScoreTracker(
            networks["fake_score"],
            objective,
            FakeScoreSettings(
                tracking=tracking,
                ida_decay=ida_decay,
                optimizer=optimizer,
                compute=compute if compute is not None and walk == "joint" else ComputeSettings(),
                walk=walk,
            ),
        ),
        teacher=ScoreTeacher(networks["teacher"], TeacherSettings(guidance_scale=guidance_scale)),
        networks=networks,
        shared_tracking=tracking == "shared",
        objective=objective,
        diversity=diversity,
        mixes_weights=ida_decay < 1,
        together=1 if compute is None else compute.ulysses,
    )


def text_batch(indices: Sequence[int], iteration: int = 0) -> TextBatch:
    """Embeddings of made-up captions, one for each sample index and iteration."""
    text = torch.zeros(len(indices), TEXT_LENGTH, TEXT_DIM)
    for row, index in enumerate(indices):
        generator = torch.Generator().manual_seed(1000 * iteration + index)
        text[row, :4] = torch.randn(4, TEXT_DIM, generator=generator)
    return TextBatch(text=text, sample_indices=tuple(indices))


def negative_text() -> Text:
    """Embedding of a made-up negative prompt."""
    return text_batch([999]).text


def key_of(iteration: int, micro_batch: int = 0, purpose: Purpose = Purpose.GENERATE):
    """Key of a micro-batch."""
    return MicroBatchKey(iteration, micro_batch, purpose)


def part_of(batch: Sequence[int], together: int = 1) -> Sequence[int]:
    """The samples of a batch that are this rank's; all of them without a process group."""
    width = len(batch) * together // max(together, num_ranks())
    group = dist.get_rank() // together if num_ranks() > 1 else 0
    return batch[group * width : (group + 1) * width]


def gather(
    roles: Roles,
    iteration: int,
    batches: Sequence[Sequence[int]],
    draws: Sequence[Draws | None] | None = None,
    signal_factor: float = 1.0,
) -> list[NoisedBatch]:
    """All of an iteration's shared half: gradients gathered, nothing updated.

    In a process group each rank takes its part of every micro-batch.
    """
    num_samples = sum(len(batch) for batch in batches)
    queries: list[NoisedBatch] = []
    for index, batch in enumerate(batches):
        own = part_of(batch, roles.together)
        share = len(own) / num_samples
        text = text_batch(own, iteration)
        handed = None if draws is None else draws[index]
        query = roles.generator.rollout(key_of(iteration, index), text, handed)
        prediction = roles.teacher.denoise(query, negative_text())
        signal = roles.fake_score.signal(query, prediction, share * signal_factor)
        if roles.objective.path is GradientPath.BOTH_SCORES:
            signal = roles.teacher.pullback(query, negative_text(), signal)
        roles.generator.learn(signal)
        if roles.diversity.enabled:
            start = roles.generator.start(key_of(iteration, index), text, handed)
            target = roles.teacher.anchor(start, negative_text())
            roles.generator.diversify(start, target, share)
        if roles.shared_tracking:
            roles.fake_score.track(query, share)
        queries.append(query)
    return queries


def iterate(roles: Roles, iteration: int, batches: Sequence[Sequence[int]] = ((0, 1), (2, 3))):
    """One whole iteration, in the order of either tracking mode."""
    gather(roles, iteration, batches)
    roles.generator.gradient_report(iteration)
    if roles.shared_tracking:
        roles.fake_score.gradient_report(iteration)
        roles.generator.step(iteration)
    else:
        roles.generator.step(iteration)
        if roles.mixes_weights:
            mix_weights(roles)
        num_samples = sum(len(batch) for batch in batches)
        for update in range(roles.objective.fake_updates):
            if update:
                roles.fake_score.step(iteration)
            for index, batch in enumerate(batches):
                key = key_of(iteration, update * len(batches) + index, Purpose.TRACK)
                own = part_of(batch, roles.together)
                counted = [update * num_samples + sample for sample in own]
                query = roles.generator.sample(key, text_batch(counted, iteration + 500))
                roles.fake_score.track(query, len(own) / num_samples)
            roles.fake_score.gradient_report(iteration)
    roles.fake_score.step(iteration)


def make_extra(roles: Roles, iteration: int, updates: int = 3) -> float:
    """Extra updates of the fake score, as a measurement of its lag makes them, not taken back.

    Returns:
        The held loss after them, of this rank's sample.
    """
    roles.fake_score.begin_extra(iteration)
    for update in range(updates):
        own = part_of((2 * update, 2 * update + 1))
        query = roles.generator.sample(key_of(iteration, update, Purpose.LAG), text_batch(own))
        roles.fake_score.extra_track(query, len(own) / 2)
        roles.fake_score.extra_step(2.0)
    return held_loss(roles, iteration)


def held_loss(roles: Roles, iteration: int) -> float:
    """Tracking loss on held samples, of this rank's sample."""
    key = key_of(iteration, 99, Purpose.LAG)
    query = roles.generator.sample(key, text_batch(part_of((100, 101))))
    return roles.fake_score.held_loss(query).metrics["held"]


def mix_weights(roles: Roles) -> None:
    """Mixes the generator's weights into the fake score, which every rank gets from the first."""
    handed = [roles.generator.trained_weights()]
    if num_ranks() > 1:
        dist.broadcast_object_list(handed)
    roles.fake_score.mix_weights(handed[0])


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """A copy of all gradients that a network holds."""
    return {
        name: value.grad.clone()
        for name, value in network.named_parameters()
        if value.grad is not None
    }


def weights(network: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's weights."""
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal to the last bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def poisoned(query: NoisedBatch) -> NoisedBatch:
    """The query with one NaN in its samples."""
    x0 = query.x0.clone()
    x0[0, 0, 0, 0, 0] = float("nan")
    return replace(query, x0=x0)
