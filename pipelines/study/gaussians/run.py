"""`sgmd study gaussians`: makes every cell that is missing, several at a time, and writes tables.

    search   every pair of rates with the search's seeds   ->   the best mean energy distance
    compare  that pair with the comparison's seeds          ->   points, figures

A cell is written whole when it is done; started again, the study goes on with the missing ones. A
cell has one thread and draws of its own, so its numbers do not depend on how many run at a time.
"""

import hashlib
import json
import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from cluster.errors import StorageError
from cluster.inventory import num_cores
from cluster.storage import read_json, write_json, write_text
from pipelines.config.gaussian_study import GaussianStudyConfig
from pipelines.config.recovery import RecoverySettings
from pipelines.data.making.ordered_pool import die_with_parent
from pipelines.run.outputs import require_output_folder
from pipelines.run.places import local_of, shared_place
from pipelines.run.publisher import publish_now, published_place
from pipelines.study.gaussians.distilling import (
    GaussianDistillation,
    Member,
    measured_on_the_way,
    mixture_of,
)
from pipelines.study.gaussians.figures import write_gaussian_plots
from pipelines.study.gaussians.measuring import ENERGY, FIGURES, Truth
from pipelines.study.gaussians.plan import (
    StudyCell,
    cells,
    compared_members,
    num_iterations,
    search_members,
    units_per_iteration,
)
from pipelines.study.gaussians.results import CellResult, MeasuredPoint
from pipelines.study.gaussians.tables import GaussianResults, gaussian_csv, gaussian_markdown

_SHOWN_SAMPLES = 400

Tell = Callable[[str], None]


def gaussian_study(
    config: GaussianStudyConfig, tell: Tell, num_processes: int | None = None
) -> GaussianResults:
    """Makes and measures every cell that is missing, and writes tables and plots.

    Args:
        config: The recipe.
        tell: Called with one line about each cell.
        num_processes: Cells at a time; None takes the cores of this process.

    Raises:
        SgmdError: The recipe or its folder is wrong.
        LeaseError: Another process runs the study.
    """
    require_output_folder(config.folder, "output")
    planned = {cell: num_iterations(config, cell) for cell in cells(config)}
    with published_place(
        config.folder,
        f"sgmd study {config.name}",
        RecoverySettings().storage_outage_s,
        lambda event: tell(event.in_words()),
    ) as folder:
        done = {cell: found for cell in planned if (found := _stored(config, cell)) is not None}
        missing = [cell for cell in planned if cell not in done]
        tell(f"{len(planned)} cells, {len(done)} of them made before, in {shared_place(folder)}")
        with closing(_made_side_by_side(config, missing, num_processes)) as made:
            for cell, result in made:
                done[cell] = result
                stored = {**result.to_json(), "key": _key(config, cell)}
                write_json(str(_path(config, cell)), stored)
                publish_now(folder)
                tell(_told(len(done), len(planned), result))
        results = GaussianResults(config, tuple(done[cell] for cell in planned), _floors(config))
        _write(results)
    return results


def dry_run_gaussian_study(config: GaussianStudyConfig) -> dict[str, Any]:
    """Returns the cells of a study with their iterations and passes; makes nothing.

    Raises:
        SgmdError: What does not fit.
    """
    require_output_folder(config.folder, "output")
    return {
        "folder": shared_place(config.folder),
        "seeds": config.num_seeds,
        "searched_pairs": len(search_members(config)) // config.search.num_seeds,
        "cells": [
            {
                "world": cell.world,
                "variant": cell.variant,
                "iterations": num_iterations(config, cell),
                "forwards_per_iteration": units_per_iteration(
                    config.schedule,
                    config.worlds[cell.world],
                    config.variants[cell.variant],
                    num_iterations(config, cell),
                ),
            }
            for cell in cells(config)
        ],
    }


def _made_side_by_side(
    config: GaussianStudyConfig, missing: Sequence[StudyCell], num_processes: int | None
) -> Generator[tuple[StudyCell, CellResult], None, None]:
    """Makes cells in processes of one thread each, and gives each when it is done."""
    processes = min(num_processes or num_cores(), len(missing))
    if processes < 2:
        yield from ((cell, _made(config, cell)) for cell in missing)
        return
    # Forked from a process that has imported this once, for all of them, and computed nothing.
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(processes, forks, initializer=die_with_parent)
    try:
        # Ctrl-C in a terminal goes to them all, and is for this process to answer.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            asked = {pool.submit(_made, config, cell): cell for cell in missing}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for future in as_completed(asked):
            yield asked[future], future.result()
    except BaseException:
        # Cells under way take minutes, and nobody waits for them any more.
        for process in multiprocessing.active_children():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _made(config: GaussianStudyConfig, cell: StudyCell) -> CellResult:
    """Searches the rates of a cell, and makes its runs with the best ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _searched_and_compared(config, cell)
    finally:
        torch.set_num_threads(threads)


def _searched_and_compared(config: GaussianStudyConfig, cell: StudyCell) -> CellResult:
    search = _searched(config, cell)
    # Where every pair breaks a seed, the lowest rates show how many of the others break.
    best = min(search, key=lambda pair: (search[pair], pair))
    begun = time.perf_counter()
    points: list[MeasuredPoint] = []
    members = compared_members(config, *best)
    world, variant = config.worlds[cell.world], config.variants[cell.variant]
    samples = torch.empty(0)
    for iteration, samples in _on_the_way(config, cell, members, config.measurements):
        figures = _figures(config, cell, members, samples)
        by_name = {name: [each[name] for each in figures] for name in FIGURES}
        spent = iteration * units_per_iteration(config.schedule, world, variant, iteration)
        points.append(MeasuredPoint(iteration, spent, by_name))
    shown = samples[0, :_SHOWN_SAMPLES].tolist() if samples.shape[-1] == 2 else []
    return CellResult(
        cell.world,
        cell.variant,
        best,
        {f"{generator:g}/{fake:g}": value for (generator, fake), value in search.items()},
        tuple(points),
        time.perf_counter() - begun,
        shown,
    )


def _searched(config: GaussianStudyConfig, cell: StudyCell) -> dict[tuple[float, float], float]:
    """Mean energy distance at the end of each pair of rates; infinite where a seed broke."""
    members = search_members(config)
    ((_, samples),) = _on_the_way(config, cell, members, 1)
    found: dict[tuple[float, float], list[float]] = {}
    for member, figures in zip(members, _figures(config, cell, members, samples), strict=True):
        pair = (member.generator_rate, member.fake_rate)
        found.setdefault(pair, []).append(figures[ENERGY])
    return {
        pair: mean if math.isfinite(mean := sum(values) / len(values)) else math.inf
        for pair, values in found.items()
    }


def _on_the_way(
    config: GaussianStudyConfig, cell: StudyCell, members: list[Member], measurements: int
) -> Iterator[tuple[int, torch.Tensor]]:
    distillation = GaussianDistillation(
        config, config.worlds[cell.world], config.variants[cell.variant], members
    )
    return measured_on_the_way(
        distillation, num_iterations(config, cell), measurements, config.num_samples
    )


def _figures(
    config: GaussianStudyConfig, cell: StudyCell, members: list[Member], samples: torch.Tensor
) -> list[dict[str, float]]:
    truth = Truth(mixture_of(config.worlds[cell.world]), config.num_samples)
    pairs = zip(members, samples, strict=True)
    return [truth.figures(own, member.seed) for member, own in pairs]


def _floors(config: GaussianStudyConfig) -> dict[str, Mapping[str, list[float]]]:
    """Figures of the truth's own other samples, by world."""
    found: dict[str, Mapping[str, list[float]]] = {}
    for name, world in config.worlds.items():
        floor = Truth(mixture_of(world), config.num_samples).floor(range(config.num_seeds))
        found[name] = {figure: [each[figure] for each in floor] for figure in FIGURES}
    return found


def _told(done: int, total: int, result: CellResult) -> str:
    energy = [value for value in result.end.figures[ENERGY] if math.isfinite(value)]
    mean = f"{sum(energy) / len(energy):.4f}" if energy else "not finite"
    name = f"{result.world}.{result.variant}"
    return f"{done}/{total} {name}: energy distance {mean}, {result.seconds:.0f} s"


def _path(config: GaussianStudyConfig, cell: StudyCell) -> Path:
    return local_of(config.folder) / "cells" / f"{cell.name}.json"


def _key(config: GaussianStudyConfig, cell: StudyCell) -> str:
    """Names all that decides a cell's numbers."""
    others = {"worlds", "variants", "name", "output", "baseline"}
    decides = {
        "study": config.model_dump(mode="json", exclude=others),
        "world": config.worlds[cell.world].model_dump(mode="json"),
        "variant": config.variants[cell.variant].model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _stored(config: GaussianStudyConfig, cell: StudyCell) -> CellResult | None:
    """A cell that was made before with the same settings."""
    path = _path(config, cell)
    if not path.exists():
        return None
    try:
        stored = dict(read_json(str(path)))
        return CellResult.from_json(stored) if stored.pop("key") == _key(config, cell) else None
    except (StorageError, KeyError, TypeError, ValueError):
        return None


def _write(results: GaussianResults) -> None:
    folder = local_of(results.config.folder)
    write_text(str(folder / "results.md"), gaussian_markdown(results))
    write_text(str(folder / "results.csv"), gaussian_csv(results))
    write_json(str(folder / "results.json"), results.to_json())
    write_gaussian_plots(folder, results)
