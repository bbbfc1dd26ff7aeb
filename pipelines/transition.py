"""Make a model folder with a flow head: `sgmd transition`.

everything of the base    -> as it is, linked or copied
                          -> flow_head/   what the last layers have besides; changes nothing yet
"""

from pathlib import Path

from cluster.folders import whole_folder_at
from pipelines.exporting.target import require_safe_target
from pipelines.media.inference import read_inference_settings, write_inference_settings
from pipelines.run.generator_folder import model_folder
from sgmd_core.errors import ConfigError
from sgmd_core.inner_flow import inner_grid, starts_as_its_head
from sgmd_core.schedule import MAX_STEPS
from workers.models.configs import INDEX_FILE
from workers.models.exporting import Components
from workers.models.families import family_of
from workers.models.flow_head import is_count, is_shift
from workers.models.weight_digests import SETTINGS_FILE


def make_transition(
    base: str | Path,
    output: str | Path,
    num_layers: int,
    num_steps: int,
    shift: float = 10.0,
    components: Components = "link",
) -> Path:
    """Make a folder of a base model whose last layers are a flow head.

    It samples what its base samples, until it is trained.

    Args:
        base: Model folder of a Wan text-to-video model, or a run with a generator of one.
        output: The new folder; an existing model folder is replaced whole.
        num_layers: Last layers that belong to the head.
        num_steps: Steps of the inner flow.
        shift: Shift of its levels.
        components: Whether weight files are linked or copied.

    Returns:
        The new folder.

    Raises:
        ConfigError: The numbers are those of no flow head, the base has no denoiser for one, a
            folder of something else is in the way, or `components` is neither.
        ModelFolderError: The base is not a complete model folder.
    """
    folder, target = model_folder(base), Path(output)
    attempted = f"making a transition of {folder}"
    require_safe_target(target, "DST", (folder,), attempted)
    if components not in ("link", "copy"):
        raise ConfigError(attempted, f"--components {components}", "link or copy")
    _require_inner_steps(attempted, num_steps, shift)
    family = family_of(folder)
    if family.name != "wan":
        raise ConfigError(attempted, f"a model of the family {family.name}", "one of wan")
    most = family.read_shape(folder).denoiser.num_layers - 1
    if not 1 <= num_layers <= most:
        raise ConfigError(
            attempted,
            f"--layers {num_layers} of {most + 1}",
            f"1 to {most}: what is left is the backbone, which is asked once a step",
        )
    from workers.models.wan_transition import write_transition

    with whole_folder_at(target, (SETTINGS_FILE, INDEX_FILE)) as draft:
        write_transition(draft, folder, num_layers, num_steps, shift, components)
        write_inference_settings(draft, read_inference_settings(folder))
        family_of(draft).inspect(draft)
    return target


def _require_inner_steps(attempted: str, num_steps: int, shift: float) -> None:
    """Refuses numbers that are not inner steps, and steps that would not sample like the base."""
    if not is_count(num_steps, MAX_STEPS) or not is_shift(shift):
        raise ConfigError(
            attempted,
            f"--steps {num_steps} with --shift {shift:g}",
            f"1 to {MAX_STEPS} steps and a finite shift above 0",
        )
    if not starts_as_its_head(inner_grid(num_steps, shift)):
        raise ConfigError(
            attempted,
            f"--steps {num_steps} with --shift {shift:g}, whose last step starts below 0.5",
            "inner steps that all start from 0.5 on, so that the folder samples as its base does",
            "Take fewer steps, or a larger shift",
        )
