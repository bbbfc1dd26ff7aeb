"""Checks of what a method asks of its models and data, before a process is taken.

experts          one that is trained alone has the noise levels of the recipe
phases           the experts of the generator change where the phases do
flow heads       a transition samples its velocities, while teacher and fake score answer with
                 means: models of the family that it was made of
discriminator    its heads stand on one denoiser's layers, of which two experts have no place
latents          of the clips' size, and of the networks' autoencoder: others would teach
                 nothing, and no loss would say so
"""

from collections.abc import Sequence
from pathlib import Path

from cluster.redaction import without_secrets
from pipelines.config.model_folders import model_on_this_machine
from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import DISCRIMINATOR
from pipelines.data.stream.inspect import FolderFacts
from pipelines.distillation.text_check import LookedAtSet
from sgmd_core.errors import ConfigError
from sgmd_core.objectives import phases_of
from sgmd_core.objectives.meanflow import FlowObjective
from workers.models.configs import INDEX_FILE, read_model_json
from workers.models.content import fingerprint
from workers.models.families import family_named, family_of, family_of_expert
from workers.models.folder import LatentShape, ModelFolder


def check_expert(config: DistillConfig) -> None:
    """Checks that every role's model has two experts, which change at the level of the recipe.

    Args:
        config: The run.

    Raises:
        ConfigError: They change at another level.
        ModelFolderError: A model has one denoiser, or its folder cannot be read.
    """
    model = config.model
    if model.alone is None:
        return
    for place in dict.fromkeys(config.models_of_roles.values()):
        folder = model_on_this_machine(place)
        family_of_expert(folder, model.alone).read_shape(folder)
        found = _boundary_of(folder)
        if found != model.boundary:
            raise ConfigError(
                f"checking the experts of {folder}",
                f"a boundary_ratio of {found:g}, and model.boundary is {model.boundary:g}",
                f"the {model.alone}-noise expert to have the noise levels that are trained",
                f"Set model.boundary={found:g}",
            )


def _boundary_of(folder: Path) -> float:
    """Noise level from which on the first of two experts is asked."""
    return float(read_model_json(folder / INDEX_FILE)["boundary_ratio"])


def check_phases(config: DistillConfig, model: ModelFolder) -> None:
    """Checks that the experts of the generator's model change where the phases do.

    A step goes to the first expert if its noise level is at least the model's boundary, as in
    diffusers. So the boundary has to lie between the last step of the high phase and the first one
    of the low phase.

    Args:
        config: The run.
        model: The generator's model.

    Raises:
        ConfigError: The model has one denoiser, or its experts change at another step.
    """
    phases = phases_of(config.objective, config.schedule, config.generator.num_steps)
    if phases is None:
        return
    grid = config.schedule.generator_grid(config.generator.num_steps)
    above, below = (float(grid[phases.high.end - back]) for back in (1, 0))
    middle = round((above + below) / 2, 4)
    attempted = f"checking the experts of {model.path}"
    expected = f"two experts that change above {below:.6g} and at most at {above:.6g}"
    remedy = (
        f"`sgmd experts {model.path} DST --boundary {middle}` makes a folder of two, for "
        "model.folder"
    )
    if not model.layout.experts:
        raise ConfigError(
            attempted,
            f"one denoiser, of which objective.method={config.objective.method} would train the "
            "low phase over the high one",
            expected,
            remedy,
        )
    boundary = _boundary_of(model.path)
    if not below < boundary <= above:
        remedy += "; the teacher can stay where it is: teacher.model"
        raise ConfigError(attempted, f"experts that change at {boundary}", expected, remedy)


def check_transition(config: DistillConfig, model: ModelFolder) -> None:
    """Checks that a method and its models agree on flow heads.

    Args:
        config: The run.
        model: The generator's model.

    Raises:
        ConfigError: The method trains a flow head and the model has none, or it has one and
            something beside it does not go with samples of velocities.
    """
    attempted = f"checking the flow head of {model.path}"
    teachers = sorted(family_named(model.family).traits.taught_by)
    if not teachers:
        if isinstance(config.objective, FlowObjective):
            raise ConfigError(
                attempted,
                f"a model of the family {model.family}, which has none",
                f"one for objective.method={config.objective.method}",
                f"`sgmd transition {model.path} DST --layers 1` makes a folder with one, for "
                "model.folder; name this one as teacher.model",
            )
        return
    teacher = family_of(config.teacher_folder).name
    rules = {
        f"the teacher, {config.teacher_folder}, is of the family {teacher}{_unset(config)}": (
            teacher not in teachers
        ),
        "fake_score.start is generator": config.fake_score.start == "generator",
        "generator.diversity follows the teacher's path": config.generator.diversity.enabled,
        "a loss looks off the trajectory": config.looks.off_trajectory,
        "phases have two experts": config.phases is not None,
    }
    if any(rules.values()):
        raise ConfigError(
            attempted,
            "; ".join(words for words, broken in rules.items() if broken),
            f"a teacher of the family {' or '.join(teachers)} that the fake score starts from, and "
            "losses at the ends of rollouts: velocities of this model are samples",
            "Set teacher.model to the model that the folder was made of, and "
            "fake_score.start=teacher; the recipe tiny-tmd is an example",
        )


def _unset(config: DistillConfig) -> str:
    return "" if config.teacher.model else " (teacher.model is null, so it is model.folder)"


def check_adversary(config: DistillConfig) -> None:
    """Checks that a teacher has the layers whose outputs a discriminator looks at.

    Args:
        config: The run.

    Raises:
        ConfigError: It lacks a layer, or has two experts.
        ModelFolderError: The teacher's folder is missing, torn or of another kind.
    """
    if DISCRIMINATOR not in config.roles:
        return
    folder = config.teacher_folder
    attempted = f"placing the discriminator's heads on the teacher of {folder}"
    family = family_of(folder)
    denoisers = family.inspect(folder).layout.denoisers
    if len(denoisers) > 1:
        raise ConfigError(
            attempted,
            f"{len(denoisers)} denoisers, one for each range of noise levels",
            "one denoiser, whose layers see every noise level",
            f"Choose another method than {config.objective.method}, or leave its adversary out",
        )
    num_layers = family.read_shape(folder).denoiser.num_layers
    wanted = config.discriminator.layers_of(num_layers)
    if max(wanted) > num_layers:
        raise ConfigError(
            attempted,
            f"discriminator.layers names layer {max(wanted)}",
            f"layers from 1 to {num_layers}",
            "Correct discriminator.layers, or set it to [] for every third layer",
        )


def latent_maker_of(model: ModelFolder, looked: Sequence[LookedAtSet]) -> str:
    """Fingerprint of what encodes a run's latents.

    It is that of the autoencoder's weights, or, of a folder without them, the one that the latents
    of all sets name; empty where they have none.

    Raises:
        ConfigError: They name several, or none, and there are no weights to tell which is meant.
    """
    if model.has_autoencoder:
        return fingerprint(model.path, (model.layout.autoencoder,))
    stored = ((one.data.encoding, one.source.url) for one in looked)
    named = {each.vae: url for each, url in stored if each is not None and each.latent_shape}
    attempted = f"reading latents for the model {model.path}, which has no autoencoder"
    if "" in named:
        raise ConfigError(
            attempted,
            f"latents that do not name what made them, in {without_secrets(named[''])}",
            "latents that name their autoencoder, or the autoencoder itself: nothing else tells "
            "that a resume reads the same",
            "Encode the set with `sgmd encode`, or download the autoencoder into the folder",
        )
    if len(named) > 1:
        makers = (f"{maker} of {without_secrets(url)}" for maker, url in named.items())
        raise ConfigError(
            attempted,
            f"latents that name several: {', '.join(makers)}",
            "latents of one autoencoder in all sets of data.train and data.also",
            "Encode the sets with one model, or download its autoencoder into the folder",
        )
    return next(iter(named), "")


def require_latents(
    config: DistillConfig,
    data: FolderFacts,
    model: ModelFolder,
    latent_shape: LatentShape,
    maker: str,
) -> None:
    """Checks that training data bring the latents that a method learns from.

    Args:
        config: The run.
        data: A first look at its training data.
        model: The generator's model.
        latent_shape: Shape (channels, frames, rows, columns) of a sample of this set.
        maker: Fingerprint of the autoencoder.

    Raises:
        ConfigError: They bring none, or those of other clips or another autoencoder.
    """
    encoding = data.encoding
    expected = f"latents of shape {latent_shape}, made by the autoencoder of {model.path}"
    if encoding is None or not encoding.latent_shape:
        found = f"shards of {data.kind.value}, without latents"
    elif encoding.latent_shape != latent_shape:
        found = f"latents of shape {encoding.latent_shape}"
    elif encoding.vae != maker:
        found = f"latents of another autoencoder (fingerprint {encoding.vae})"
    else:
        return
    raise ConfigError(
        f"reading data for objective.method {config.objective.method} from {config.data.train}",
        found,
        expected,
        f"Encode videos with `sgmd encode SRC DST --model {config.model.folder}` and set "
        "data.train to DST, or choose a method that needs no data",
    )
