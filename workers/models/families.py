"""The model families, and which of them a folder belongs to.

A family is one file with a place in the tuple below. A family from another package comes in by the
entry point group `sgmd.families`, whose values are classes that are made without arguments:

    [project.entry-points."sgmd.families"]
    toy = "my_package.toy:ToyFamily"

The package must be installed wherever a role runs. One that cannot be used costs a warning, and is
named in the error of a folder or name for which no family is known.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import torch

from sgmd_core.errors import ConfigError, ModelFolderError
from sgmd_core.extensions import Extension, Extensions, load_extensions
from sgmd_core.phases import Expert
from workers.models.addresses import missing_folder
from workers.models.configs import CONFIG_FILE, INDEX_FILE, read_model_json
from workers.models.family import FamilyTraits, ModelFamily
from workers.models.ltx_family import LtxFamily
from workers.models.wan_experts import WAN_EXPERTS, WanExpertsFamily
from workers.models.wan_family import WanFamily
from workers.models.wan_transition_family import WanTransitionFamily

ENTRY_POINTS = "sgmd.families"
# Whatever the family: HunyuanVideoImageToVideoPipeline, LTXImageToVideoPipeline, ...
_IMAGE_TO_VIDEO = re.compile(r"ImageToVideo|I2V")

# A family with more denoisers before the one that has the same networks and none of them.
_OWN: tuple[ModelFamily, ...] = (
    WanExpertsFamily(),
    WanTransitionFamily(),
    WanFamily(),
    LtxFamily(),
)
_EXPORT = "Give the folder that `sgmd export RUN --checkpoint N --dtype fp32 --output DIR` writes"
_OTHER_FOLDERS = (
    ("checkpoints/", "a run, and no model", f"Give its folder generator/ or best/. {_EXPORT}"),
    ("*/weights.safetensors", "a checkpoint of a run", _EXPORT),
    ("weights.safetensors", "one role of a checkpoint", _EXPORT),
    (
        "*lora*.safetensors",
        "a LoRA, which holds changes of weights and no network",
        "Make a folder of it and its base: sgmd import FILE DST --base FOLDER; `sgmd generate BASE "
        "--lora FILE` samples it",
    ),
    (
        "*.safetensors",
        "weights in single files",
        "Make a folder of one: sgmd import FILE DST --base FOLDER, with a model of the same size",
    ),
)
"""Folders that a user may take for a model: a pattern of files, what it is, what to do."""
_MEMBERS = tuple(name for name in vars(ModelFamily) if not name.startswith("_"))


@cache
def _from_outside() -> Extensions[ModelFamily]:
    return load_extensions(ENTRY_POINTS, "a model family", load_family, _OWN)


def families() -> tuple[ModelFamily, ...]:
    """Every family that can be used, ours first."""
    return (*_OWN, *_from_outside().usable.values())


def look_for_families_again() -> None:
    """Forgets which families from outside there are, where packages have come or gone."""
    _from_outside.cache_clear()


def family_named(name: str) -> ModelFamily:
    """The family of a name.

    Raises:
        ConfigError: There is none.
    """
    for family in families():
        if family.name == name:
            return family
    names = ", ".join(family.name for family in families())
    found = f"the name {name!r}{_from_outside().words()}"
    raise ConfigError("looking for a model family", found, f"one of {names}")


def family_of(folder: str | Path) -> ModelFamily:
    """Find the family of a model folder by the class in model_index.json.

    A folder without this file is recognised by the class of its denoiser.

    Args:
        folder: Model folder on this machine, in diffusers format.

    Returns:
        The family, which inspects, loads, samples and exports such folders.

    Raises:
        ModelFolderError: There is no such folder, or no family is known for it; names the families.
    """
    path = Path(folder)
    if not path.is_dir():
        raise missing_folder(path, f"loading the model {path}")
    index = read_model_json(path / INDEX_FILE) if (path / INDEX_FILE).exists() else None
    # Ours first, so that a folder of ours loads no package of another family.
    for known in (lambda: _OWN, families):
        for family in known():
            if _holds(path, index, family.traits):
                return family
    if index is None:
        snapshots = sorted(path.glob("snapshots/*"))
        if snapshots:
            raise ModelFolderError(
                f"loading the model {path}",
                "the hub's cache of a model, whose versions are folders below it",
                "the folder of one version",
                f"Give {snapshots[-1]}",
            )
        refusals = (family.explain_files(path) for family in families())
        known = next(filter(None, refusals), None) or _explained(path)
        raise known or _no_model(path)
    pipeline = str(index.get("_class_name"))
    kinds = (family.traits.relatives.get(pipeline) for family in families())
    kind = next(filter(None, kinds), None)
    if kind is None and _IMAGE_TO_VIDEO.search(pipeline):
        kind = "an image-to-video model, which makes clips of an image"
    raise _unknown(path, f"_class_name is {pipeline!r}" + (f": {kind}" if kind else ""))


def family_of_expert(
    folder: str | Path, expert: Expert | None, companion: torch.dtype | None = None
) -> ModelFamily:
    """Family of a model folder as a role knows it that has one of two experts.

    Args:
        folder: Model folder.
        expert: The one expert; None: all of the model, whatever its family.
        companion: Type of the other one's weights where it is there as well, frozen.

    Raises:
        ModelFolderError: As `family_of`; or the folder does not have two experts.
    """
    family = family_of(folder)
    if expert is None:
        return family
    if not isinstance(family, WanExpertsFamily):
        raise ModelFolderError(
            f"looking for the {expert}-noise expert of {folder}",
            f"one denoiser, of the family {family.name}",
            f"a folder of two experts by noise level, of the family {WAN_EXPERTS}",
            "Set model.expert=both, or name such a folder; `sgmd experts` makes one of a Wan 2.1",
        )
    return WanExpertsFamily(expert, companion)


def modules_of(folder: str | Path) -> tuple[str, ...]:
    """Modules that a role imports to load a model folder, for `start_ray(preload=...)`.

    Raises:
        ModelFolderError: There is no such folder, or no family is known for it; names the families.
    """
    return ("workers.build", *family_of(folder).traits.modules)


def load_family(point: EntryPoint, others: Sequence[ModelFamily] = _OWN) -> ModelFamily:
    """Loads a family of another package.

    Args:
        point: Its entry point.
        others: Families whose names and classes are taken.

    Raises:
        ConfigError: It cannot be imported or made, lacks members of `ModelFamily`, or takes the
            name or the pipeline class of another family.
    """
    extension, expected = Extension("family", point), "a class of a model family"
    made_by = extension.load(expected)
    try:
        family = made_by()
    except Exception as error:
        raise extension.refusal(f"{type(error).__name__}: {error}", expected) from error
    missing = [name for name in _MEMBERS if not hasattr(family, name)]
    if missing:
        found = f"{family!r} without {', '.join(missing)}"
        raise extension.refusal(found, "the members of sgmd.ModelFamily")
    if not isinstance(family.traits, FamilyTraits):
        raise extension.refusal(f"traits {family.traits!r}", "an object of sgmd.FamilyTraits")
    for other in others:
        same_class = other.traits.layout.pipeline_class == family.traits.layout.pipeline_class
        if other.name == family.name or same_class:
            found = f"{family.name} for {family.traits.layout.pipeline_class}, which is taken"
            raise extension.refusal(found, "a name and a pipeline class of its own")
    return family


def _holds(folder: Path, index: Mapping[str, Any] | None, traits: FamilyTraits) -> bool:
    layout = traits.layout
    for expert in layout.experts:
        named = (index or {}).get(expert)
        if not (folder / expert).exists() and not (isinstance(named, list) and any(named)):
            return False
    if index is not None:
        return index.get("_class_name") == layout.pipeline_class
    config = folder / layout.denoiser / CONFIG_FILE
    return config.is_file() and read_model_json(config).get("_class_name") == layout.denoiser_class


def _no_model(folder: Path) -> ModelFolderError:
    """An empty folder, or one of other things: it needs no list of what families are."""
    pipelines = dict.fromkeys(family.traits.layout.pipeline_class for family in families())
    return ModelFolderError(
        f"loading the model {folder}",
        f"no {INDEX_FILE}"
        + (" and nothing else" if not any(folder.iterdir()) else _from_outside().words()),
        f"a folder in the format of diffusers, of {' or '.join(pipelines)}",
        "Check the path; where a run is meant, its folder is OUTPUT/NAME and has a config.yaml",
    )


def _explained(folder: Path) -> ModelFolderError | None:
    """Refusal of a folder of sgmd that holds something else; None where nothing is known of it."""
    for pattern, found, remedy in _OTHER_FOLDERS:
        if any(folder.glob(pattern)):
            return ModelFolderError(
                f"loading the model {folder}",
                f"no {INDEX_FILE}: {found}",
                "a diffusers folder of a model",
                remedy,
            )
    return None


def _unknown(folder: Path, found: str) -> ModelFolderError:
    known = ", ".join(
        f"{family.name} (_class_name {family.traits.layout.pipeline_class!r}, "
        f"{family.traits.about})"
        for family in families()
    )
    return ModelFolderError(
        f"reading {folder / INDEX_FILE}",
        found + _from_outside().words(),
        f"a family that is known: {known}",
        f"Give a folder of one of them, or install the package of its family ({ENTRY_POINTS})",
    )
