"""Where a run stands, and where it is taken up again."""

from dataclasses import dataclass

from cluster.storage import Checkpoints
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


def resume_position(config: DistillConfig, folder: RunFolder, checkpoints: Checkpoints) -> Position:
    """Where a run is taken up again: at its newest checkpoint, or at the beginning.

    Raises:
        CheckpointError: There is no run, or its checkpoint is one of other settings.
    """
    folder.require()
    latest = checkpoints.latest()
    if latest is None:
        return Position()
    manifest = checkpoints.manifest(latest)
    if manifest["config_digest"] != config.digest:
        raise CheckpointError(
            f"resuming {folder.root} at iteration {latest}",
            f"a checkpoint of configuration {manifest['config_digest']}, while the settings now "
            f"come to {config.digest}",
            f"the same settings, but for {', '.join(MAY_CHANGE)}",
            f"Resume with the run's own config.yaml: sgmd distill {folder.config} --resume ...",
        )
    cursor = Cursor.from_json(manifest.get("cursor"))
    return Position(manifest["iteration"], manifest["rows"], cursor)
