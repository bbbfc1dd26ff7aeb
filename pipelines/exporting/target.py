"""Folders that an export or an import may replace whole."""

from collections.abc import Iterable
from pathlib import Path

from pipelines.run.folder import RunFolder, require_output_folder
from sgmd_core.errors import ConfigError
from workers.models.configs import INDEX_FILE
from workers.models.weight_digests import SETTINGS_FILE

EXPORTS = "exports"
"""Folder of the exports in a run."""


def require_safe_target(
    target: Path, setting: str, sources: Iterable[str | Path], attempted: str
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
    place = target.resolve()
    for source in (Path(source).resolve() for source in sources):
        inside = source in place.parents
        is_export = RunFolder(source).config.exists() and (source / EXPORTS) in place.parents
        if place == source or place in source.parents or (inside and not is_export):
            raise ConfigError(
                attempted,
                f"{setting} {target}, which holds or lies in {source}, which is read",
                "another folder, as it is replaced whole",
                "Choose a new folder",
            )
    require_output_folder(target, setting)
    if target.is_dir() and any(target.iterdir()) and not _is_ours(target):
        raise ConfigError(
            attempted,
            f"{setting} {target}, a folder of something else",
            "a new folder, an empty one, or an earlier export, as it is replaced whole",
            "Choose a new folder",
        )


def _is_ours(folder: Path) -> bool:
    return (folder / INDEX_FILE).is_file() or (folder / SETTINGS_FILE).is_file()
