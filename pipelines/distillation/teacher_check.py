"""Check that a teacher of another size teaches the generator: the same latents, text and schedule.

Each role computes on what the others send, so a teacher may differ in its denoiser alone.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from pipelines.config.clip_sizes import trained_shapes
from pipelines.config.recipe import DistillConfig
from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER
from sgmd_core.errors import ConfigError
from workers.models.configs import read_model_json
from workers.models.content import model_digests
from workers.models.families import family_named, family_of
from workers.models.folder import ModelFolder
from workers.models.makers import maker_of

_SCHEDULER_FILE = Path("scheduler") / "scheduler_config.json"
_FLOW = "flow_prediction"
_log = logging.getLogger(__name__)


def check_teacher(
    config: DistillConfig, model: ModelFolder, content: dict[str, str]
) -> dict[str, str]:
    """Check the model of `teacher.model`.

    Args:
        config: The run.
        model: The generator's model.
        content: Digest of each of its components.

    Returns:
        Digests of the teacher's denoiser by component; none where it is the generator's model.

    Raises:
        ConfigError: The two disagree; names each disagreement.
        ModelFolderError: The teacher's folder is missing, torn or of another kind.
    """
    if config.teacher.model is None:
        return {}
    folder = config.teacher_folder
    family = family_of(folder)
    teacher = family.inspect(folder)
    digests = model_digests(folder)
    found = [
        *_facts_that_differ(model, teacher),
        *_components_that_differ(model, content, digests),
        *_schedule_that_differs(config),
        *_mixing_of_unequal(config),
    ]
    if found:
        raise ConfigError(
            f"pairing the generator of {model.path} with the teacher of {folder}",
            "; ".join(found),
            "models that differ in their denoisers alone",
            "Set teacher.model to a model of the same family and version, or to null. A component "
            "that is the same but stored in another type can be a link to the generator's",
        )
    trained_shapes(config.video, teacher.latent_shape)
    shared = {teacher.layout.autoencoder, *teacher.layout.text}
    own = {
        name: digest
        for name, digest in digests.items()
        if name in teacher.layout.weights and name not in shared
    }
    # The generator's own denoiser under another name changes no number.
    return {} if all(content.get(name) == own[name] for name in own) else own


def _facts_that_differ(model: ModelFolder, teacher: ModelFolder) -> Iterator[str]:
    pairs = {
        "family": (model.family, teacher.family),
        "latent channels": (model.geometry.latent_channels, teacher.geometry.latent_channels),
        "frames of a latent frame": (
            model.geometry.temporal_factor,
            teacher.geometry.temporal_factor,
        ),
        "pixels of a latent cell": (
            model.geometry.spatial_factor,
            teacher.geometry.spatial_factor,
        ),
        "text width": (model.text_width, teacher.text_width),
    }
    if teacher.family in family_named(model.family).traits.taught_by:
        del pairs["family"]
    for name, (own, theirs) in pairs.items():
        if own != theirs:
            yield f"{name} is {own} of the generator and {theirs} of the teacher"


def _components_that_differ(
    model: ModelFolder, content: dict[str, str], theirs: dict[str, str]
) -> Iterator[str]:
    made_by = {"text encoder": model.layout.text, "autoencoder": (model.layout.autoencoder,)}
    for what, names in made_by.items():
        own, other = (maker_of(each, names) for each in (content, theirs))
        if own is None or other is None:
            whose = "teacher's" if other is None else "generator's"
            _log.warning(
                "the %s folder has no %s: that both were trained with the same is not checked",
                *(whose, what),
            )
        if own == other or other is None or (own is None and what == "autoencoder"):
            continue
        for name in names:
            if content.get(name) != theirs.get(name):
                yield f"{name} has other content in the teacher's folder"


def _schedule_that_differs(config: DistillConfig) -> Iterator[str]:
    """Another path between noise and data; a shift along it is the recipe's to choose."""
    own, theirs = (
        _predicted(folder / _SCHEDULER_FILE)
        for folder in (config.model_folder, config.teacher_folder)
    )
    if own != theirs:
        yield f"the generator's model predicts {own}, and the teacher's {theirs}"


def _predicted(scheduler: Path) -> str:
    """Prediction that a scheduler is made for: the flow, where it does not say."""
    found = read_model_json(scheduler) if scheduler.is_file() else {}
    return str(found.get("prediction_type") or _FLOW)


def _mixing_of_unequal(config: DistillConfig) -> Iterator[str]:
    """Weights of another size cannot be mixed in."""
    models = config.models_of_roles
    if config.fake_score.ida_decay == 1 or models[FAKE_SCORE] == models[GENERATOR]:
        return
    own, theirs = (
        family_of(folder).read_shape(folder).denoiser
        for folder in (config.model_folder, config.teacher_folder)
    )
    if own != theirs:
        yield (
            f"fake_score.ida_decay {config.fake_score.ida_decay} mixes the generator's weights "
            f"into a fake score of the {TEACHER}'s size; set fake_score.start=generator, or 1"
        )
