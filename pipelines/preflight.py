"""Everything about a run that can be wrong before a process or a GPU is taken."""

from dataclasses import asdict, dataclass
from typing import Any

from pipelines.config import DistillConfig
from pipelines.data.captions import CaptionPlan, plan_captions, read_rows
from sgmd_core.errors import ConfigError
from workers.models.folder import WanFolder, inspect_wan_folder


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a configuration comes to on this machine.

    Attributes:
        model: The networks' folder.
        latent_shape: (channels, frames, rows, columns) of one sample.
        captions: The training captions.
        held_out: Captions to validate with; empty when validation is off.
        rows_per_iteration: Captions that one iteration takes.
    """

    model: WanFolder
    latent_shape: tuple[int, int, int, int]
    captions: CaptionPlan
    held_out: tuple[str, ...]
    rows_per_iteration: int

    def to_json(self, config: DistillConfig) -> dict[str, Any]:
        """What `--dry-run` prints."""
        return {
            "name": config.name,
            "run_folder": str(config.run_folder),
            "model": str(self.model.path),
            "num_parameters": self.model.num_parameters,
            "latent_shape": list(self.latent_shape),
            "training_rows": self.captions.num_rows,
            "training_shards": len({group.shard for group in self.captions.groups}),
            "held_out_captions": len(self.held_out),
            "rows_per_iteration": self.rows_per_iteration,
            "iterations": config.iterations,
            "epochs": config.iterations * self.rows_per_iteration / self.captions.num_rows,
            "objective": asdict(config.objective),
            "tracking": config.fake_score.tracking,
            "topology": config.topology.mode,
        }


def check(config: DistillConfig) -> Preflight:
    """Checks model folder, clip size, shards and captions.

    Raises:
        SgmdError: The first thing that does not fit, with what to do about it.
    """
    model = inspect_wan_folder(config.model_folder)
    video = config.video
    latent_shape = model.latent_shape(video.num_frames, video.height, video.width)
    captions = plan_captions(config.data.train)
    # One row group is read now: credentials that can list but not read fail here, not later.
    read_rows(next(captions.tasks(config.seed, 0, 1)))
    return Preflight(
        model=model,
        latent_shape=latent_shape,
        captions=captions,
        held_out=_held_out(config),
        rows_per_iteration=config.batch.size * (2 if config.fake_score.tracking == "fresh" else 1),
    )


def _held_out(config: DistillConfig) -> tuple[str, ...]:
    wanted = config.validation.num_captions
    if not config.validation.every:
        return ()
    plan = plan_captions(config.data.validation)
    if plan.num_rows < wanted:
        raise ConfigError(
            f"choosing {wanted} captions to validate with from {config.data.validation}",
            f"{plan.num_rows} rows",
            f"at least {wanted}",
            "Lower validation.num_captions or add shards",
        )
    rows = [row for task in plan.tasks(config.seed, 0, wanted) for row in read_rows(task)]
    return tuple(row.caption for row in rows[:wanted])
