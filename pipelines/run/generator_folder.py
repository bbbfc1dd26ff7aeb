"""The model folder that a path or an address stands for: itself, or the generator of a run."""

from pathlib import Path

from cluster.storage import is_folder
from pipelines.run.folder import RunFolder
from pipelines.run.opened_copy import run_copy
from pipelines.run.places import shared_place
from sgmd_core.errors import ModelFolderError
from workers.models.addresses import local_model, missing_folder


def model_folder(run_or_model: str | Path) -> Path:
    """The diffusers folder that a user means: a model folder, or the generator of a run.

    Args:
        run_or_model: A path or an address; of what lies at an address, a copy on this machine.

    Raises:
        ModelFolderError: No folder is there, or a run that has not written its generator yet.
        StorageError: The object store of an address cannot be read.
    """
    with run_copy(run_or_model, ("samples",)) as root:
        path = local_model(root)
        if not path.is_dir():
            raise missing_folder(path, f"looking for the run or model {path}", "Check the path")
        run = RunFolder(path)
        return _generator_of(run) if run.config.exists() else path


def _generator_of(run: RunFolder) -> Path:
    place = shared_place(run.generator)
    if not is_folder(place):
        raise ModelFolderError(
            f"looking for the generator of the run {run}",
            "no folder generator/ in it",
            "a run that has come to its end",
            f"Finish it with `sgmd distill --resume {run}`, or name a diffusers folder",
        )
    return local_model(place)
