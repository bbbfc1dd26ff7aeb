"""Folders that an export or an import may replace whole."""

from collections.abc import Sequence
from pathlib import Path

from cluster.paths import real_path
from cluster.stores import store_address
from pipelines.run.folder import RunFolder
from pipelines.run.outputs import require_output_folder
from pipelines.run.places import shared_place
from pipelines.run.replaceable import require_replaceable
from sgmd_core.errors import ConfigError
from workers.models.configs import INDEX_FILE
from workers.models.weight_digests import SETTINGS_FILE

EXPORTS = "exports"
"""Folder of the exports in a run."""


def require_safe_target(
    target: Path, setting: str, sources: Sequence[str | Path], attempted: str
) -> None:
    """Checks that a folder can be written whole and that nothing else is lost by it.

    Args:
        target: The folder.
        setting: Option that gave it.
        sources: Folders that are read for it.
        attempted: Purpose, for the error.

    Raises:
        ConfigError: It holds, or lies in, what is read; it is a folder of something else; or it
            cannot be written.
    """
    place = _whole_path(target)
    for given in sources:
        source = _whole_path(Path(shared_place(given)))
        is_run = not store_address(given) and RunFolder(given).config.exists()
        is_export = is_run and (source / EXPORTS) in place.parents
        if source in place.parents and not is_export:
            raise ConfigError(
                attempted,
                f"{setting} {shared_place(target)}, which lies in {shared_place(source)}, "
                "which is read",
                "another folder, as it is replaced whole",
                "Choose a new folder",
            )
    require_output_folder(target, setting)
    kept = {
        f"what is read ({number + 1})": shared_place(each) for number, each in enumerate(sources)
    }
    require_replaceable(shared_place(target), setting, kept, (INDEX_FILE, SETTINGS_FILE))


def _whole_path(path: Path) -> Path:
    return path if store_address(path) else real_path(path)
