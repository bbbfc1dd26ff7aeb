"""Lag of a fake score, from losses alone: what extra updates of copies of it take off.

    lag = 1 - (least held loss of a copy) / (held loss before)

The tracking loss is E |velocity - target|^2 up to a weight, and

    E |velocity - target|^2 = E |velocity - exact|^2 + E |exact - target|^2
    exact = E[target | x_t]

where the last term is noise that no network can predict, most of the loss as a rule. A drop on held
samples can only come from the first: so, up to the chance of few held samples, the lag is at most
E |velocity - exact|^2 over the loss, whatever the truth is.
"""

import math
from collections.abc import Mapping


def falling_rate(rate: float, update: int, updates: int) -> float:
    """Rate of one of a copy's updates: it falls linearly, and would be 0 after the last one.

    Noise of large steps would hide the drop.
    """
    return rate * (1 - update / updates)


def tracking_lag(before: float, after: Mapping[float, float]) -> tuple[float, float] | None:
    """Lag, and the rate of the copy that tells it.

    A copy at the fake score's own rate alone would mislead: Adam's steps are as long as the rate,
    so a slow fake score drops in a few updates no further than one that has little to catch up. A
    copy whose rate is too high diverges, and is left out.

    Args:
        before: Held loss.
        after: Held loss of each copy after its updates, by the multiple of the rate it had.

    Returns:
        None where the loss before, or that of every copy, is no finite number above 0.
    """
    finite = {rate: loss for rate, loss in after.items() if math.isfinite(loss)}
    if not (finite and math.isfinite(before) and before > 0):
        return None
    best = min(finite, key=lambda rate: finite[rate])
    return 1 - finite[best] / before, best
