"""Position of a run, and the position at which it is resumed."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.checkpoints import MANIFEST, Checkpoints
from cluster.errors import StorageError
from cluster.logs import ANY, is_kind
from cluster.storage import read_json, write_json
from pipelines.config.captions_of_jobs import keep_captions
from pipelines.config.old_runs import settings_before_they_existed
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.config.yaml_text import shortened
from pipelines.data.shards.prompts import PROMPTS_NAME
from pipelines.data.stream.content import captions_digest, data_differences
from pipelines.data.stream.plan import Cursor
from pipelines.distillation.preflight import Preflight
from pipelines.distillation.training_sets import training_sets
from pipelines.run.differences import format_value, value_differences
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.places import shared_place
from pipelines.run.records import RunEvent
from sgmd_core.errors import CheckpointError
from workers.models.folder import FolderLayout
from workers.models.makers import maker_of


@dataclass(frozen=True, slots=True)
class Position:
    """Position of a run: iterations, samples, cursor.

    Attributes:
        iteration: Generator updates made.
        rows: Captions taken from the stream for them.
        cursor: The place in the data that comes next.
    """

    iteration: int = 0
    rows: int = 0
    cursor: Cursor = Cursor()


def begin(config: DistillConfig, checked: Preflight, folder: RunFolder) -> None:
    """Make the folder of a new run and record what decides its numbers.

    Raises:
        ConfigError: A run of this name exists already.
    """
    folder.create(config.to_yaml())
    keep_captions(config.data, folder.root)
    write_json(str(folder.identity), identity(config, checked))


def with_draws_of(config: DistillConfig, folder: RunFolder) -> DistillConfig:
    """The settings under which a run goes on with the draws of exit steps that it began with.

    There is one draw a micro-batch unless the recipe says otherwise, so another split of the batch
    would draw others; it keeps them where it splits the parts of the first one.

    Raises:
        CheckpointError: There is no run, or its draws do not go with the settings.
    """
    folder.require()
    kept = load_recipe(str(folder.config)).batch.num_exit_draws
    batch = config.batch
    if kept == (batch.exit_draws or kept) and batch.micro_batches % kept == 0:
        return config.with_settings({"batch.exit_draws": kept})
    raise CheckpointError(
        f"resuming {folder}",
        f"batch.micro_batches is {batch.micro_batches}"
        + (f" and batch.exit_draws {batch.exit_draws}" if batch.exit_draws else "")
        + f", while the run draws {kept} exit steps a batch",
        f"batch.exit_draws {kept} or null, and batch.micro_batches a multiple of it",
        "Another number of draws would go on with other random numbers",
    )


def resume_position(
    config: DistillConfig,
    checked: Preflight,
    folder: RunFolder,
    checkpoints: Checkpoints,
    say: Callable[[str], None] = lambda text: None,
    record: Callable[[RunEvent], None] | None = None,
) -> Position:
    """Returns the position of the newest whole checkpoint, or the beginning.

    Every byte of a checkpoint is compared with its manifest. A broken one is set aside, and the one
    before it is taken.

    Args:
        config: The settings now.
        checked: Its networks and its data now.
        folder: The run.
        checkpoints: Its committed states.
        say: Called with one sentence about each thing that was not checked.
        record: Receives an event for each checkpoint that is broken: why, and which one is taken;
            None: `say` is called with it.

    Raises:
        CheckpointError: There is no run, no checkpoint of it is whole, all are gone of one that has
            ended, or it was made with other settings, another model or other data; names every
            difference with both values.
        DataError: The server of the data failed.
    """
    folder.require()
    _require_same(differences(config, checked, folder), folder)
    if not folder.identity.exists():
        say(
            f"{folder.identity} is not there: model and data were not compared with those that the"
            " run began with"
        )
    broken: dict[int, str] = {}
    for step in reversed(checkpoints.all_steps()):
        fault = checkpoints.fault(step, contents=True)
        manifest = {} if fault else checkpoints.manifest(step)
        found = _position(manifest)
        if found is not None:
            digest = manifest.get("config_digest")
            if not folder.identity.exists() and digest != config.digest:
                other = [f"the checkpoint has digest {digest}, not {config.digest}"]
                _require_same(other, folder)
            for event in _set_aside(broken, checkpoints, step):
                record(event) if record else say(event.in_words())
            if not checkpoints.has_digests(step):
                say(f"checkpoint {step} has no digests: only the sizes of its parts were checked")
            return found
        if not fault.startswith(f"no {MANIFEST}"):
            broken[step] = fault or f"{MANIFEST} does not say where the run stood"
    _require_nothing_lost(broken, folder)
    return Position()


def _require_nothing_lost(broken: Mapping[int, str], folder: RunFolder) -> None:
    """Raises where the run has had checkpoints of which none is there and whole."""
    if broken:
        raise CheckpointError(
            f"resuming {folder}",
            "; ".join(f"checkpoint {step} is broken: {why}" for step, why in broken.items()),
            "one checkpoint that is whole",
            "Restore one from a copy, or start a new run under another name",
        )
    if folder.summary.exists():
        raise CheckpointError(
            f"resuming {folder}",
            f"no checkpoint in {shared_place(folder.checkpoints)}, and a summary.json, which says "
            "that the run has come to its end and saved its state",
            "the checkpoints that it has written",
            "Bring them back. Or start a new run under another name, from the weights of this one "
            f"if you like: model.folder={folder}/generator",
        )


def warn_of_gaps(folder: RunFolder, iteration: int, say: Callable[[str], None]) -> None:
    """Says of which iterations before a position the run's log has no line.

    Args:
        folder: The run.
        iteration: Iterations that its state has behind it.
        say: Called with one sentence, if some are missing.
    """
    logged = {line["iteration"] for line in read_jsonl(folder.metrics)}
    missing = [number for number in range(iteration) if number not in logged]
    if missing:
        say(
            f"{folder.metrics} has no line of {len(missing)} of the {iteration} iterations before "
            f"(the first is {missing[0]}): curves and sums are without them, and so are the norms "
            "that guards.spike_factor compares with"
        )


def _set_aside(
    broken: Mapping[int, str], checkpoints: Checkpoints, taken: int
) -> Iterator[RunEvent]:
    """Sets broken checkpoints aside, with an event for each."""
    for step, reason in broken.items():
        checkpoints.set_aside(step)
        yield RunEvent(
            kind="checkpoint_fallback",
            cause=f"checkpoint {step} is broken ({reason})",
            action=f"set it aside, and went back to checkpoint {taken}",
            iteration=taken,
        )


def _require_same(found: Sequence[str], folder: RunFolder) -> None:
    """Refuses to go on with other settings, another model or other data."""
    if found:
        raise CheckpointError(
            f"resuming {folder}",
            "; ".join(found),
            "the model, the data and the settings that decide numbers as it began with them",
            f"Leave these as they were: sgmd distill --resume {folder} has the run's own settings;"
            " docs/runs.md lists the keys that may change. For a change of the others begin a new"
            " run, from these weights if you like: `sgmd export`, and model.folder=...",
        )


def _position(manifest: Mapping[str, Any]) -> Position | None:
    """Returns the position in a manifest; None where it makes no sense."""
    try:
        iteration, rows = manifest["iteration"], manifest["rows"]
        if not (isinstance(iteration, int) and isinstance(rows, int)):
            return None
        return Position(iteration, rows, Cursor.from_json(manifest.get("cursor")))
    except (KeyError, CheckpointError):
        return None


def identity(config: DistillConfig, checked: Preflight) -> dict[str, Any]:
    """Everything that decides the numbers of a run: settings by key, content of networks, data."""
    return {
        "settings": config.deciding_settings,
        "model": checked.content,
        "teacher": checked.teacher_content,
        "train": list(checked.data.first),
        **({"also": [list(one.data.first) for one in checked.further]} if checked.further else {}),
        "columns": {
            f"data.columns.{name}": stored for name, stored in checked.data.columns.stored.items()
        },
        "validation": {str(len(checked.held_out)): captions_digest(checked.held_out)},
        "prompts": checked.texts.digests,
    }


_ROW_GROUP = {
    "shard": str,
    "num_bytes": int,
    "index": int,
    "num_rows": int,
    "content": str,
    "latents?": str,
}
_IDENTITY = {
    "settings": dict,
    "model": {ANY: str},
    "teacher?": {ANY: str},
    "columns?": dict,
    "validation?": dict,
    "train?": [_ROW_GROUP],
    "also?": [[_ROW_GROUP]],
    "prompts?": {ANY: str},
}


def read_identity(folder: RunFolder, attempted: str) -> dict[str, Any]:
    """Identity of a run when it began.

    Args:
        folder: The run; its identity.json is there.
        attempted: Purpose, for the error.

    Raises:
        CheckpointError: The file is not one that a run wrote.
    """
    try:
        began = read_json(str(folder.identity))
    except StorageError as error:
        began, found = None, error.found
    else:
        found = "it does not hold the settings and the model of the run's beginning"
    if began is None or not is_kind(began, _IDENTITY):
        raise CheckpointError(
            attempted,
            f"{folder.identity.name} is damaged: {found}",
            "the identity.json that the run wrote when it began",
            "Restore that file from a copy, or start a new run",
        )
    return began


def differences(config: DistillConfig, checked: Preflight, folder: RunFolder) -> list[str]:
    """Every setting, component and shard in which a run differs from its beginning, both values.

    Args:
        config: The settings now.
        checked: Networks and data now.
        folder: The run.

    Raises:
        DataError: The server of the data failed.
    """
    if not folder.identity.exists():
        return []
    began, now = read_identity(folder, f"resuming {folder}"), identity(config, checked)
    captions = began.get("validation", {}), now["validation"]
    # A run of an older version lacks the settings that came later.
    before = {**settings_before_they_existed(config), **began["settings"]}
    before = {key: before[key] for key in before if key in {*began["settings"], *now["settings"]}}
    return [
        *value_differences(before, now["settings"]),
        *model_differences(began, now["model"], layout=checked.model.layout),
        *model_differences(began, now["teacher"], "teacher", "teacher.model"),
        *(value_differences(began["columns"], now["columns"]) if "columns" in began else ()),
        *data_differences(checked.source, read_jsonl(folder.shards), began.get("train", ())),
        *(
            difference.replace("data.train", training_sets(config)[number].setting)
            for number, (one, first) in enumerate(
                zip(checked.further, began.get("also", ()), strict=False), start=1
            )
            for difference in data_differences(
                one.source, read_jsonl(folder.of_set(number).shards), first
            )
        ),
        # As many captions as then: another number is another choice from the same folder.
        *(
            f"the first {count} captions of data.validation have content "
            f"{format_value(captions[1], count)}, and had {format_value(captions[0], count)}"
            for count in sorted({*captions[0]} & {*captions[1]})
            if captions[0][count] != captions[1][count]
        ),
        *_prompt_differences(began.get("prompts", {}), now["prompts"]),
    ]


def _prompt_differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Prompts whose embeddings come from elsewhere; older runs had their text encoder make all."""

    def source(digests: Mapping[str, str], text: str) -> str:
        if text not in digests:
            return "embedded by the text encoder"
        return f"stored with content {format_value(digests, text)}"

    return [
        f"the embedding of the prompt {json.dumps(shortened(text, 40))} is {source(now, text)}, "
        f"and was {source(before, text)} ({PROMPTS_NAME} beside the data: put back the one that "
        "the run began with, or take it away if there was none)"
        for text in sorted({*before, *now})
        if before.get(text) != now.get(text)
    ]


def model_differences(
    began: Mapping[str, Any],
    now: Mapping[str, str],
    role: str = "model",
    setting: str = "model.folder",
    layout: FolderLayout | None = None,
) -> list[str]:
    """Every component of a model folder that is not the one of a run, with both digests.

    Args:
        began: Identity of the run.
        now: Digests of the components now.
        role: Part of the identity: `model`, or `teacher` for one of another model.
        setting: Setting that names the folder.
        layout: Components of the folder. Where one of both folders has no weights of those that
            embed text, they are compared by what embeddings name; an autoencoder that one of both
            lacks by what latents name, or not at all where nothing was made by it.
    """
    # Older runs had no teacher of another model.
    before = began.get(role, {})
    same = set[str]()
    if layout is not None:
        text, latents = (
            [maker_of(digests, names) for digests in (before, now)]
            for names in (layout.text, (layout.autoencoder,))
        )
        if None not in text and text[0] == text[1]:
            same |= {*layout.text}
        if None in latents or latents[0] == latents[1]:
            same.add(layout.autoencoder)
    return [
        f"the {name} in {setting} has content {format_value(now, name)}, and had "
        f"{format_value(before, name)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name) and name not in same
    ]
