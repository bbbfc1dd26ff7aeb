"""Sizes that the steps run at: Wan 1.3B on a GPU, and the same steps small enough for a CPU.

The roles are those of `workers`, over networks of random weights.
"""

import gc
from dataclasses import dataclass, field, replace

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.seeds import draw
from sgmd_core.types import Draws, MicroBatchKey, TextBatch
from workers.compute import prepare_network
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.models.shape import PassFlops
from workers.models.wan import WanVelocity
from workers.models.wan_arithmetic import WanShape
from workers.network_settings import ComputeSettings
from workers.score_teacher import ScoreTeacher
from workers.settings import FakeScoreSettings, GeneratorSettings, TeacherSettings

SHAPES = {
    "1.3b": WanShape(num_layers=30, width=1536, ffn_width=8960),
    "14b": WanShape(num_layers=40, width=5120, ffn_width=13824),
    "tiny": WanShape(2, 64, 160, text_width=24, freq_width=16, in_channels=4, out_channels=4),
}
HEAD_SIZES = {"1.3b": 128, "14b": 128, "tiny": 32}
FRAMES = {"1.3b": (81, 49, 33, 17), "14b": (81, 49, 33, 17), "tiny": (9, 5)}
NUM_STEPS = 4
SEED = 0


@dataclass(frozen=True, slots=True)
class Case:
    """A case to measure.

    Attributes:
        model: Key of `SHAPES`.
        num_frames: Video frames of a clip.
        device: Where.
        compute: How the networks that learn are computed; the teacher's activations are not kept,
            and made once.
    """

    model: str
    num_frames: int
    device: str
    compute: ComputeSettings = field(
        default_factory=lambda: ComputeSettings(precision="bf16", checkpointing=True)
    )

    @property
    def shape(self) -> WanShape:
        """The networks."""
        return SHAPES[self.model]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, rows, columns: of 480x832 pixels, or of a few."""
        rows, columns = (8, 8) if self.model == "tiny" else (60, 104)
        return (self.shape.in_channels, (self.num_frames - 1) // 4 + 1, rows, columns)

    @property
    def text_length(self) -> int:
        """Text positions."""
        return 16 if self.model == "tiny" else 512

    @property
    def flops(self) -> PassFlops:
        """Operations of the passes of one sample."""
        return self.shape.pass_flops(self.latent_shape, self.text_length)

    def network(self, compute: ComputeSettings | None = None) -> WanVelocity:
        """A denoiser with random weights, made on the device; a new one every time."""
        shape = self.shape
        with torch.device(self.device):
            transformer = WanTransformer3DModel(
                patch_size=shape.patch_size,
                num_attention_heads=shape.width // HEAD_SIZES[self.model],
                attention_head_dim=HEAD_SIZES[self.model],
                in_channels=shape.in_channels,
                out_channels=shape.out_channels,
                text_dim=shape.text_width,
                freq_dim=shape.freq_width,
                ffn_dim=shape.ffn_width,
                num_layers=shape.num_layers,
            )
        return prepare_network(WanVelocity(transformer), compute or self.compute)

    def generator(self) -> GeneratorLearner:
        """The generator with averaged weights, as the recipe `wan21-1.3b` has it."""
        settings = GeneratorSettings(num_steps=NUM_STEPS, compute=self.compute)
        schedule = FlowMatchSchedule()
        return GeneratorLearner(self.network(), schedule, settings, self.latent_shape, SEED)

    def fake_score(self) -> FakeScoreTracker:
        """The fake score with shared tracking."""
        return FakeScoreTracker(self.network(), SgmdObjective(), FakeScoreSettings())

    def teacher(self) -> ScoreTeacher:
        """The teacher, guided, both predictions as one batch."""
        compute = replace(self.compute, checkpointing=False)
        return ScoreTeacher(self.network(compute), TeacherSettings(guidance_scale=3.0))

    def text(self, samples: int = 1) -> Tensor:
        """Embeddings of made-up captions on the device."""
        made = torch.randn(samples, self.text_length, self.shape.text_width)
        return made.to(self.device)

    def text_batch(self, samples: int = 1) -> TextBatch:
        """The captions of a micro-batch."""
        return TextBatch(self.text(samples), tuple(range(samples)))

    def draws(self, key: MicroBatchKey, exit_step: int, samples: int = 1) -> Draws:
        """Returns the draws of the key, without the exit step."""
        indices = tuple(range(samples))
        drawn = draw(SEED, key, indices, self.latent_shape, FlowMatchSchedule(), NUM_STEPS)
        return replace(drawn, exit_step=exit_step)


def synchronize(device: str) -> None:
    """Waits until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    """Largest memory that tensors took since `reset_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0


def reset_peak(device: str) -> None:
    """Counts peaks from now on."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()


def free(device: str) -> None:
    """Gives back what no tensor uses any more; on a CPU nothing is short."""
    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()
