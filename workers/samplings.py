"""Ways of sampling clips, and the table of those of a teacher that all who compare clips use.

    reference             guided teacher, many steps, seed A
    floor                 the same with seed B: the distance that chance makes
    teacher_few           teacher, as many steps as the generator, unguided, seed B
    teacher_few_guided    the same, guided, seed B

Seed B is another one than the reference's, or distances would profit from common noise. The sets
of seed B start from the noise of the generator's clips, which are sampled as `teacher_few` is.
"""

from dataclasses import dataclass, replace

REFERENCE = "reference"
FLOOR = "floor"
TEACHER_FEW = "teacher_few"
TEACHER_FEW_GUIDED = "teacher_few_guided"


@dataclass(frozen=True, slots=True)
class Sampling:
    """A way of sampling.

    Attributes:
        num_steps: Euler steps.
        guidance_scale: s in `uncond + s * (cond - uncond)`; 1 is the conditional prediction alone.
        seed: Seed of the initial noise.
    """

    num_steps: int
    guidance_scale: float
    seed: int


def teacher_samplings(
    teacher_steps: int, guidance_scale: float, few_steps: int, seed: int
) -> dict[str, Sampling]:
    """Returns the ways of sampling a teacher, by the names at the top of this file.

    Args:
        teacher_steps: Steps of the reference.
        guidance_scale: Guidance of the reference.
        few_steps: Steps of the generator.
        seed: Seed A; seed B is the next number.
    """
    reference = Sampling(teacher_steps, guidance_scale, seed)
    few = Sampling(few_steps, 1.0, seed + 1)
    return {
        REFERENCE: reference,
        FLOOR: replace(reference, seed=few.seed),
        TEACHER_FEW: few,
        TEACHER_FEW_GUIDED: replace(few, guidance_scale=guidance_scale),
    }
