"""Bytes that a role keeps between its passes: weights, their copies, and what a pass holds of them.

`pipelines.planning.memory` adds them up to what a rank needs.
"""

from dataclasses import dataclass

from pipelines.config.roles import DISCRIMINATOR, GENERATOR, TEACHER
from pipelines.planning.workload import Workload
from workers.models.shape import DenoiserShape
from workers.moment_codes import BYTES_PER_ENTRY


@dataclass(frozen=True, slots=True)
class KeptCopies:
    """Copies of a learner's parameters beside weights and gradients.

    Attributes:
        moments: Of the optimizer; moments in 8 bits are a part of a copy.
        averages: 1 where averaged weights are kept.
        on_host: Of both, those in main memory.
    """

    moments: float
    averages: int
    on_host: float


def companion_bytes(work: Workload, ranks: int) -> float:
    """Bytes on a rank of the frozen expert that the generator's rollouts begin with.

    Args:
        work: The iteration.
        ranks: Of the generator; under adapters each of them has it whole.
    """
    adapted = GENERATOR in dict(work.adapters)
    narrow = work.frozen_in_bf16 if adapted else work.bf16
    whole = (2 if GENERATOR in narrow else 4) * work.idle_expert * work.has_companion
    return whole if adapted else whole / ranks


def frozen_bytes(work: Workload, role: str) -> int:
    """Bytes of the weights that a role keeps and does not train."""
    if role == TEACHER:
        return teacher_bytes(work)
    if role == DISCRIMINATOR and work.heads is not None:
        return (2 if work.heads.weights == "bf16" else 4) * work.shape_of(role).num_parameters
    size = 2 if role in work.frozen_in_bf16 else 4
    return size * work.shape_of(role).num_parameters * (role in dict(work.adapters))


def kept_copies(work: Workload, role: str) -> KeptCopies:
    """Copies that a learner keeps of its parameters."""
    second = BYTES_PER_ENTRY / 4 if role in work.moments_in_8_bits else 1
    moments = second + int(role in work.momentum)
    averages = int(role == GENERATOR and work.averages)
    on_host = moments * (role in work.moments_on_cpu) + averages * work.average_on_cpu
    return KeptCopies(moments, averages, on_host)


def teacher_bytes(work: Workload) -> int:
    """Bytes of all weights of the teacher, as they are kept."""
    shape = work.shape_of(TEACHER)
    if work.teacher_weights == "fp8":
        # What is not a layer's stays in bfloat16.
        return shape.num_parameters + _beside_layers(shape)
    return (2 if work.teacher_weights == "bf16" else 4) * shape.num_parameters


def stream_bytes(work: Workload, role: str) -> int:
    """Bytes of the inputs of all layers that one sample passes: those of attention's outputs."""
    shape = work.shape_of(role)
    size = 2 if role in work.bf16 else 4
    tokens = shape.num_tokens(work.latent_shape)
    return size * shape.num_passed_layers * tokens * shape.width


def pair_bytes(work: Workload, role: str) -> int:
    """Bytes of a number for each pair of tokens of a sample and each head, in float32."""
    shape = work.shape_of(role)
    return 4 * shape.num_heads * shape.num_tokens(work.latent_shape) ** 2


def _beside_layers(shape: DenoiserShape) -> int:
    return shape.num_parameters - shape.num_layers * shape.parameters_per_layer
