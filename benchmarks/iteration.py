"""Seconds of one iteration with the roles in one process and in every kind of placement, in turns.

    sgmd shapes data/shapes
    python benchmarks/iteration.py --output iteration.json

Each placement is opened beside one process, `local`, and the two take turns of some iterations
each, so that a machine whose speed drifts slows both; who begins changes from turn to turn. Both
must make the same losses. Quote medians and the ratios, pair by pair.

CPU seconds of a placement are those of this process, which calls, and of the processes of roles,
text encoder and feed; those of Ray's own (raylet, GCS and their agents) stand beside them. Each of
these processes also looks for signals a hundred times a second, whatever it does: what they spend
while nothing is asked of them is measured and taken off in `busy_over_local`. `threads` has those
of the main thread and of all others, process by process. `stages_over_local` has the time on the
clock inside of the stages' methods, waits for a core included, over that of the one process. On a
machine with other work CPU seconds hold, and wall seconds do not; all processes get the priority of
this one's session.

Roles of several processes compute at once, and cores that compute at once share caches, memory and
clock: the same work then takes more CPU seconds. `--beside` tells this apart from what a placement
costs: a third kind of turn is that of one process while another one makes the same iterations, and
stops for the other turns.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from documents import write_document
from process_tree import MARK, ProcessTree, thread_seconds

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.data.stream.batch import BatchFeed
from pipelines.data.stream.feed import FeedProgress
from pipelines.distillation.groups import Groups, open_groups
from pipelines.distillation.iteration import PromptBatch, iterate
from pipelines.distillation.iteration_plan import plan_iteration
from pipelines.distillation.preflight import run_preflight
from pipelines.run.folder import RunFolder
from workers.text_encoder import TextEncoder

TRACKING = ("shared", "fresh")
LOCAL, BESIDE, PLACED = "local", "beside", "placed"
_POOL = "{ranks: 1, cpus: 0.5}"
_THREE = f"topology.pools={{learn: {_POOL}, score: {_POOL}, spare: {_POOL}}}"
PLACEMENTS = {
    "fused": ("topology.mode=fused",),
    "map": (),
    "map, teacher with the generator": ("topology.roles.teacher=learn",),
    "map, teacher with the fake score": ("topology.roles.teacher=score",),
    "map, learners together": ("topology.roles.fake_score=learn", "topology.roles.teacher=score"),
    "map, teacher apart": (_THREE, "topology.roles.teacher=spare"),
    "map, three copies": (_THREE, "topology.roles.teacher=[learn, score, spare]"),
    "pools": ("topology.mode=pools",),
}
"""Placements that make the bits of one process, and their settings beside `topology.mode: map`: one
rank a role and pool. (Copies of the teacher in mode `pools` cut each micro-batch among them.)"""
_RAYS_OWN = "Ray's "
_CALLER = "caller"
_IDLE_S = 5.0
_ANSWER_S = 60.0
_COMPANY_READY = "ready"


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of one turn, for each of its iterations.

    Attributes:
        wall_s: Of the clock.
        cpu_s: Of the calling process, of all roles, text encoder and feed.
        ray_cpu_s: Of Ray's own processes.
        parts: Of these, by name of the process.
        losses: Of the last iteration.
        threads: CPU seconds of the main thread of each process, and of its others, by its groups.
        stages_s: Of the clock, inside of the stages' methods, the text encoder's included.
    """

    wall_s: float
    cpu_s: float
    ray_cpu_s: float
    parts: dict[str, float]
    losses: dict[str, float]
    threads: dict[str, tuple[float, float]]
    stages_s: float


class Stand:
    """One placement, opened and ready to iterate."""

    def __init__(
        self, config: DistillConfig, groups: Groups, processes: ProcessTree | None
    ) -> None:
        self._groups = groups
        self._size = config.batch.size
        self._plan = plan_iteration(
            config,
            groups.roles.text.call_rank(
                0, TextEncoder.encode_negative, config.model.negative_prompt
            ),
        )
        self._prompts = [
            PromptBatch(batch.captions)
            for batch in groups.feed.fetch(
                [
                    groups.feed.call_rank(0, BatchFeed.take, self._size)
                    for _ in range(self._plan.batches_per_iteration)
                ],
                60,
                "taking captions",
            )
        ]
        self._iteration = 0
        self._processes = processes
        self._names = {os.getpid(): _CALLER}
        if processes is not None:
            processes.look()
            processes.share_priority()
            for group in groups.all:
                for pid in group.process_ids():
                    others = f"{self._names[pid]} + " if pid in self._names else ""
                    self._names[pid] = others + group.name

    def run(self, count: int) -> Spent:
        """Makes some iterations."""
        self._stage_seconds()
        others, threads = self._others(), self._threads()
        wall, own = time.perf_counter(), time.process_time()
        losses: dict[str, float] = {}
        for _ in range(count):
            report = iterate(self._groups.roles, self._plan, self._iteration, self._prompts)
            self._iteration += 1
            losses = dict(report.losses)
        wall, own = time.perf_counter() - wall, time.process_time() - own
        parts = {
            name: seconds / count for name, seconds in (self._others() - others).items() if seconds
        }
        rays_s = sum(seconds for name, seconds in parts.items() if name.startswith(_RAYS_OWN))
        roles_s = sum(parts.values()) - rays_s
        parts = {"calls" if self._processes else LOCAL: own / count, **parts}
        by_thread = {
            name: ((main - threads[name][0]) / count, (rest - threads[name][1]) / count)
            for name, (main, rest) in self._threads().items()
        }
        stages_s = self._stage_seconds() / count
        return Spent(
            wall / count, own / count + roles_s, rays_s, parts, losses, by_thread, stages_s
        )

    def idle_share(self) -> float:
        """CPU seconds of the started processes, without Ray's own, in a second without work."""
        before, began = self._others(), time.perf_counter()
        time.sleep(_IDLE_S)
        found, took_s = self._others() - before, time.perf_counter() - began
        spent_s = sum(s for name, s in found.items() if not name.startswith(_RAYS_OWN))
        return spent_s / took_s

    def _stage_seconds(self) -> float:
        """Seconds inside of the methods of roles and text encoder since this was last asked."""
        groups = [group for group in self._groups.all if group is not self._groups.feed]
        works = [
            work
            for group in groups
            for each in group.fetch(group.ask_work(), _ANSWER_S, "reading the times of stages")
            for work in each
        ]
        return sum(work.ended_s - work.began_s for work in works)

    def _threads(self) -> dict[str, tuple[float, float]]:
        return {name: thread_seconds(pid) for pid, name in self._names.items()}

    def _others(self) -> Counter[str]:
        """CPU seconds of all processes that were started for the placement."""
        if self._processes is None:
            return Counter()
        self._processes.look()
        return Counter(self._processes.seconds_by_name())


class Company:
    """Another process that makes the iterations of one process, for as long as it is let.

    Args:
        recipe: The recipe.
        settings: Its settings, with the topology of one process.
    """

    def __init__(self, recipe: str, settings: Sequence[str]) -> None:
        command = [sys.executable, __file__, *settings, "--recipe", recipe, "--company"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        assert said == _COMPANY_READY, f"the other process said {said!r}"
        self._process.send_signal(signal.SIGSTOP)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """It makes iterations inside, and stands still outside."""
        self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            assert self._process.poll() is None, "the other process has ended"
            self._process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()


def keep_company(recipe: str, settings: Sequence[str]) -> None:
    """Makes iterations in this process until it is killed."""
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        stand = _open(stack, load_recipe(recipe, settings), Path(scratch) / LOCAL, None)
        stand.run(1)
        print(_COMPANY_READY, flush=True)
        while True:
            stand.run(1)


def measure(
    recipe: str,
    overrides: Sequence[str],
    tracking_modes: Sequence[str],
    placements: Sequence[str],
    turns: int,
    count: int,
    *,
    beside: bool,
) -> dict[str, Any]:
    """Medians for some tracking modes and placements, each beside one process."""
    found: dict[str, Any] = {}
    for tracking in tracking_modes:
        shared = [*overrides, f"fake_score.tracking={tracking}", "validation.every=0"]
        found[tracking] = {}
        for name in placements:
            settings = [*shared, "topology.mode=map", *PLACEMENTS[name]]
            made = _in_turns(recipe, shared, settings, turns, count, beside=beside)
            found[tracking][name] = _summary(*made)
            print(tracking, name, json.dumps(found[tracking][name]), file=sys.stderr)
    return found


def _in_turns(
    recipe: str,
    shared: Sequence[str],
    settings: Sequence[str],
    turns: int,
    count: int,
    *,
    beside: bool,
) -> tuple[list[Mapping[str, Spent]], float]:
    """One placement and one process, a turn of each to warm up; and see `Stand.idle_share`."""
    alone = [*shared, "topology.mode=local"]
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        company = Company(recipe, alone) if beside else None
        # What is started from here on inherits the mark.
        os.environ[MARK] = mark = uuid4().hex
        placed = _open(stack, load_recipe(recipe, settings), Path(scratch) / PLACED, mark)
        stands = {PLACED: placed}
        for name in (LOCAL, BESIDE) if company else (LOCAL,):
            stands[name] = _open(stack, load_recipe(recipe, alone), Path(scratch) / name, None)
        found: list[Mapping[str, Spent]] = []
        try:
            for turn in range(1 + turns):
                order = list(stands)[:: -1 if turn % 2 else 1]
                spent: dict[str, Spent] = {}
                for name in order:
                    with ExitStack() as around:
                        if company and name == BESIDE:
                            around.enter_context(company.at_work())
                        spent[name] = stands[name].run(count)
                losses = [each.losses for each in spent.values()]
                assert losses == losses[:1] * len(losses), "placements make the same numbers"
                found += [spent] if turn else []
        finally:
            if company:
                company.end()
        return found, placed.idle_share()


def _open(stack: ExitStack, config: DistillConfig, folder: Path, mark: str | None) -> Stand:
    checked, num_rows = run_preflight(config), 2 * config.batch.size
    groups = open_groups(config, checked, RunFolder(folder), FeedProgress(), num_rows)
    opened = stack.enter_context(groups)
    return Stand(config, opened, None if mark is None else ProcessTree(mark))


def _summary(turns: Sequence[Mapping[str, Spent]], idle: float) -> dict[str, Any]:
    """Medians of all, and ratios turn by turn.

    Args:
        turns: What the placement and one process have spent.
        idle: See `Stand.idle_share`.
    """
    own = [turn[PLACED] for turn in turns]
    parts = {name for spent in own for name in spent.parts}
    by_part = {
        name: statistics.median(spent.parts.get(name, 0.0) for spent in own) for name in parts
    }
    threads = {
        name: [
            statistics.median(seconds)
            for seconds in zip(*(spent.threads[name] for spent in own), strict=True)
        ]
        for name in own[0].threads
    }
    figures = {
        "cpu_s": statistics.median(spent.cpu_s for spent in own),
        "idle_cpu_share": idle,
        "ray_cpu_s": statistics.median(spent.ray_cpu_s for spent in own),
        "wall_s": statistics.median(spent.wall_s for spent in own),
        "stages_s": statistics.median(spent.stages_s for spent in own),
        "threads": threads,
        "cpu_s_by_process": dict(sorted(by_part.items(), key=lambda part: -part[1])),
    }
    for name, words in ((LOCAL, "local"), (BESIDE, "local_beside")):
        if name in turns[0]:
            figures |= _over([(turn[PLACED], turn[name]) for turn in turns], words, idle)
    return figures


def _over(pairs: Sequence[tuple[Spent, Spent]], name: str, idle: float) -> dict[str, float]:
    """A placement over one process, pair by pair.

    Args:
        pairs: Turns of both.
        name: Of the one process, in the figures' names.
        idle: See `Stand.idle_share`.
    """
    over = [own.cpu_s / one.cpu_s for own, one in pairs]
    busy = [(own.cpu_s - idle * own.wall_s) / one.cpu_s for own, one in pairs]
    return {
        f"{name}_cpu_s": statistics.median(one.cpu_s for _, one in pairs),
        f"cpu_over_{name}": statistics.median(over),
        f"cpu_over_{name}_min": min(over),
        f"cpu_over_{name}_max": max(over),
        f"busy_over_{name}": statistics.median(busy),
        f"stages_over_{name}": statistics.median(own.stages_s / one.stages_s for own, one in pairs),
        f"{name}_wall_s": statistics.median(one.wall_s for _, one in pairs),
        f"wall_over_{name}": statistics.median(own.wall_s / one.wall_s for own, one in pairs),
    }


def main() -> None:
    """Parses the arguments, measures, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the recipe")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--tracking", nargs="+", choices=TRACKING, default=[*TRACKING])
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=[*PLACEMENTS])
    parser.add_argument("--turns", type=int, default=7, help="counted ones of each, after one")
    parser.add_argument("--iterations", type=int, default=4, help="of a turn")
    parser.add_argument(
        "--beside", action="store_true", help="also one process while another makes the same"
    )
    parser.add_argument("--company", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="file for the JSON; standard output without")
    arguments = parser.parse_args()
    if arguments.company:
        keep_company(arguments.recipe, arguments.overrides)
    asked = {
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "turns": arguments.turns,
        "iterations": arguments.iterations,
        "beside": arguments.beside,
    }
    found = measure(
        arguments.recipe,
        arguments.overrides,
        arguments.tracking,
        arguments.placements,
        arguments.turns,
        arguments.iterations,
        beside=arguments.beside,
    )
    write_document("iteration", {**asked, "results": found}, arguments.output)


if __name__ == "__main__":
    main()
