"""Samples that several ranks work on together: what `compute.ulysses` asks of a recipe."""

from pipelines.config.recipe_sections import RecipeSections
from pipelines.config.roles import GENERATOR
from sgmd_core.errors import ConfigError
from sgmd_core.objectives.consistency import consistency_of
from workers.models.folder import LatentShape
from workers.models.shape import DenoiserShape


def require_divisible(
    role: str, number: int, shape: DenoiserShape, latent_shape: LatentShape
) -> None:
    """Checks that heads and tokens of a role's network divide among ranks.

    Args:
        role: The role.
        number: Ranks that work on a sample together.
        shape: Its network.
        latent_shape: Channels, frames, rows, columns of one sample.

    Raises:
        ConfigError: They do not.
    """
    tokens = f"tokens (latents of {'x'.join(map(str, latent_shape[1:]))})"
    counts = {"heads": shape.num_heads, tokens: shape.num_tokens(latent_shape)}
    for what, count in counts.items():
        if count % number:
            raise ConfigError(
                f"splitting each sample of the {role.replace('_', ' ')} over {number} ranks",
                f"{count} {what}",
                f"{what.partition(' ')[0]} that divide among them",
                f"Set {role}.compute.ulysses to a divisor, or change the size of the clips",
            )


def sequence_contradictions(config: RecipeSections) -> list[str]:
    """Returns what does not go with samples that ranks share, as sentences."""
    problems: list[str] = []
    for role, compute in config.computes.items():
        key, number = f"{role}.compute.ulysses {compute.ulysses}", compute.ulysses
        if number == 1:
            continue
        ranks = config.teams[role].ranks_by_replica
        if config.topology.mode == "local":
            problems.append(
                f"{key} wants that many ranks, but topology.mode local is one process; set it to 1"
            )
        elif odd := [found for found in ranks if found % number]:
            problems.append(
                f"{key} does not divide the {odd[0]} ranks of a pool of the role; set it to a "
                "divisor, or the ranks to a multiple"
            )
        if role == GENERATOR and consistency_of(config.objective) is not None:
            problems.append(
                f"{key} has no derivative in forward mode, which {config.objective.method} takes; "
                "set it to 1"
            )
    return problems
