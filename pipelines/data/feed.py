"""The caption feed: one long-lived stream over the plan, pulled batch by batch.

    plan (ours, exact)  ->  Ray Data reads the row groups ahead  ->  CaptionFeed.take(n)

Ray Data has no iterator that can resume, so the plan holds the position and Ray Data only executes
it: the whole rest of the run is one execution, because starting one costs seconds. A fault met in
a reader travels as a row and is raised here, so that it reaches the user with its own type.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.data.captions import CaptionPlan, CaptionRow, ReadTask, RowGroup, read_rows
from sgmd_core.errors import DataError


@dataclass(frozen=True, slots=True)
class CaptionBatch:
    """Rows for one batch and where the stream stands after them.

    Attributes:
        rows: Samples in stream order.
        position: Rows handed out since the start of the run, these included.
    """

    rows: tuple[CaptionRow, ...]
    position: int

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions alone."""
        return tuple(row.caption for row in self.rows)


class CaptionFeed:
    """Hands out captions in the plan's order, from any position.

    Args:
        plan: What to read.
        seed: The run's seed; it fixes the order.
        start: Rows handed out by the run so far (0, or the checkpoint's position).
        num_rows: Rows that the rest of the run will take.
        use_ray_data: Read ahead through Ray Data; otherwise read in this process, in order.
    """

    def __init__(
        self, plan: CaptionPlan, seed: int, start: int, num_rows: int, *, use_ray_data: bool
    ) -> None:
        tasks = plan.tasks(seed, start, num_rows)
        self._position = start
        self._rows = _ray_data_rows(list(tasks)) if use_ray_data else _rows(tasks)

    def take(self, num_rows: int) -> CaptionBatch:
        """The next `num_rows` rows.

        Raises:
            DataError: A row group met on the way cannot be used; the message names it.
        """
        rows = tuple(next(self._rows) for _ in range(num_rows))
        self._position += num_rows
        return CaptionBatch(rows, self._position)


def build_feed(
    plan: CaptionPlan, seed: int, start: int, num_rows: int, use_ray_data: bool
) -> CaptionFeed:
    """Factory for a worker group."""
    return CaptionFeed(plan, seed, start, num_rows, use_ray_data=use_ray_data)


def _rows(tasks: Iterator[ReadTask]) -> Iterator[CaptionRow]:
    for task in tasks:
        yield from read_rows(task)


def _ray_data_rows(tasks: list[ReadTask]) -> Iterator[CaptionRow]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    blocks = max(1, min(len(tasks), 64))
    stream = ray.data.from_items([_pack(task) for task in tasks], override_num_blocks=blocks)
    for row in stream.flat_map(_read_packed, num_cpus=0.25).iter_rows():
        if row["fault"] is not None:
            raise DataError(*row["fault"])
        yield CaptionRow(row["sample_id"], row["caption"])


def _pack(task: ReadTask) -> dict[str, Any]:
    group = task.group
    return {
        "shard": group.shard,
        "index": group.index,
        "num_rows": group.num_rows,
        "seed": list(task.seed),
        "skip": task.skip,
    }


def _read_packed(row: dict[str, Any]) -> list[dict[str, Any]]:
    group = RowGroup(row["shard"], int(row["index"]), int(row["num_rows"]))
    first, second, third = (int(number) for number in row["seed"])
    try:
        rows = read_rows(ReadTask(group, (first, second, third), int(row["skip"])))
    except DataError as error:
        return [{"sample_id": None, "caption": None, "fault": [str(arg) for arg in error.args]}]
    return [{"sample_id": item.sample_id, "caption": item.caption, "fault": None} for item in rows]
