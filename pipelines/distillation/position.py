"""Where a run stands, and where it is taken up again."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.checkpoints import MANIFEST, Checkpoints
from cluster.storage import write_json
from pipelines.config.recipe import MAY_CHANGE, DistillConfig, load_recipe
from pipelines.data.stream.plan import Cursor
from pipelines.run.folder import RunFolder
from sgmd_core.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands.

    Attributes:
        iteration: Generator updates made.
        rows: Captions taken from the stream for them.
        cursor: The place in the data that comes next.
    """

    iteration: int = 0
    rows: int = 0
    cursor: Cursor = Cursor()


def begin(config: DistillConfig, content: Mapping[str, str], folder: RunFolder) -> None:
    """Make the folder of a new run and record what decides its numbers.

    Raises:
        ConfigError: A run of this name exists already.
    """
    folder.create(config.to_yaml())
    write_json(str(folder.identity), identity(config, content))


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
        f"resuming {folder.root}",
        f"batch.micro_batches is {batch.micro_batches}"
        + (f" and batch.exit_draws {batch.exit_draws}" if batch.exit_draws else "")
        + f", while the run draws {kept} exit steps a batch",
        f"batch.exit_draws {kept} or null, and batch.micro_batches a multiple of it",
        "Another number of draws would go on with other random numbers",
    )


def resume_position(
    config: DistillConfig,
    content: Mapping[str, str],
    folder: RunFolder,
    checkpoints: Checkpoints,
    say: Callable[[str], None] = lambda text: None,
) -> Position:
    """Where a run is taken up again: at its newest whole checkpoint, or at the beginning.

    Every byte of a checkpoint is compared with its manifest. A broken one is set aside, and the one
    before it is taken.

    Args:
        config: The settings now.
        content: Digests of the components of the model folder now.
        folder: The run.
        checkpoints: Its committed states.
        say: Hears which checkpoint is broken and why, which one is taken, and what was not checked.

    Raises:
        CheckpointError: There is no run, no checkpoint of it is whole, or it was made with other
            settings or another model; names every difference with both values.
    """
    folder.require()
    if folder.identity.exists():
        began = json.loads(folder.identity.read_text())
        _require_same(differences(began, identity(config, content)), folder)
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
            for number, reason in broken.items():
                say(f"checkpoint {number} is broken ({reason}): going on from {step} instead")
                checkpoints.set_aside(number)
            if not checkpoints.has_digests(step):
                say(f"checkpoint {step} has no digests: only the sizes of its parts were checked")
            return found
        if not fault.startswith(f"no {MANIFEST}"):
            broken[step] = fault or f"{MANIFEST} does not say where the run stood"
    if broken:
        raise CheckpointError(
            f"resuming {folder.root}",
            "; ".join(f"checkpoint {step} is broken: {why}" for step, why in broken.items()),
            "one checkpoint that is whole",
            "Restore one from a copy, or start a new run under another name",
        )
    return Position()


def _require_same(found: Sequence[str], folder: RunFolder) -> None:
    """Refuses to go on with other settings or another model."""
    if found:
        raise CheckpointError(
            f"resuming {folder.root}",
            "; ".join(found),
            f"the same model and the same settings, but for {', '.join(MAY_CHANGE)}",
            f"Resume with the run's own config.yaml: sgmd distill {folder.config} --resume ..., "
            "with the model that it began with, at any path",
        )


def _position(manifest: Mapping[str, Any]) -> Position | None:
    """Where a manifest says that the run stood; None where it makes no sense."""
    try:
        iteration, rows = manifest["iteration"], manifest["rows"]
        if not (isinstance(iteration, int) and isinstance(rows, int)):
            return None
        return Position(iteration, rows, Cursor.from_json(manifest.get("cursor")))
    except (KeyError, CheckpointError):
        return None


def identity(config: DistillConfig, content: Mapping[str, str]) -> dict[str, Any]:
    """What decides the numbers of a run: settings by key, and content of its networks."""
    return {"settings": config.deciding_settings, "model": dict(content)}


def differences(began: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Every setting and component in which two identities differ, with both values."""
    settings = began["settings"], now["settings"]
    found = [
        f"{key} is {_value(settings[1], key)}, and was {_value(settings[0], key)}"
        for key in sorted({*settings[0], *settings[1]})
        if _value(settings[0], key) != _value(settings[1], key)
    ]
    models = began["model"], now["model"]
    return found + [
        f"the {name} in model.folder has content {_value(models[1], name)}, and had "
        f"{_value(models[0], name)}"
        for name in sorted({*models[0], *models[1]})
        if models[0].get(name) != models[1].get(name)
    ]


def _value(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "not set"
