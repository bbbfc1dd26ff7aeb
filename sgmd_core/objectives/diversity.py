"""An option beside every objective: the generator's first step must go where the teacher goes.

    a      = teacher after k of K guided Euler steps from the generator's own initial noise
    target = (noise - a) / (1 - sigma_k)
    L_div  = weight * mean (velocity_generator(noise, 1) - sg[target])^2

Score matching alone lets samples of one caption grow alike. The teacher's path from this noise
decides what becomes of it, so a first step that follows the path keeps what the noise decides.
While the term is on, no rollout that the generator learns from exits at the first step: this loss
is all that trains it. The fake score of the DMD family still sees what the first step makes.

Source: the authors' released SGMD trainer, where it is on for Wan 1.3B and off for 14B.
"""

from sgmd_core.types import Latents, Scalar, float32


def anchor_velocity(noise: Latents, anchor: Latents, anchor_sigma: float) -> Latents:
    """Mean velocity of the teacher's path from pure noise to its anchor.

        velocity = (noise - anchor) / max(1 - anchor_sigma, 1e-8)

    Args:
        noise: Initial noise, the state at sigma 1.
        anchor: The teacher's state at `anchor_sigma`.
        anchor_sigma: Noise level of the anchor, below 1.

    Returns:
        Velocity in the direction of growing sigma, as networks predict it.
    """
    return (noise - anchor) / max(1 - anchor_sigma, 1e-8)


def diversity_loss(velocity: Latents, target: Latents) -> Scalar:
    """Mean squared distance of the generator's first velocity to `anchor_velocity`.

    Args:
        velocity: Generator's prediction at pure noise, with its graph.
        target: `anchor_velocity`; a constant.

    Returns:
        Scalar in float32 or wider, without its weight.
    """
    return (float32(velocity) - float32(target).detach()).square().mean()
