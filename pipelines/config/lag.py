"""Settings of the measured lag of the fake score, and of the governor that acts on it."""

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from pipelines.config.section import Section

Multiple = Annotated[float, Field(gt=0, le=1000)]


class LagSettings(Section):
    """Measurements of the lag, and the governor that a large one sets going."""

    every: int = Field(default=0, ge=0)
    """Iterations between two measurements; 0: none."""
    updates: int = Field(default=16, ge=1, le=10_000)
    """Extra updates of each copy of the fake score, on new samples."""
    batches: int = Field(default=4, ge=1, le=10_000)
    """Held batches that the tracking loss is measured on."""
    rates: tuple[Multiple, ...] = Field(default=(1.0, 10.0), min_length=1, max_length=8)
    """Learning rates of the copies, over that of the fake score, each falling to 0; the copy whose
    loss drops most counts."""
    slow_above: float | None = Field(default=None, gt=0, lt=1)
    """Governor: a larger lag halves the generator's learning rate, a smaller one doubles it again;
    null: never."""
    slowest: float = Field(default=0.0625, gt=0, lt=1)
    """Least share of its learning rate that the governor leaves it."""

    def is_due(self, iteration: int) -> bool:
        """Returns True if the lag is measured before an iteration; never before the first one."""
        return self.every > 0 and iteration > 0 and iteration % self.every == 0

    def contradictions(self) -> Iterable[str]:
        """Sentences on settings that do not fit together."""
        if self.slow_above is not None and not self.every:
            yield (
                f"lag.slow_above is {self.slow_above:g}, but lag.every is 0, so no lag is "
                "measured; set lag.every, or lag.slow_above=null"
            )
