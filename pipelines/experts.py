"""Make a model folder of two experts: `sgmd experts`.

transformer/ of the base    -> transformer/    expert of noise levels from the boundary to 1
the same, or transformer_2/ -> transformer_2/  expert of those below
everything else             -> as it is, linked or copied
"""

import json
from pathlib import Path

from cluster.files import write_whole
from cluster.folders import whole_folder_at
from pipelines.exporting.target import require_safe_target
from pipelines.media.inference import read_inference_settings, write_inference_settings
from pipelines.run.generator_folder import model_folder
from sgmd_core.errors import ConfigError
from workers.models.configs import INDEX_FILE, read_model_json
from workers.models.exporting import Components, copy_components
from workers.models.families import family_of
from workers.models.wan_configs import EXPERTS_LAYOUT, LOW_NOISE, TRANSFORMER
from workers.models.wan_experts import WAN_EXPERTS
from workers.models.weight_digests import SETTINGS_FILE

_FAMILIES = ("wan", WAN_EXPERTS)


def make_experts(
    base: str | Path, output: str | Path, boundary: float, components: Components = "link"
) -> Path:
    """Make a folder whose two experts are those of a base, or its one denoiser twice.

    Args:
        base: Model folder of a Wan text-to-video model, or a run with a generator of one.
        output: The new folder; an existing model folder is replaced whole.
        boundary: Noise level in (0, 1) from which on the first expert is asked.
        components: Whether weight files are linked or copied.

    Returns:
        The new folder.

    Raises:
        ConfigError: The boundary is not noise level, the base has no such denoiser, a folder of
            something else is in the way, or `components` is neither.
        ModelFolderError: The base is not a complete model folder.
    """
    folder, target = model_folder(base), Path(output)
    attempted = f"making two experts of {folder}"
    require_safe_target(target, "DST", (folder,), attempted)
    if components not in ("link", "copy"):
        raise ConfigError(attempted, f"--components {components}", "link or copy")
    if not 0 < boundary < 1:
        raise ConfigError(
            attempted, f"--boundary {boundary}", "a noise level between 0 and 1, such as 0.875"
        )
    family = family_of(folder)
    if family.name not in _FAMILIES:
        raise ConfigError(
            attempted,
            f"a model of the family {family.name}",
            f"one of {' or '.join(_FAMILIES)}, whose pipeline asks two experts in turn",
        )
    layout = family.inspect(folder).layout
    second = LOW_NOISE if layout.experts else TRANSFORMER
    names = [name for name in layout.components if name != LOW_NOISE]
    with whole_folder_at(target, (SETTINGS_FILE, INDEX_FILE)) as draft:
        copy_components(folder, draft, layout, names, components)
        copy_components(folder, draft, layout, (second,), components, {second: LOW_NOISE})
        index = dict(read_model_json(folder / INDEX_FILE))
        index |= {LOW_NOISE: index[TRANSFORMER], "boundary_ratio": boundary}
        write_whole(draft / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
        write_inference_settings(draft, read_inference_settings(folder))
        found = family_of(draft).inspect(draft)
        assert found.layout == EXPERTS_LAYOUT, "the new folder is read as one of two experts"
    return target
