"""Rules between the settings of a distillation, all in one list."""

from collections.abc import Iterator

from pipelines.config.adapters import lora_contradictions
from pipelines.config.adversary import adversary_contradictions
from pipelines.config.alarms import OF_VALIDATIONS
from pipelines.config.attention import attention_contradictions
from pipelines.config.consistency import consistency_contradictions
from pipelines.config.experts import expert_contradictions
from pipelines.config.frozen import frozen_contradictions
from pipelines.config.methods import method_contradictions
from pipelines.config.recipe_sections import RecipeSections
from pipelines.config.roles import FAKE_SCORE
from pipelines.config.sequence import sequence_contradictions
from pipelines.config.shuffled import part_contradictions, shuffling_contradictions
from pipelines.config.steps import step_contradictions
from pipelines.config.topology_check import topology_contradictions
from pipelines.config.walk import walk_contradictions


def contradictions_of(config: RecipeSections) -> list[str]:
    """Sentences on settings that are right one by one and do not fit together."""
    problems: list[str] = []
    batch, topology = config.batch, config.topology
    if batch.micro_batches > batch.size:
        problems.append(
            f"batch.micro_batches {batch.micro_batches} is more than the samples of a batch "
            f"(batch.size {batch.size}), so some would be empty"
        )
    if batch.micro_batches % batch.num_exit_draws:
        problems.append(
            f"batch.exit_draws {batch.exit_draws} does not divide batch.micro_batches "
            f"{batch.micro_batches}, and the samples of a micro-batch leave at one step; set "
            f"batch.micro_batches to a multiple of {batch.exit_draws}"
        )
    ranks_per_sample = {role: compute.ulysses for role, compute in config.computes.items()}
    found = topology_contradictions(topology, batch.size, batch.micro_batches, ranks_per_sample)
    # Pools that contradict themselves have no ranks to be counted.
    problems += found or sequence_contradictions(config)
    problems += shuffling_contradictions(
        config.objective, config.fake_score, config.generator.diversity
    )
    problems += walk_contradictions(config.objective, config.fake_score)
    if not found:
        rank_groups = config.teams[FAKE_SCORE].rank_groups
        problems += part_contradictions(
            config.fake_score, batch.size, batch.micro_batches, rank_groups
        )
    problems += method_contradictions(config.objective, config.fake_score)
    problems += step_contradictions(config.schedule, config.generator, config.objective)
    problems += consistency_contradictions(config)
    problems += expert_contradictions(config)
    problems += adversary_contradictions(config.objective, config.schedule)
    if config.schedule.renoise and config.teacher.guidance_scale == 1:
        problems.append(
            "schedule.renoise holds for samplers without guidance, which with "
            "teacher.guidance_scale 1 the teacher's are, too; choose another scale"
        )
    problems += lora_contradictions(config)
    problems += frozen_contradictions(config)
    problems += attention_contradictions(config)
    if config.validation.every and not config.data.validation:
        problems.append("validation.every is above 0, but data.validation names no captions")
    problems += _silent_alarms(config)
    return problems


def _silent_alarms(config: RecipeSections) -> Iterator[str]:
    """Sentences on alarms that are to end a run which never measures what they are read from."""
    stops = set(config.alarms.stop)
    measured = {"validation.every": config.validation.every, "lag.every": config.lag.every}
    read = {"validation.every": stops & OF_VALIDATIONS, "lag.every": stops & {"tracking_lag"}}
    for setting, alarms in read.items():
        if alarms and not measured[setting]:
            yield (
                f"alarms.stop has {', '.join(sorted(alarms))}, which {setting} 0 never measures; "
                f"set {setting}, or leave the alarm out"
            )
    if "silent_discriminator" in stops and config.adversary is None:
        yield (
            "alarms.stop has silent_discriminator, and this "
            f"{config.objective.method} has no discriminator; leave the alarm out"
        )
