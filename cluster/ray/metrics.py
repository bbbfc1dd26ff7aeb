"""Figures on Ray's Prometheus endpoint: every machine of a cluster serves those of its processes.

    process -- value, labels --> Ray's agent of its machine --> http://NODE:PORT/metrics

Ray puts `ray_` before each name and `_total` after those that count, adds its session and machine
as labels, and passes values on every 10 s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Exported:
    """A figure that is exported.

    Attributes:
        name: Its name, without `ray_`; ends with its unit.
        description: Its meaning.
        label: Name of the label that tells its values apart; empty where it has one value.
        counts: Whether it only grows; Ray adds `_total` to its name.
    """

    name: str
    description: str
    label: str = ""
    counts: bool = False

    @property
    def endpoint_name(self) -> str:
        """Name on the endpoint."""
        return f"ray_{self.name}_total" if self.counts else f"ray_{self.name}"


class Metrics:
    """Exports figures of this process, which is connected to Ray.

    Args:
        figures: All that will be set.
        labels: Labels of every value.
    """

    def __init__(self, figures: Sequence[Exported], labels: Mapping[str, str]) -> None:
        from ray.util.metrics import Counter, Gauge

        self._metrics: dict[Exported, Any] = {}
        for figure in figures:
            names = (*labels, *([figure.label] if figure.label else []))
            kind = Counter if figure.counts else Gauge
            metric = kind(figure.name, description=figure.description, tag_keys=names)
            metric.set_default_tags(dict(labels))
            self._metrics[figure] = metric

    def set(self, figure: Exported, value: float, label: str = "") -> None:
        """Sets a figure to a value.

        Args:
            figure: One that does not count.
            value: The value.
            label: Value of its label.
        """
        self._metrics[figure].set(value, {figure.label: label} if figure.label else {})

    def add(self, figure: Exported, amount: float, label: str = "") -> None:
        """Adds to a figure that counts.

        Args:
            figure: The figure.
            amount: How much; nothing is exported before the first amount above 0.
            label: Value of its label.
        """
        if amount > 0:
            self._metrics[figure].inc(amount, {figure.label: label} if figure.label else {})
