"""Every setting of a distillation, checked before anything is started.

    recipe.yaml + overrides  ->  DistillConfig (frozen)  ->  each part gets its own section

`pipelines.config.recipe_sections` has the sections, and other files here the rules between them,
which are checked when a recipe is made. What depends on files, such as whether the clips
fit the networks, is checked by `pipelines.distillation.preflight`. Secrets are never settings: they
come from the environment.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from cluster.paths import real_path
from cluster.stores import store_address
from pipelines.config import recipe_files, settings_check
from pipelines.config.clip_sizes import compiled_sizes
from pipelines.config.consistency import clipped_sums
from pipelines.config.contradictions import contradictions_of
from pipelines.config.model_folders import model_address
from pipelines.config.overrides import Override, apply_overrides, require_single
from pipelines.config.recipe_sections import RecipeSections
from pipelines.config.roles import TEACHER
from pipelines.config.section import Section
from pipelines.config.seldom_meant import odd_ends, split_factors, unlearned_guidance
from pipelines.config.unreached import unreached_parts
from pipelines.config.unread import unread_settings
from sgmd_core.objectives import cautions_of

_log = logging.getLogger(__name__)


class DistillConfig(RecipeSections):
    """All settings of a distillation, as a recipe has them; made by `load_recipe`, frozen."""

    def contradictions(self) -> Iterable[str]:
        """Sentences on settings that do not fit together."""
        return contradictions_of(self)

    def with_settings(self, settings: Mapping[str, JsonValue]) -> "DistillConfig":
        """The same run with other values, checked again.

        Args:
            settings: New values by dotted key, for example {"objective.lambda_nr": 0.05}.

        Raises:
            ConfigError: A key or a value is wrong.
        """
        return _changed(self, settings, f"changing settings of {self.name}")

    def in_folder(self, run: Path) -> "DistillConfig":
        """The same run, kept in this folder.

        Raises:
            ConfigError: The folder has no name that a run can have.
        """
        folder = run if run.name or store_address(run) else real_path(run)
        return self.with_settings({"output": str(folder.parent), "name": folder.name})

    def with_absolute_paths(self) -> "DistillConfig":
        """The same run for a process that works in another folder of this machine."""
        paths = {
            "model.folder": model_address(self.model.folder),
            "teacher.model": self.teacher.model and model_address(self.teacher.model),
            "data.train": self.data.train,
            "data.validation": self.data.validation,
            "output": self.output,
            "validation.teacher_clips": self.validation.teacher_clips,
        }
        also: list[JsonValue] = [
            {**each.model_dump(mode="json"), "source": recipe_files.absolute_path(each.source)}
            for each in self.data.also
        ]
        return self.with_settings(
            {key: recipe_files.absolute_path(path) for key, path in paths.items() if path}
            | ({"data.also": also} if also else {})
        )


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> DistillConfig:
    """Reads a recipe of `sgmd distill`.

    Args:
        name_or_path: Name of a recipe that ships, or path of a YAML file.
        overrides: Changed settings, for example `["objective.lambda_nr=0.05"]`; the last one of
            a key counts.

    Returns:
        The checked settings, for `distill`.

    Raises:
        ConfigError: The file, a key, a value or a combination is wrong; one error names all.
    """
    config = recipe_files.load(DistillConfig, name_or_path, overrides)
    # A grid over another method's settings is for `sgmd sweep` to refuse: nobody else reads it.
    own = {f"objective.{name}" for name in asdict(config.objective)}
    foreign = set(settings_check.known_keys(DistillConfig)) - own
    searched = config.sweep.dimensions
    check_sweep(
        config,
        [key for key in searched if not (key.startswith("objective.") and key in foreign)],
        f"checking the sweep of {name_or_path}",
    )
    given = [text.partition("=")[0].strip() for text in overrides]
    sentences = (
        *unread_settings(config, given),
        *clipped_sums(config),
        *compiled_sizes(config),
        *unlearned_guidance(
            config.objective, config.model.negative_prompt, config.data.prompt_dropout
        ),
        *unreached_parts(config),
        *odd_ends(config.schedule),
        *cautions_of(config.objective, config.schedule),
        *split_factors(config.teacher, config.teams[TEACHER]),
    )
    for sentence in sentences:
        _log.warning("%s", sentence)
    return config


def check_sweep(config: DistillConfig, keys: Iterable[str], attempted: str) -> None:
    """Checks the values of some keys of a sweep one by one: all of a choice, both ends of a range.

    A key with a condition is checked where it holds. `pipelines.sweeping.checks` has combinations.

    Raises:
        ConfigError: A key is not a setting of this recipe, or a value does not fit it.
    """
    trial = _changed(config, config.sweep.settings, attempted)
    dimensions = config.sweep.dimensions
    for key in keys:
        placed: dict[str, JsonValue] = {}
        conditions = [dimensions[key].places]
        while conditions:
            found = conditions.pop()
            placed |= found
            conditions += [dimensions[other].places for other in found]
        for value in dimensions[key].corners:
            _changed(trial, {**placed, key: value}, attempted)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors that complete and check YAML."""
    schema = DistillConfig.model_json_schema()
    definitions = {**schema["$defs"], DistillConfig.__name__: schema}
    for kind in Section.kinds():
        if definition := definitions.get(kind.__name__):
            for name, meaning in kind.meanings().items():
                definition["properties"][name].setdefault("description", meaning)
    return schema


def _changed(
    config: DistillConfig, settings: Mapping[str, JsonValue], attempted: str
) -> DistillConfig:
    if settings.get("topology.mode") == "local":
        # Settings that leave Ray leave the cluster that the recipe names, too.
        settings = {"topology.address": None, **settings}
    changes = [Override(tuple(key.split(".")), value) for key, value in settings.items()]
    require_single(changes, attempted)
    changed = apply_overrides(config.model_dump(mode="json"), changes)
    return settings_check.validate(DistillConfig, changed, attempted)
