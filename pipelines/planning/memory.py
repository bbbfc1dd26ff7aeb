"""Bytes that one rank of each role needs.

    state      its share of weights, gradients, Adam's moments, average           sharded over ranks
               and of a frozen expert that a generator's rollouts begin with
    base       frozen weights: the teacher's, and those under adapters            once a process
               a discriminator has a copy of the teacher of its own, in `state`
    gathered   two layers' weights and one layer's gradient, whole                if sharded
    graphs     what the passes that wait for a signal keep                        by depth
    working    the widest place of a pass; with checkpointing a layer made again
    host       its share of what settings keep in main memory                     beside the GPU's
    saves      its share of the state again, in main memory, from its first save  learners

Torch's plain kernel of attention holds all pairs of tokens: by `compute.attention: _native_math`,
and in the derivative in forward mode that a method with a consistency term takes of its generator,
which carries a second of every activation along, in float32, and keeps no graph.

Everything but products of matrices and frozen weights is float32: weights are cast where they are
used. The teacher keeps weights and nothing else. Roles with adapters in a process share one base
with each other and with the teacher; a teacher in processes of its own is sharded over its ranks.
"""

from dataclasses import dataclass
from typing import Any

from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, TEACHER
from pipelines.planning.hardware import GB, Hardware
from pipelines.planning.kept_bytes import (
    companion_bytes,
    frozen_bytes,
    kept_copies,
    pair_bytes,
    stream_bytes,
    teacher_bytes,
)
from pipelines.planning.traffic import weight_bytes
from pipelines.planning.workload import Workload, remember
from workers.models.shape import DenoiserShape

_FLOAT = 4
# Fitted to counted bytes; the tests hold them against networks.
_PAIRS = {"pass": 2, "layer": 3, "derivative": 5}
_STREAMS = {"pass": 9, "derivative": 13}
_TANGENTS = 3
"""Widest place of a pass with a derivative beside attention, over that of one without."""


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank, by what they are for."""

    state: float
    gathered: float
    graphs: float
    working: float
    host: float = 0.0
    base: float = 0.0
    saves: float = 0.0

    @property
    def total(self) -> float:
        """All of it on the GPU, without what CUDA and NCCL take for themselves."""
        return self.state + self.base + self.gathered + self.graphs + self.working

    @property
    def main_memory(self) -> float:
        """All of it outside of the GPU, without what Python and its libraries take."""
        return self.host + self.saves

    def fits(self, hardware: Hardware) -> bool:
        """Returns True if a GPU holds it and leaves room for an allocator, and main memory too."""
        room = GB * hardware.host_memory_gb
        return self.total <= hardware.usable_bytes and self.main_memory <= room

    def to_json(self) -> dict[str, Any]:
        """Parts and total in GB, rounded to hundredths; parts that are 0 may be missing."""
        parts = {"state": self.state, "gathered": self.gathered}
        parts |= {"graphs": self.graphs, "working": self.working, "total": self.total}
        parts |= {"host": self.host} if self.host else {}
        parts |= {"base": self.base} if self.base else {}
        parts |= {"saves": self.saves} if self.saves else {}
        return {name: round(value / GB, 2) for name, value in parts.items()}


@remember
def generator_memory(work: Workload, ranks: int, samples: float, kept: float) -> RankMemory:
    """A rank of the generator.

    Args:
        work: The iteration.
        ranks: Ranks that share the network.
        samples: Of a micro-batch, on this rank.
        kept: Samples on this rank whose rollouts wait for a signal.
    """
    # A rollout that also makes samples off its trajectory keeps two graphs.
    return _learner_memory(
        work, GENERATOR, ranks, samples, kept * (1 + work.kind.looks.off_trajectory)
    )


@remember
def fake_score_memory(work: Workload, ranks: int, samples: float, kept: float) -> RankMemory:
    """A rank of the fake score; see `generator_memory`."""
    return _learner_memory(work, FAKE_SCORE, ranks, samples, kept)


@remember
def teacher_memory(
    work: Workload, ranks: int, samples: float, *, shares_base: bool = False
) -> RankMemory:
    """A rank of a teacher replica that is asked about some samples at a time.

    Args:
        work: The iteration.
        ranks: Ranks of the replica.
        samples: Of a micro-batch, on this rank.
        shares_base: Roles with adapters are in the same process.
    """
    passes = samples * (2 if work.guided and not work.in_turn else 1)
    shape = work.shape_of(TEACHER)
    widest = _passing(work, TEACHER)
    if work.kind.through_teacher:
        widest = _graph(work, TEACHER) + _layer(work, TEACHER)
    ranks = 1 if work.teacher_whole else ranks
    # Its graph keeps the weights that a pass through the input has made of them.
    widened = work.kind.through_teacher and work.teacher_weights == "fp8"
    return RankMemory(
        state=(0.0 if shares_base else teacher_bytes(work) / ranks)
        + 2 * shape.num_parameters * widened,
        gathered=0.0
        if shares_base
        else weight_bytes(work, TEACHER) * _gathered(shape, ranks, layers=2),
        graphs=0.0,
        working=passes * widest,
        base=frozen_bytes(work, TEACHER) if shares_base else 0.0,
    )


@remember
def discriminator_memory(work: Workload, ranks: int, samples: float) -> RankMemory:
    """A rank of a discriminator: the teacher's copy, the heads' state, one graph and features.

    Args:
        work: The iteration.
        ranks: Ranks that share the networks.
        samples: Of a micro-batch, on this rank.
    """
    heads, kept = work.heads, kept_copies(work, DISCRIMINATOR)
    assert heads is not None, "this iteration has no discriminator"
    share, shape = _FLOAT * heads.num_parameters / ranks, work.shape_of(DISCRIMINATOR)
    # The heads' graph holds the features of all states, in float32.
    tokens = shape.num_tokens(work.latent_shape)
    features = _FLOAT * heads.num_heads * work.kind.compared_states * tokens * shape.width
    return RankMemory(
        state=(2 + kept.moments - kept.on_host) * share + frozen_bytes(work, DISCRIMINATOR) / ranks,
        gathered=weight_bytes(work, DISCRIMINATOR) * _gathered(shape, ranks, layers=2),
        graphs=0.0,
        working=samples * (_graph(work, DISCRIMINATOR) + _layer(work, DISCRIMINATOR) + features),
        host=kept.on_host * share,
        saves=(1 + kept.moments) * share,
    )


def _learner_memory(
    work: Workload, role: str, ranks: int, samples: float, waiting: float
) -> RankMemory:
    shape = work.shape_of(role)
    trained = work.num_trained(role)
    share, of_all = _FLOAT * trained / ranks, trained / shape.num_parameters
    kept = kept_copies(work, role)
    offloaded = waiting * stream_bytes(work, role) * (role in work.offloading)
    start = share * (role == FAKE_SCORE and work.restarts)
    # Weights and moments, while copies of the fake score are trained on.
    measured = (1 + kept.moments) * share * (role == FAKE_SCORE and work.measures_lag)
    passing = _passing(work, role)
    if role == GENERATOR and work.kind.consistency:
        passing = max(passing, derivative_bytes(work, role))
    return RankMemory(
        state=(2 + kept.moments + kept.averages - kept.on_host) * share
        + companion_bytes(work, ranks) * (role == GENERATOR),
        # Weights of two layers; a layer's gradient in their type, and in that of the sum.
        gathered=of_all
        * (
            weight_bytes(work, role) * _gathered(shape, ranks, layers=3)
            + (_FLOAT * _gathered(shape, ranks, layers=1, ends=1) if role in work.bf16 else 0)
        ),
        graphs=waiting * _graph(work, role) - offloaded,
        working=samples * max(passing, _layer(work, role) if role in work.checkpointing else 0),
        host=kept.on_host * share + offloaded + start + measured,
        base=frozen_bytes(work, role),
        saves=(1 + kept.moments + kept.averages) * share,
    )


def _gathered(shape: DenoiserShape, ranks: int, layers: int, ends: int = 2) -> int:
    """Parameters that a rank of several holds whole: some layers, and what is not in layers."""
    beside = shape.num_parameters - shape.num_layers * shape.parameters_per_layer
    return layers * shape.parameters_per_layer + ends * beside if ranks > 1 else 0


@remember
def _graph(work: Workload, role: str) -> float:
    graph = work.shape_of(role).graph_bytes(
        work.latent_shape,
        work.text_length,
        bf16=role in work.bf16,
        checkpointing=role in work.checkpointing,
    )
    if role in work.all_pairs and role not in work.checkpointing:
        graph += work.shape_of(role).num_passed_layers * pair_bytes(work, role)
    return graph + (stream_bytes(work, role) if role in work.selective else 0)


@remember
def _passing(work: Workload, role: str) -> float:
    """A pass without a graph, at its widest place."""
    shape = work.shape_of(role)
    widest = shape.transient_bytes(work.latent_shape, bf16=role in work.bf16)
    return max(widest, _at_attention(work, role, "pass")) if role in work.all_pairs else widest


def derivative_bytes(work: Workload, role: str) -> float:
    """Bytes of a pass that carries a derivative along, at its widest place, for one sample.

    Args:
        work: The iteration.
        role: Whose network it is.
    """
    shape = work.shape_of(role)
    beside = _TANGENTS * shape.transient_bytes(work.latent_shape, bf16=False)
    return max(beside, _at_attention(work, role, "derivative"))


def _at_attention(work: Workload, role: str, kind: str) -> float:
    shape = work.shape_of(role)
    stream = _FLOAT * shape.num_tokens(work.latent_shape) * shape.width
    return _PAIRS[kind] * pair_bytes(work, role) + _STREAMS[kind] * stream


@remember
def _layer(work: Workload, role: str) -> float:
    """A layer whose activations are made again, and the gradients on their way through it."""
    shape = work.shape_of(role)
    stream = shape.num_tokens(work.latent_shape) * shape.width
    again = shape.layer_graph_bytes(work.latent_shape, work.text_length, bf16=role in work.bf16)
    pairs = _PAIRS["layer"] * pair_bytes(work, role) if role in work.all_pairs else 0
    return again + 3 * _FLOAT * stream + pairs
