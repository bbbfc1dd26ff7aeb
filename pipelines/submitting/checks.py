"""Checks of a command before it is sent: all that this machine can see of it.

Each check is listed as made here or as left to the job. A folder that only the cluster has is no
error; a relative one that does not travel is.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from botocore.exceptions import BotoCoreError

from cluster.job_files import is_ignored, stays_at_home
from cluster.paths import kind_of_path
from pipelines.config.captions_of_jobs import MAX_CAPTION_BYTES
from pipelines.config.gaussian_study import GaussianStudyConfig, is_gaussian_study
from pipelines.config.overrides import parse_override
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.config.recipe_files import (
    find_recipe,
    load,
    names_base,
    recipe_sections,
    recipe_text,
    shipped_recipes,
)
from pipelines.data.shards.columns import OptionColumnNames
from pipelines.data.shards.filesystem import S3Settings
from pipelines.data.stream.inspect import first_captions, inspect_folder
from pipelines.data.stream.plan import ShuffleSettings
from pipelines.data.stream.source import Source
from pipelines.distillation.network_checks import inspect_networks
from pipelines.distillation.preflight import inspect_captions, run_preflight
from pipelines.pretraining.config import PretrainConfig, load_pretraining
from pipelines.run.outputs import require_lasting_folder
from pipelines.run.places import shared_place
from pipelines.study.run import folder_of, plan_study
from pipelines.submitting.request import JobRequest, TravellingFile, is_lasting, rooted
from pipelines.sweeping.checks import checked_sweep
from pipelines.sweeping.places import sweep_place
from sgmd_core.errors import ConfigError, DataError
from workers.models.addresses import is_address

_ELSEWHERE = (BotoCoreError, PermissionError, ConnectionError, TimeoutError)
"""Failures that say more about this machine's keys and network than about the data."""


class Preparation:
    """A request on its way to one that can be sent.

    Args:
        request: The command as it was given.
        working_dir: The source tree that travels.
        root: Folder or address on the cluster at which relative outputs begin; None: there is none.

    Attributes:
        request: The command as it is to be sent.
        checked: Checks that were made here, each with what was compared, by subject.
        left: What only the job can check, by subject.
    """

    def __init__(self, request: JobRequest, working_dir: Path, root: str | None) -> None:
        self.request = request
        self.checked: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self._working_dir = working_dir
        self._root = root
        self._attempted = " ".join(["submitting", request.command, *request.arguments[:1]])

    def prepare(self) -> JobRequest:
        """Checks the request; returns it with all that it needs.

        Raises:
            SgmdError: What would fail on the cluster, too.
        """
        match self.request.command:
            case "encode":
                self._encode()
            case "evaluate":
                self._evaluate()
            case "pretrain":
                self._pretrain()
                self._take_recipe(PretrainConfig)
            case _ if self._resumes_without_recipe():
                self._resume()
            case "study" if is_gaussian_study(self.request.arguments[0]):
                self._gaussian_study()
                self._take_recipe(GaussianStudyConfig)
            case _:
                self._distill()
                self._take_recipe(DistillConfig)
        return self.request

    def _distill(self) -> None:
        """A distillation, or a sweep or study of some."""
        recipe, *settings = self.request.arguments
        config = load_recipe(recipe, settings)
        run = self.request.option("--resume")
        if run not in ("", "auto"):
            config = config.in_folder(Path(self._resumed(run)))
        self.checked["settings"] = "every value, and the rules between them"
        if run in ("", "auto"):
            self._require_no_home(recipe, settings)
            config = config.with_settings({"output": self._output("output", config.output)})
            require_lasting_folder(config.output, "output")
        results = {"sweep": sweep_place(config), "distill": shared_place(config.run_folder)}
        if self.request.command == "study":
            plan_study(config)
            results["study"] = folder_of(config)
        self._name_results(results[self.request.command])
        models = [config.model.folder, *filter(None, [config.teacher.model])]
        for setting, model in zip(("model.folder", "teacher.model"), models, strict=False):
            self._input(setting, model)
        if self.request.command == "sweep":
            self._input("sweep.start_from", config.sweep.start_from or "")
        data = {"data.train": config.data.train, "data.validation": config.data.validation}
        for setting, path in data.items():
            self._captions(setting, path, self._take_setting)
        data |= self._further_captions(config)
        has_models = all(not is_address(model) and self._is_here(model) for model in models)
        if not has_models:
            self.left["model"] = f"{', '.join(models)}: not a folder of this machine"
        not_here = [path for path in data.values() if path and not self._is_here(path)]
        for setting, path in data.items():
            if path in not_here:
                subject = {"data.train": "data", "data.validation": "held-out"}.get(setting)
                self.left[subject or setting] = f"{path} is not on this machine"
        self._look_at(config, has_models, not_here)
        self.left["cluster"] = "memory and GPUs of its nodes, and whether they can write the output"

    def _further_captions(self, config: DistillConfig) -> dict[str, str]:
        """Sends the files of `data.also` along; returns the sources by their settings."""
        sets = [one.model_dump(mode="json", exclude_defaults=True) for one in config.data.also]
        for number, one in enumerate(sets):

            def take(_: str, inside: str, one: dict[str, Any] = one) -> None:
                one["source"] = inside

            self._captions(f"data.also[{number}].source", one["source"], take)
        sources = [one.source for one in config.data.also]
        if [one["source"] for one in sets] != sources:
            self._take_setting("data.also", json.dumps(sets))
        return {f"data.also[{number}].source": source for number, source in enumerate(sources)}

    def _gaussian_study(self) -> None:
        """A study in closed-form worlds, which needs neither networks nor data."""
        recipe, *settings = self.request.arguments
        config = load(GaussianStudyConfig, recipe, settings)
        self.checked["settings"] = "every value, and the rules between them"
        config = config.model_copy(update={"output": self._output("output", config.output)})
        require_lasting_folder(config.output, "output")
        self._name_results(shared_place(config.folder))
        self.left["cluster"] = "whether it can write the output"

    def _look_at(self, config: DistillConfig, has_models: bool, not_here: list[str]) -> None:
        """Looks at networks and captions, as far as they are here."""
        train, is_served = config.data.train, True
        if has_models and not not_here:
            found = self._try("data", train, lambda: run_preflight(config).checked)
            if found is not None:
                self.checked |= found
                if self.request.command == "sweep":
                    self._sweep(config)
                return
            is_served = False
        if has_models:
            model, _ = inspect_networks(config)
            self.checked["model"] = f"configurations, weight headers of {model.path}; clip size"
        if is_served and train not in not_here:
            self._try("data", train, lambda: inspect_captions(config))

    def _sweep(self, config: DistillConfig) -> None:
        start, goes_on = config.sweep.start_from, self._sweep_may_go_on
        if start and (goes_on or not self._is_here(start)):
            place = "may be that which the sweep has kept" if goes_on else "is not on this machine"
            self.left["sweep.start_from"] = f"{start} {place}"
            config = config.with_settings({"sweep.start_from": None})
        checked_sweep(config, is_new=not goes_on)
        self.checked["sweep"] = "every point of the grid, or the corners of the space"

    @property
    def _sweep_may_go_on(self) -> bool:
        """True where the sweep may have begun, and other rules hold than for a new one."""
        return not {"--resume", "--resume-auto"}.isdisjoint(self.request.options)

    def _try(
        self, subject: str, address: str, look: Callable[[], object]
    ) -> "dict[str, str] | None":
        """Looks at data; where they cannot be reached from here, the job is left to."""
        try:
            found = look()
        except DataError as error:
            if not _is_elsewhere(error):
                raise
            self.left[subject] = f"{address} is not served to this machine ({error.found})"
            return None
        self.checked[subject] = f"listing of {address}, rows up to the first usable ones"
        return found if isinstance(found, dict) else {}

    def _pretrain(self) -> None:
        recipe, *settings = self.request.arguments
        config = load_pretraining(recipe, settings)
        self.checked["settings"] = "every value, and what they ask of one another"
        for setting in ("run_dir", "output", "partial_output"):
            if (path := getattr(config, setting)) is not None:
                path = self._output(setting, path)
                require_lasting_folder(path, setting)
                if setting == "output":
                    self._name_results(path)
        if config.vae.folder is not None:
            self._input("vae.folder", config.vae.folder)
        for name in ("train", "held_out"):
            path = getattr(config.world, name)
            self._input(f"world.{name}", path)
            if self._all_here([path]):
                source = Source(path, S3Settings(native_reads=False))
                self._try(name, path, lambda of=source: inspect_folder(of, 0, ShuffleSettings()))
            else:
                self.left[name] = f"{path} is not on this machine"

    def _resumes_without_recipe(self) -> bool:
        given = self.request.arguments[:1]
        return self.request.command == "distill" and (not given or "=" in given[0])

    def _resume(self) -> None:
        run = self.request.option("--resume")
        if run in ("", "auto"):
            # Says what is missing, in the words of the command.
            raise ConfigError(
                self._attempted,
                "neither a recipe nor a run to resume",
                "sgmd submit RECIPE, or sgmd submit --command distill -- --resume RUN",
                "`sgmd recipes list` shows the recipes that ship",
            )
        self._name_results(self._resumed(run))
        self.left["settings"] = f"those of {run}"

    def _resumed(self, run: str) -> str:
        """The run that is resumed, as the job finds it."""
        lasting = self._lasting("--resume", run)
        self.request = self.request.with_option("--resume", lasting)
        return lasting

    def _encode(self) -> None:
        source, target = self.request.arguments
        self._captions("SRC", source, self._take_argument)
        self._input("--model", self.request.option("--model"))
        target = self._lasting("DST", target)
        self.request = replace(self.request, arguments=(self.request.arguments[0], target))
        self._name_results(target)
        if self._all_here([source]):
            options = ("--caption-column", "--id-column", "--video-column")
            names = OptionColumnNames(*(self.request.option(one) or None for one in options))
            look = Source(source, S3Settings(), names=names)
            self._try("data", source, lambda: inspect_folder(look, 0, ShuffleSettings()))
        else:
            self.left["data"] = f"{source} is not on this machine"

    def _evaluate(self) -> None:
        run = self._lasting("RUN", self.request.arguments[0])
        self.request = replace(self.request, arguments=(run,))
        for option in ("--output", "--cache"):
            if path := self.request.option(option):
                self.request = self.request.with_option(option, self._lasting(option, path))
        for option in ("--teacher", "--features"):
            self._input(option, self.request.option(option))
        captions = self.request.option("--captions")
        self._captions("--captions", captions, self._take_option)
        if captions and self._all_here([captions]):
            self._try("captions", captions, lambda: first_captions(captions, S3Settings(), 0, 1))
        self.left["run"] = run
        self._name_results(self.request.option("--output") or run)

    def _take_recipe(self, kind: type) -> None:
        """Sends a recipe along that does not ship, wherever it lies, with its base in it."""
        recipe = self.request.arguments[0]
        if recipe in {shipped.name for shipped in shipped_recipes()}:
            return
        path = find_recipe(recipe)
        content = recipe_text(path).encode()
        if names_base(path):
            merged = recipe_sections(path, kind)
            content = yaml.safe_dump(dict(merged), sort_keys=False, allow_unicode=True).encode()
        self.request, inside = self.request.with_file(TravellingFile(recipe, content), "recipe")
        self.request = replace(self.request, arguments=(inside, *self.request.settings))

    def _captions(self, name: str, path: str, take: Callable[[str, str], None]) -> None:
        """Sends a file of captions along; a folder has to be on the cluster."""
        file = Path(path).expanduser()
        if "://" not in path and file.is_file() and file.stat().st_size <= MAX_CAPTION_BYTES:
            taken = TravellingFile(path, file.read_bytes())
            # Brackets in a path would be read as a pattern.
            what = name.strip("-").lower().replace("[", ".").replace("]", "")
            self.request, inside = self.request.with_file(taken, what)
            take(name, inside)
        elif path:
            self._input(name, path)

    def _take_setting(self, key: str, value: str) -> None:
        self.request = self.request.with_setting(key, value)

    def _take_option(self, name: str, value: str) -> None:
        self.request = self.request.with_option(name, value)

    def _take_argument(self, name: str, value: str) -> None:
        self.request = replace(self.request, arguments=(value, *self.request.arguments[1:]))

    def _name_results(self, path: str) -> None:
        self.request = replace(self.request, results=path)

    def _output(self, setting: str, path: str) -> str:
        """Place of results: a setting that is relative begins at the root."""
        lasting = self._lasting(setting, path)
        if lasting != path:
            self.request = self.request.with_setting(setting, lasting)
        return lasting

    def _require_no_home(self, recipe: str, settings: Sequence[str]) -> None:
        """Refuses an output in a home, in place of which the settings have that of this machine."""
        written = recipe_sections(find_recipe(recipe), DistillConfig).get("output", "")
        for given in map(parse_override, settings):
            written = given.value if given.key == ("output",) else written
        if isinstance(written, str) and written.startswith("~"):
            self._lasting("output", written)

    def _lasting(self, what: str, path: str) -> str:
        """A path of results, which must not be that of the job's own package."""
        path = rooted(path, self._root)
        option = f"{what} RUN" if what == "--resume" else f"{what.strip('-')}=/mnt/runs"
        if path.startswith("~"):
            raise ConfigError(
                self._attempted,
                f"{what} is {path!r}: the job does not know whose home that is",
                "a path that is written out, on a disk that every node of the cluster reaches",
                f"Give one, such as {option}",
            )
        if is_lasting(path):
            return path
        raise ConfigError(
            self._attempted,
            f"{what} is {path!r}, which would lie in the job's package and go with the job",
            "an absolute path on a disk that every node of the cluster reaches",
            f"Give one ({option}), or say where relative ones begin on the cluster: "
            "--output-root /mnt, or SGMD_OUTPUT_ROOT in the environment",
        )

    def _input(self, what: str, path: str) -> None:
        """Checks that a relative folder travels; of others the cluster has to know."""
        inside = PurePosixPath(path)
        if not path or is_lasting(path):
            return
        stays = stays_at_home(inside) or is_ignored(self._working_dir, inside)
        if (self._working_dir / inside).exists() and not stays:
            return
        raise ConfigError(
            self._attempted,
            f"{what} is {path!r}, a relative path that the job's package does not have: runs, "
            "data, models and what an ignore file names stay at home",
            "an absolute path that the nodes of the cluster have, or s3://bucket/prefix",
            f"Give {what} where the cluster has it",
        )

    def _all_here(self, paths: list[str]) -> bool:
        """Returns True if all of them can be looked at from here."""
        return all(self._is_here(path) for path in paths if path)

    def _is_here(self, path: str) -> bool:
        if "://" in path:
            return path.startswith("s3")
        here = Path(path).expanduser()
        return any(kind_of_path(each) for each in (here, self._working_dir / here))


def _is_elsewhere(error: BaseException) -> bool:
    """Returns True if the keys or the network of this machine may be what has failed."""
    return any(isinstance(cause, _ELSEWHERE) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
