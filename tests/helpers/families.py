"""The toy family as an installed package: metadata with an entry point on the import path."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from workers.models.families import ENTRY_POINTS, look_for_families_again

TOY = "tests.helpers.toy_family:ToyFamily"


def write_package(folder: Path, entry_points: str) -> Path:
    """Write the metadata of an installed package; put `folder` on the path to install it."""
    metadata = folder / "my_package-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(entry_points)
    return folder


@contextmanager
def installed_family(folder: Path, value: str = TOY) -> Iterator[None]:
    """Install a family by its entry point, for as long as the context lasts."""
    write_package(folder, f"[{ENTRY_POINTS}]\ntoy = {value}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        look_for_families_again()
        try:
            yield
        finally:
            look_for_families_again()
