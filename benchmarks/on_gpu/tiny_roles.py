"""The three roles over the tiny Wan that ships, on any device, always with the same weights.

Generator and fake score carry seeded noise on their weights: between three equal networks the
losses would vanish.
"""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from on_gpu.cases import NUM_STEPS, SEED
from sgmd_core.objectives import GradientPath, Objective
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.seeds import draw
from sgmd_core.types import MicroBatchKey, NoisedBatch, Purpose, TextBatch
from workers.compute import prepare_network
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.models.wan import WanVelocity, load_transformer
from workers.models.wan_folder import inspect_wan_folder
from workers.network_settings import ComputeSettings, OptimizerSettings
from workers.score_teacher import ScoreTeacher
from workers.settings import FakeScoreSettings, GeneratorSettings, TeacherSettings
from workers.sharding import full_tensor, shard

TINY_WAN = Path(__file__).resolve().parents[2] / "assets" / "tiny-wan"
TEXT_LENGTH = 16
_FOLDER = inspect_wan_folder(str(TINY_WAN))
LATENT_SHAPE = _FOLDER.latent_shape(13, 32, 32)
BATCH = ((0, 1),)
Named = dict[str, Tensor]
Errors = dict[str, float]


class Roles:
    """The three roles on a device; always the same weights.

    Args:
        device: Where.
        compute: How the networks are computed.
        objective: Both losses.
        tracking: `shared` or `fresh`.
        sharded: Spread generator and fake score over the ranks of the process group, even over one.
    """

    def __init__(
        self,
        device: str,
        compute: ComputeSettings | None = None,
        objective: Objective | None = None,
        tracking: str = "shared",
        *,
        sharded: bool = False,
    ) -> None:
        self.device = device
        self.objective = objective or SgmdObjective()
        self.networks = {
            name: prepare_network(deepcopy(_loaded()), compute or ComputeSettings())
            for name in ("generator", "fake_score", "teacher")
        }
        for seed, name in enumerate(("generator", "fake_score")):
            _disturb(self.networks[name], seed)
        for network in self.networks.values():
            nn.Module.to(network, device)
        if sharded:
            for name in ("generator", "fake_score"):
                shard(self.networks[name], self.networks[name].blocks, alone=True)
        # A rate at which an update is far larger than the rounding of a weight.
        optimizer = OptimizerSettings(lr=1e-2)
        self.generator = GeneratorLearner(
            self.networks["generator"],
            FlowMatchSchedule(),
            GeneratorSettings(num_steps=NUM_STEPS, optimizer=optimizer),
            LATENT_SHAPE,
            SEED,
        )
        self.fake_score = FakeScoreTracker(
            self.networks["fake_score"],
            self.objective,
            FakeScoreSettings(tracking=tracking, optimizer=optimizer),
        )
        self.teacher = ScoreTeacher(self.networks["teacher"], TeacherSettings(guidance_scale=2.0))
        self.negative = _text((999,))

    def gather(
        self,
        parts: Sequence[tuple[int, ...]] = BATCH,
        exit_step: int = 1,
        *,
        track: bool = True,
        total: int | None = None,
    ) -> Named:
        """All of an iteration but the updates; what each role made of its last micro-batch.

        Args:
            parts: Samples of each micro-batch.
            exit_step: Of all rollouts.
            track: Whether the fake score learns from them.
            total: Samples of the iteration, where these are one rank's.
        """
        total = total or sum(len(part) for part in parts)
        found: Named = {}
        for index, part in enumerate(parts):
            share = len(part) / total
            query = self.roll_out(MicroBatchKey(0, index), part, exit_step)
            prediction = self.teacher.denoise(query, self.negative)
            signal = self.fake_score.signal(query, prediction, share)
            if self.objective.path is GradientPath.BOTH_SCORES:
                signal = self.teacher.pullback(query, self.negative, signal)
            if track:
                self.fake_score.track(query, share)
            self.generator.learn(signal)
            found |= {"samples": query.x0, "teacher": prediction.velocity, "signal": signal.grad_x0}
        return found | self.gradients()

    def roll_out(self, key: MicroBatchKey, part: tuple[int, ...], exit_step: int) -> NoisedBatch:
        """Samples of the generator, with the draws of the key except for the exit step."""
        drawn = draw(SEED, key, part, LATENT_SHAPE, FlowMatchSchedule(), NUM_STEPS)
        draws = replace(drawn, exit_step=exit_step)
        make = self.generator.sample if key.purpose is Purpose.TRACK else self.generator.rollout
        return make(key, TextBatch(_text(part), part), draws)

    def gradients(self) -> Named:
        """Gradients of both networks, each as one vector."""
        return {
            f"gradient of the {name}": flat(
                full_tensor(value.grad)
                for value in self.networks[name].parameters()
                if value.grad is not None
            )
            for name in ("generator", "fake_score")
            if any(value.grad is not None for value in self.networks[name].parameters())
        }


def relative_errors(found: Named, expected: Named) -> Errors:
    """Largest difference over the largest entry, by name; NaN differs from everything.

    Raises:
        ValueError: They do not hold the same names.
    """
    if found.keys() != expected.keys():
        raise ValueError(f"compared {sorted(found)} with {sorted(expected)}")
    errors: Errors = {}
    for name, value in expected.items():
        wanted = value.detach().double().cpu()
        difference = (found[name].detach().double().cpu() - wanted).abs().max()
        errors[name] = float(difference / wanted.abs().max())
    return errors


def flat(tensors: Any) -> Tensor:  # noqa: ANN401  (an iterable of tensors)
    """All tensors in one vector."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def exact_float32() -> None:
    """Leaves products and convolutions of float32 in float32: by default convolutions take TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    warnings.filterwarnings("ignore", message=".*TensorFloat32.*")


@cache
def _loaded() -> WanVelocity:
    """The denoiser that ships; to be copied."""
    return load_transformer(TINY_WAN)


def _text(samples: Sequence[int]) -> Tensor:
    """Embeddings of made-up captions, zero after the fourth token."""
    width = _FOLDER.text_width
    text = torch.zeros(len(samples), TEXT_LENGTH, width)
    for row, sample in enumerate(samples):
        generator = torch.Generator().manual_seed(sample)
        text[row, :4] = torch.randn(4, width, generator=generator)
    return text


@torch.no_grad()
def _disturb(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in network.parameters():
        scale = 0.1 * value.std() if value.numel() > 1 else 0.0
        value += scale * torch.randn(value.shape, generator=generator)
