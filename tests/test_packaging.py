"""Contents of the wheel: every file that the packages need."""

import tomllib
from pathlib import Path

import sgmd

ROOT = Path(__file__).parents[1]
PACKAGES = ("sgmd", "sgmd_core", "workers", "cluster", "pipelines")


def test_every_file_beside_the_code_is_among_the_data_of_its_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    data = settings["package-data"]
    found, packed = set(), set()
    for package in PACKAGES:
        files = [path for path in (ROOT / package).rglob("*") if path.is_file()]
        found |= {path for path in files if path.suffix not in (".py", ".pyc")}
        inner = {path.parent for path in files if path.suffix == ".py"}
        packed |= {path for home in inner for each in data["*"] for path in home.glob(each)}
        packed |= {path for each in data.get(package, ()) for path in (ROOT / package).glob(each)}
    assert len(found) > 30
    assert found - packed == set()
    # Not for type checkers alone: the package reads its public names from it.
    assert Path(sgmd.__file__).with_suffix(".pyi") in packed


def test_every_package_is_found_for_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    patterns = settings["packages"]["find"]["include"]
    for package in PACKAGES:
        assert any(Path(package).match(each) for each in patterns)
