"""The small numbers that roles report; they may travel through the controller."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class GradientReport:
    """Gradients that a role has accumulated for its next update.

    Attributes:
        grad_norm: Global L2 norm of the gradient, before clipping.
        finite: Whether that norm is a number; where it is not, nothing may be updated.
        blocks: The same norm by layer, where it was asked for.
        learning_rate: Of the update that follows, by the role's own schedule.
    """

    grad_norm: float
    finite: bool
    blocks: Mapping[str, float] = field(default_factory=dict)
    learning_rate: float = 0.0


@dataclass(frozen=True, slots=True)
class LearnReport:
    """Losses of the generator on one signal.

    Attributes:
        metrics: Loss terms of the signal, means over its samples.
        exit_step: The rollout step that received the gradient, counted from 0.
    """

    metrics: Mapping[str, float]
    exit_step: int


@dataclass(frozen=True, slots=True)
class DiversityReport:
    """Losses of the generator on the teacher's path.

    Attributes:
        metrics: `diversity`, the loss without its weight.
    """

    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ConsistencyReport:
    """Losses of the generator on noised data.

    Attributes:
        metrics: Loss terms of the batch, means over its samples.
    """

    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class FlowReport:
    """Losses of the generator's flow head on noised data.

    Attributes:
        metrics: Loss terms of the batch, means over its samples.
    """

    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TrackReport:
    """Losses of the fake score on one batch.

    Attributes:
        metrics: Loss terms of the batch, means over its samples.
    """

    metrics: Mapping[str, float]
