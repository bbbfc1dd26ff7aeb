"""Lag of a fake score, from losses alone: what extra updates of copies of it take off.

    lag = (settled held loss - least held loss of a copy) / held loss before

The tracking loss is E |velocity - target|^2 up to a weight, and

    E |velocity - target|^2 = E |velocity - exact|^2 + E |exact - target|^2
    exact = E[target | x_t]

where the last term is noise that no network can predict, most of the loss as a rule. A drop on held
samples can only come from the first: so, up to the chance of few held samples, the lag is at most
E |velocity - exact|^2 over the loss, whatever the truth is.

Part of the first term is the noise of the fake score's own steps, which its next steps undo and
which is not a lag. A copy loses it in a few updates whose rate falls to 0, and has caught up with
little by then: that copy is settled, and the drop is counted from its loss.
"""

import math
from collections.abc import Mapping


def falling_rate(rate: float, update: int, updates: int) -> float:
    """Rate of one of a copy's updates: it falls linearly, and would be 0 after the last one.

    Noise of large steps would hide the drop.
    """
    return rate * (1 - update / updates)


def settling_updates(updates: int) -> int:
    """Updates after which a copy counts as settled, of so many that others make."""
    return max(1, updates // 4)


def tracking_lag(
    before: float, settled: float, after: Mapping[float, float]
) -> tuple[float, float] | None:
    """Lag, and the rate of the copy that tells it.

    A copy at the fake score's own rate alone would mislead: Adam's steps are as long as the rate,
    so a slow fake score drops in a few updates no further than one that has little to catch up. A
    copy whose rate is too high diverges, and is left out.

    Args:
        before: Held loss.
        settled: Held loss of a copy after `settling_updates` at the fake score's own rate.
        after: Held loss of each copy after its updates, by the multiple of the rate it had.

    Returns:
        None where the loss before, the settled one, or that of every copy, is not a finite number
        above 0.
    """
    finite = {rate: loss for rate, loss in after.items() if math.isfinite(loss)}
    if not (finite and math.isfinite(before) and math.isfinite(settled) and before > 0):
        return None
    best = min(finite, key=lambda rate: finite[rate])
    return (settled - finite[best]) / before, best
