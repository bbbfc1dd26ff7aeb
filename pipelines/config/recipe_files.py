"""Recipe files: which ship, where one is, and what it says.

    name, path or address  ->  YAML text  ->  nested dict + overrides  ->  a frozen pydantic model

A recipe may name another one as its `base` and hold only what it has otherwise. What is wrong with
its settings, `pipelines.config.settings_check` says.
"""

import difflib
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

from cluster.redaction import without_secrets
from cluster.stores import opened_store, store_address
from pipelines.config.captions_of_jobs import with_captions_beside
from pipelines.config.overrides import Override, apply_overrides, parse_override
from pipelines.config.settings_check import known_keys, validate
from pipelines.config.yaml_text import MAX_CHARACTERS, read_yaml, shortened, yaml_problem
from sgmd_core.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"
"""The recipes that ship."""
RUN_RECIPE = "config.yaml"
"""The recipe of a run, in its folder; it makes the folder a run's."""
RENAMED_RECIPES = {"wan-1.3b": "wan21-1.3b"}
"""New names of shipped recipes by their old ones."""

_log = logging.getLogger(__name__)

SECTIONS_OF = {
    "pretrain": ("world", "vae", "text", "denoiser"),
    "distill": ("model", "objective", "generator", "fake_score", "teacher"),
    "study": ("worlds", "networks", "search"),
}
"""Sections by which a recipe of each command is recognised."""
_SHARED_KEYS = frozenset({"name", "output", "seed", "schedule"})
_BASE = "base"
_MAX_BASES = 4

C = TypeVar("C", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe that ships.

    Attributes:
        name: What the command line calls it.
        path: The YAML file.
        summary: The comment that the file opens with.
    """

    name: str
    path: Path
    summary: str


def own_home(path: str) -> str:
    """A path with the home of this user in place of `~`; an unknown user's stays as it is."""
    return os.path.expanduser(path)  # noqa: PTH111 - `Path` raises for an unknown user.


def absolute_path(path: str) -> str:
    """A path as a process in another folder of this machine needs it; a URL stays as it is."""
    return path if "://" in path else str(Path.cwd() / Path(path).expanduser())


def shipped_recipes() -> list[Recipe]:
    """All recipes that ship, by name."""
    return [
        Recipe(path.stem, path, _first_comment(path.read_text(encoding="utf-8")))
        for path in sorted(RECIPES.glob("*.yaml"))
    ]


def find_recipe(name_or_path: str, named_by: Path | None = None) -> Path:
    """Path of a recipe; of one at an address, what `cluster.stores.store_address` reads.

    Args:
        name_or_path: Name of a recipe that ships, path of a YAML file (with a `/` or `.yaml`) or of
            a run's folder, whose settings it is, or address of either.
        named_by: The recipe whose base it is, beside which it is not.

    Raises:
        ConfigError: There is no such file, or no recipe of that name.
    """
    where = f"neither beside {named_by} nor" if named_by else "no such file,"
    path, is_file_name = Path(name_or_path).expanduser(), name_or_path.endswith((".yaml", ".yml"))
    if store_address(path):
        return path if is_file_name else path / RUN_RECIPE
    names = {recipe.name: recipe.path for recipe in shipped_recipes()}
    renamed = RENAMED_RECIPES.get(name_or_path)
    if renamed is not None:
        _log.warning("the recipe %s is now called %s: write that", name_or_path, renamed)
        return names[renamed]
    if "/" in name_or_path or is_file_name or (name_or_path not in names and path.is_dir()):
        found = path / RUN_RECIPE if path.is_dir() else path
        if found.is_file():
            return found
        raise ConfigError(
            f"opening the recipe {name_or_path}",
            f"no {RUN_RECIPE} in this folder"
            if path.is_dir()
            else f"{where} seen from {Path.cwd()}",
            "a YAML file, or the folder of a run",
            f"The one that ships is called {path.stem}, without the suffix"
            if path.stem in names
            else "`sgmd recipes copy NAME` makes one to start from",
        )
    if name_or_path not in names:
        near = difflib.get_close_matches(name_or_path.lower(), names, n=1)
        raise ConfigError(
            "looking for a recipe that ships" + (f", as base of {named_by}" if named_by else ""),
            f"the name {name_or_path!r}" + (f"; the nearest one is {near[0]}" if near else ""),
            f"one of {', '.join(names)}, or the path of a YAML file or of a run",
            "`sgmd recipes list` says what each is for",
        )
    return names[name_or_path]


def recipe_text(path: Path) -> str:
    """Text of a recipe, except for what is more than is read of any.

    Args:
        path: As `find_recipe` returns it.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError: It is not UTF-8 text.
        StorageError: The store of its address fails.
    """
    address = store_address(path)
    if not address:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(MAX_CHARACTERS + 1)
    with opened_store(address, f"reading the recipe {address}") as (files, name):
        is_there = files.isfile(name)
        content = files.cat_file(name, start=0, end=4 * MAX_CHARACTERS + 1) if is_there else b""
    if not is_there:
        raise FileNotFoundError(f"no such object: {address}")
    return str(content, encoding="utf-8-sig")


def load(kind: type[C], name_or_path: str, overrides: Sequence[str] = ()) -> C:
    """Reads a recipe into the settings of a command.

    Args:
        kind: Pydantic model of the settings.
        name_or_path: As in `find_recipe`.
        overrides: `a.b=c`, later ones last.

    Raises:
        ConfigError: The file, a key, a value or a combination is wrong; one error names all.
        StorageError: The store of its address fails.
    """
    path = find_recipe(name_or_path)
    attempted = f"reading the recipe {store_address(path) or path}"
    settings = with_captions_beside(recipe_sections(path, kind), path)
    _require_command(kind, settings, name_or_path, attempted)
    if overrides:
        attempted += f" with {shortened(without_secrets(', '.join(overrides)))}"
    changed = apply_overrides(settings, [parse_override(text) for text in overrides])
    return validate(kind, changed, attempted)


def names_base(path: Path) -> bool:
    """Returns True if a recipe holds only what it has otherwise than its `base`.

    Raises:
        ConfigError: The file cannot be read.
    """
    return _BASE in _sections(path, f"reading the recipe {store_address(path) or path}")


def recipe_sections(path: Path, kind: type, depth: int = 0) -> Mapping[str, Any]:
    """Returns the content of a recipe, laid over that of its `base`, unchecked.

    A section of the recipe changes the settings that it names and leaves the others of the base.
    Another `method` starts its section again. Tables with names of their own, such as
    `study.variants`, take the base's place.

    Args:
        path: The file.
        kind: Settings of the command, which tell sections from tables.
        depth: Recipes that have named this one as their base.

    Raises:
        ConfigError: A file cannot be read, is not YAML or not a section, or a base is not a recipe.
    """
    attempted = f"reading the recipe {store_address(path) or path}"
    settings = dict(_sections(path, attempted))
    if _BASE not in settings:
        return settings
    base = settings.pop(_BASE)
    if not isinstance(base, str) or depth == _MAX_BASES:
        found = (
            f"base is {shortened(repr(base))}, of a recipe that {depth} others name in turn"
            if depth
            else f"base is {shortened(repr(base))}"
        )
        remedy = "Name a recipe that ships, or a file beside this one; `sgmd recipes list`"
        raise ConfigError(attempted, found, f"a recipe, at most {_MAX_BASES} in turn", remedy)
    beside = path.parent / base
    below = recipe_sections(
        beside if beside.is_file() else find_recipe(base, path), kind, depth + 1
    )
    sections = {key.rpartition(".")[0] for key in known_keys(kind)}
    return apply_overrides(below, _changes(settings, sections, ()))


def _changes(
    settings: Mapping[str, Any], sections: Collection[str], above: tuple[str, ...]
) -> Iterator[Override]:
    """The settings one by one, with whole tables that are not sections."""
    for name, value in settings.items():
        key = (*above, str(name))
        if isinstance(value, Mapping) and ".".join(key) in sections:
            yield from _changes(value, sections, key)
        else:
            yield Override(key, value)


def _sections(path: Path, attempted: str) -> Mapping[str, Any]:
    """Returns the content of the file, unchecked.

    Raises:
        ConfigError: It cannot be read, is not YAML, or not a section.
    """
    try:
        settings = read_yaml(recipe_text(path))
    except UnicodeDecodeError as error:
        found = f"bytes that are not UTF-8 text, at {error.start}"
        raise ConfigError(attempted, found, "a YAML file") from error
    except OSError as error:
        raise ConfigError(attempted, str(error), "a readable YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(attempted, yaml_problem(error), "a readable YAML file") from error
    if not isinstance(settings, Mapping):
        found = "an empty file" if settings is None else shortened(repr(settings))
        raise ConfigError(attempted, found, "sections and keys", "`sgmd recipes show NAME`")
    return settings


def _require_command(
    kind: type[BaseModel], settings: Mapping[str, Any], name: str, attempted: str
) -> None:
    """Checks that a recipe is not another command's.

    Raises:
        ConfigError: Its sections are those of another command and none of this one.
    """
    if any(own in settings for own in kind.model_fields if own not in _SHARED_KEYS):
        return
    for command, sections in SECTIONS_OF.items():
        found = [name for name in sections if name in settings]
        if found:
            raise ConfigError(
                attempted,
                f"the sections {', '.join(found)}, which are those of `sgmd {command}`",
                f"sections such as {', '.join(sorted(set(kind.model_fields) - _SHARED_KEYS)[:4])}",
                f"Run it with `sgmd {command} {name}`",
            )


def _first_comment(text: str) -> str:
    """The comment paragraph that a file opens with, as one line."""
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    return " ".join(takewhile(bool, lines))
