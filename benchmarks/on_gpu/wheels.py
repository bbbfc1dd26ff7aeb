"""Packages that a machine with a GPU and torch lacks: which they are, how to get them there.

    there       find_missing -> download_command             no network, nothing is installed
    elsewhere   the command, with network -> a folder of wheels
    there       install(folder) -> a folder of its own, put in front of sys.path

`wheels.json` lists what the project needs at run time and what each of these packages requires, so
that a machine without network can tell which of its own packages will do. Only what is missing or
too old is fetched, at the version of `constraints.txt`. torch and what comes with it stays.

    python benchmarks/on_gpu/wheels.py        rewrites wheels.json, from a set-up .venv
"""

import importlib.metadata
import json
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ImportError:  # pip carries a copy, and there is no installing without pip.
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("wheels.json")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "roles": (
        *("numpy", "jaxtyping", "diffusers", "accelerate", "transformers", "tokenizers"),
        *("safetensors", "ftfy", "fsspec", "opencv-python-headless"),
    ),
    "runs": (
        *("pyarrow", "s3fs", "av", "pillow", "pydantic", "pyyaml", "typer", "rich", "packaging"),
        "jinja2",
    ),
    "tests": ("pytest", "pytest-timeout", "beartype"),
    "ray": ("ray",),
}
"""Packages that steps need, as dependencies of pyproject.toml; see `gpu_check.STEPS`."""

_EXTRAS = {"ray": "ray[data]"}
_STAYS = ("torch", "triton", "nvidia-", "cuda-")
_GLIBC = (*range(28, 16, -1), 12, 5)
_OLD_TAGS = ("manylinux2014", "manylinux2010", "manylinux1")


@dataclass(frozen=True, slots=True)
class Package:
    """A package that is there, or that can be fetched.

    Attributes:
        version: Its version.
        requires: What it requires, as its metadata say it.
    """

    version: str
    requires: tuple[str, ...] = ()


Packages = Mapping[str, Package]
"""By normalised name."""


def fetchable() -> Packages:
    """Returns the entries of `wheels.json`."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    return {
        name: Package(entry["version"], tuple(entry["requires"])) for name, entry in table.items()
    }


def installed() -> Packages:
    """Returns the packages of this interpreter; of several versions, the one it would import."""
    found: dict[str, Package] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name and canonicalize_name(name) not in found:
            requires = tuple(distribution.requires or ())
            found[canonicalize_name(name)] = Package(distribution.version, requires)
    return found


def listed(path: Path) -> Packages:
    """Returns the output of `pip freeze` from another machine."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    pairs = (line.split("==", 1) for line in lines if "==" in line)
    return {canonicalize_name(name.strip()): Package(version.strip()) for name, version in pairs}


def find_missing(groups: Iterable[str], there: Packages, python: str) -> dict[str, str]:
    """Versions to fetch by name, so that every requirement of the groups is met.

    Args:
        groups: Keys of `GROUPS`.
        there: What the machine has.
        python: Its version, such as 3.12.
    """
    offered, roots = fetchable(), [root for group in groups for root in roots_of(group)]
    fetched: set[str] = set()
    while True:
        more = set(_unmet(roots, there, offered, fetched, python))
        if more <= fetched:
            return {name: offered[name].version for name in sorted(fetched)}
        fetched |= more


def roots_of(group: str) -> list[str]:
    """A group's requirements, with the lowest version that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known: dict[str, str] = {}
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        known[name] = f"{_EXTRAS.get(name, name)}{requirement.specifier}"
    return [known[name] for name in GROUPS[group]]


def _unmet(
    roots: Sequence[str], there: Packages, offered: Packages, fetched: set[str], python: str
) -> Iterator[str]:
    """Names to fetch besides, given those that are fetched already."""
    todo: list[tuple[str, str | None]] = [(root, None) for root in roots]
    seen: set[tuple[str, str | None]] = set()
    while todo:
        line, by = todo.pop()
        if (line, by) in seen:
            continue
        seen.add((line, by))
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name.startswith(_STAYS):
            continue
        package = offered.get(name) if name in fetched else there.get(name)
        if package is None or package.version not in _any_stage(requirement):
            # A fetched package that is too new for one that is there: that one is fetched, too.
            wanted = by if name in fetched else name
            if wanted in offered:
                yield wanted
            continue
        todo += [(one, name) for one in _needs(package, requirement.extras, python)]


def _any_stage(requirement: Requirement) -> Any:  # noqa: ANN401  (of one of two packages)
    """The versions that a requirement allows, release candidates and local builds included."""
    requirement.specifier.prereleases = True
    return requirement.specifier


def _needs(package: Package, extras: Iterable[str], python: str) -> Iterator[str]:
    for line in package.requires:
        marker = Requirement(line).marker
        environment = {"python_version": python, "python_full_version": f"{python}.0"}
        if marker is None or any(
            marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras)
        ):
            yield line


def download_command(
    missing: Mapping[str, str], python: str, folder: str = "wheels", pip: str = "python3 -m pip"
) -> str:
    """The command that fetches wheels on a machine with network, whatever its own Python is."""
    machine = platform.machine()
    tags = [f"manylinux_2_{minor}" for minor in _GLIBC] + list(_OLD_TAGS)
    platforms = " ".join(f"--platform {tag}_{machine}" for tag in tags)
    names = " ".join(f"{name}=={version}" for name, version in missing.items())
    return (
        f"{pip} download --no-deps --only-binary=:all: --python-version {python} "
        f"--implementation cp {platforms} -c constraints.txt -d {folder} {names}"
    )


def install(missing: Mapping[str, str], wheels: Path, target: Path) -> dict[str, str]:
    """Installs from a folder of wheels, without network, those of the missing packages it has.

    Args:
        missing: Versions by name.
        wheels: The folder.
        target: Folder that they are installed into.

    Returns:
        What is missing still.

    Raises:
        RuntimeError: pip failed; with what it said.
    """
    here = {
        (canonicalize_name(parts[0]), parts[1])
        for parts in (path.name.split("-") for path in wheels.glob("*.whl"))
    }
    found = {name: version for name, version in missing.items() if (name, version) in here}
    if found:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        command += ["--no-compile", "--disable-pip-version-check", "--upgrade"]
        command += ["--find-links", str(wheels), "--target", str(target)]
        command += [f"{name}=={version}" for name, version in found.items()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip could not install from {wheels}:\n{done.stderr[-2000:]}")
    return {name: version for name, version in missing.items() if name not in found}


def table() -> dict[str, Any]:
    """Returns the content of `wheels.json`: all that the groups need, as installed here."""
    there = installed()
    todo = [Requirement(root) for group in GROUPS for root in roots_of(group)]
    found: dict[str, Any] = {}
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name.startswith(_STAYS) or name not in there:
            continue
        package = there[name]
        needs = {str(line) for line in _needs(package, requirement.extras, "3.11")}
        needs |= set(_needs(package, requirement.extras, "3.12"))
        entry = found.setdefault(name, {"version": package.version, "requires": []})
        if needs - set(entry["requires"]) or not entry["requires"]:
            entry["requires"] = sorted(needs | set(entry["requires"]))
            todo += [Requirement(line) for line in needs]
    return dict(sorted(found.items()))


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(), indent=2) + "\n", encoding="utf-8")
