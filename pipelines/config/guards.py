"""Settings of the numerical guards: which updates are skipped, and how many of them."""

from pydantic import Field

from pipelines.config.section import Section


class GuardSettings(Section):
    """Updates that are skipped because of their gradient, and the limit that ends the run."""

    max_skipped: int = Field(default=3, ge=0)
    """Iterations with a skipped update among the last `window`; one more ends the run. 0 ends it
    at the first loss or gradient that is not finite."""
    window: int = Field(default=100, ge=1)
    """Iterations that `max_skipped` counts over."""
    spike_factor: float | None = Field(default=None, gt=1)
    """An update is skipped whose gradient norm is above so many times the median of the last ones;
    null skips none for its norm."""
    spike_window: int = Field(default=128, ge=2)
    """Norms that the median runs over; none counts as a spike before half of them are known."""
