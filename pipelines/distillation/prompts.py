"""The captions of each iteration: asked for one iteration ahead, entered in the log of the data.

take(n + 1)  ->  of(n): wait, record, hand on  ->  used(n): what the iteration was made of
rewind(n)    ->  of(n) hands on again what it has handed on, as long as it is remembered
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cluster.spans import labelled
from cluster.worker_group import Future, WorkerGroup
from pipelines.data.shards.schema import LATENTS, TEXT_EMBEDS
from pipelines.data.stream.batch import Batch, BatchFeed
from pipelines.distillation.iteration import PromptBatch
from pipelines.run.data_log import DataLog
from sgmd_core.seeds import random_generator

_REMEMBERED = 8
"""Iterations whose captions can be handed on again; stored embeddings take memory meanwhile."""


@dataclass(frozen=True, slots=True)
class ConsumedBatches:
    """Batches that an iteration took from the stream.

    Attributes:
        batches: Its batches.
        waited_s: How long it waited for them.
        rejected: Rows, row groups and shards newly left out on the way.
    """

    batches: tuple[Batch, ...]
    waited_s: float
    rejected: int


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """Content of an iteration's batches.

    Attributes:
        batch_size: Captions of one batch.
        batches_per_iteration: Batches of one iteration.
        stored: Whether stored embeddings are used.
        has_data: Whether the iterations take latents of the data.
        seed: The run's seed.
        dropout: Share of the captions that are replaced by the empty one.
        has_buckets: Whether the data have a set for each size, of which an iteration draws one.
    """

    batch_size: int
    batches_per_iteration: int
    stored: bool = False
    has_data: bool = False
    seed: int = 0
    dropout: float = 0.0
    has_buckets: bool = False


class Prompts:
    """Hands out captions, iteration after iteration.

    Args:
        feed: Reads the data.
        data: Log of the data that the run has used.
        plan: Content of the batches.
        iterations: First iteration, and one past the last.
        timeout_s: How long to wait for captions.
    """

    def __init__(
        self,
        feed: WorkerGroup[BatchFeed],
        data: DataLog,
        plan: PromptPlan,
        iterations: tuple[int, int],
        timeout_s: float,
    ) -> None:
        self._feed = feed
        self._data = data
        self._plan = plan
        self._end = iterations[1]
        self._timeout_s = timeout_s
        self._taken: dict[int, ConsumedBatches] = {}
        self._remembered: dict[int, tuple[list[Batch], list[PromptBatch]]] = {}
        self._next = iterations[0]
        self._coming = self._take(iterations[0])

    def of(self, iteration: int) -> list[PromptBatch]:
        """The captions of an iteration; iterations are asked for in order, after `rewind` again.

        One that is under way may be asked for as often as it is needed.

        Raises:
            DataError: Too much of the data cannot be used, or their server failed.
        """
        if iteration in self._taken:
            return self._remembered[iteration][1]
        if iteration in self._remembered:
            batches, prompts = self._remembered[iteration]
            rejected = self._data.record_arrival(iteration, batches)
            self._taken[iteration] = ConsumedBatches(tuple(batches), 0.0, rejected)
            return prompts
        began = time.perf_counter()
        attempted = f"reading captions ({iteration})"
        batches = self._feed.fetch(self._coming, self._timeout_s, attempted)
        waited_s = time.perf_counter() - began
        rejected = self._data.record_arrival(iteration, batches)
        self._taken[iteration] = ConsumedBatches(tuple(batches), waited_s, rejected)
        prompts = [self._prompts(iteration, *numbered) for numbered in enumerate(batches)]
        # Notes about the folder are entered once, whatever is made again.
        self._remembered[iteration] = [replace(one, notes=()) for one in batches], prompts
        self._remembered.pop(iteration - _REMEMBERED, None)
        # Asked for one iteration ahead, so that training does not wait for reading.
        self._next = iteration + 1
        self._coming = self._take(iteration + 1)
        return prompts

    def remembers(self, iteration: int) -> bool:
        """Returns True if this iteration and all later ones can be asked for again."""
        return all(one in self._remembered for one in range(iteration, self._next))

    def rewind(self) -> None:
        """Forgets which iterations were under way; those remembered may be asked for again."""
        self._taken.clear()

    def forget(self, before: int) -> None:
        """Releases the captions of iterations that will not be asked for again.

        Args:
            before: The first iteration that is still remembered.
        """
        for iteration in [one for one in self._remembered if one < before]:
            del self._remembered[iteration]

    def used(self, iteration: int) -> ConsumedBatches:
        """Returns the batches of an iteration that is over, once."""
        return self._taken.pop(iteration)

    def _take(self, iteration: int) -> Sequence[Future[Batch]]:
        if iteration >= self._end:
            return []
        draw = iteration if self._plan.has_buckets else None
        with labelled(iteration):
            return [
                self._feed.call_rank(
                    0, BatchFeed.take, self._plan.batch_size, self._columns(number), draw
                )
                for number in range(self._plan.batches_per_iteration)
            ]

    def _columns(self, number: int) -> tuple[str, ...]:
        """Columns that are asked for of a batch; the generator learns from the first one."""
        stored = (TEXT_EMBEDS,) if self._plan.stored else ()
        return (*stored, LATENTS) if self._plan.has_data and not number else stored

    def _prompts(self, iteration: int, number: int, batch: Batch) -> PromptBatch:
        rows = len(batch.captions)
        dropped = dropped_rows(self._plan.seed, iteration, number, rows, self._plan.dropout)
        # The log of the data has the captions as they were read.
        captions = tuple(
            "" if row in dropped else caption for row, caption in enumerate(batch.captions)
        )
        with labelled(iteration):
            columns, stored, data = self._columns(number), None, None
            if TEXT_EMBEDS in columns:
                stored = self._feed.call_rank(0, BatchFeed.embeddings, batch.number)
            if LATENTS in columns:
                data = self._feed.call_rank(0, BatchFeed.data, batch.number)
        return PromptBatch(captions, stored, dropped, batch.sample_ids, data)


def dropped_rows(
    seed: int, iteration: int, batch: int, num_rows: int, dropout: float
) -> frozenset[int]:
    """Rows of a batch whose caption is dropped: one draw a sample, counted by its place.

    Args:
        seed: The run's seed.
        iteration: Updates of the generator made before.
        batch: Number of the batch in the iteration.
        num_rows: Captions of the batch.
        dropout: Probability of each.
    """
    if not dropout:
        return frozenset()
    stream = random_generator(seed, "prompt-dropout", iteration, batch)
    draws = torch.rand(num_rows, generator=stream, dtype=torch.float64)
    return frozenset((draws < dropout).nonzero().flatten().tolist())
