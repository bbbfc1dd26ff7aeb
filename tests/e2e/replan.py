"""A run that loses one of two machines for good; a program, as a process joins one cluster only.

python -m tests.e2e.replan RECIPE [k=v ...]
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from cluster.procfs import raylet_of
from cluster.runtime import start_ray
from pipelines.config.recipe import load_recipe
from pipelines.distillation import run as runs
from pipelines.distillation.groups import Groups
from pipelines.run.observer import RunObserver
from pipelines.run.records import IterationRecord
from tests.cluster.two_machines import two_machines
from workers.models.families import modules_of

OPENED: list[Groups] = []
open_groups = runs.open_groups


@contextmanager
def remembered(*arguments: Any, **options: Any) -> Iterator[Groups]:
    """Opens the groups of a run."""
    with open_groups(*arguments, **options) as groups:
        OPENED.append(groups)
        yield groups


class Losing(RunObserver):
    """Kills the other machine's raylet and the fake score on it after the fifth iteration."""

    def iteration(self, record: IterationRecord) -> None:
        if record.iteration == 4 and len(OPENED) == 1:
            (other,) = [node for node in ray.nodes() if node["Labels"].get("side") == "right"]
            (score,) = OPENED[0].roles.fake_score.process_ids()
            for process in (raylet_of(other["NodeID"]), score):
                os.kill(process, signal.SIGKILL)


def main() -> None:
    """Runs the recipe on two machines."""
    recipe, *settings = sys.argv[1:]
    runs.open_groups = remembered
    config = load_recipe(recipe, settings)
    modules = modules_of(config.model.folder)
    with two_machines(modules) as (cluster, _), start_ray(cluster.address):
        runs.distill(config, observer=Losing())


if __name__ == "__main__":
    main()
