"""Models that a recipe names: which role starts from which, and where they are on this machine."""

from pathlib import Path

from workers.models.addresses import is_address, local_model

PROJECT_ROOT = Path(__file__).resolve().parents[2]
"""Folder of the source tree, which has the `assets/`."""


def same_model(one: str, other: str) -> bool:
    """Returns True if two names of models mean one folder or address."""
    return one == other or model_address(one) == model_address(other)


def model_on_this_machine(model: str) -> Path:
    """A model's folder: as given, or else seen from the source tree.

    A recipe that ships names `assets/...`, and must work from any folder.

    Raises:
        ModelFolderError: As `local_model`.
        StorageError: As `local_model`.
    """
    given = local_model(model)
    shipped = PROJECT_ROOT / given
    return shipped if not given.exists() and shipped.exists() else given


def model_address(model: str) -> str:
    """A model as processes in other folders of this machine, or on other machines, find it."""
    return model if is_address(model) else str(model_on_this_machine(model).absolute())
