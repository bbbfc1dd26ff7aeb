"""Runs each proposed point once a seed, and tells the proposer the means.

Tune's own `Repeater` knows one figure, and forgets its groups when a sweep is restored.
"""

import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ray.tune.search import Searcher

from cluster.files import write_whole


class OverSeeds(Searcher):
    """A searcher around another one.

    Args:
        proposer: Proposes points; it sees a point as one trial, that of the first seed.
        figures: Names of the figures whose means it is given.
        seeds: Of the runs of each point.
    """

    def __init__(self, proposer: Searcher, figures: Sequence[str], seeds: Sequence[int]) -> None:
        super().__init__(metric=proposer.metric, mode=proposer.mode)
        self._proposer = proposer
        self._figures = tuple(figures)
        self._seeds = tuple(seeds)
        # By the trial of the first seed: its point.
        self._points: dict[str, dict[str, Any]] = {}
        # By the trial of the first seed: the trials of its point, with what came of them.
        self._groups: dict[str, dict[str, Mapping[str, float] | None]] = {}
        self._lead_of: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Proposes the next seed of the latest point, or a new point."""
        if trial_id in self._lead_of:
            # Tune asks again where it could not start a trial.
            lead = self._lead_of[trial_id]
            place = list(self._groups[lead]).index(trial_id)
            return {**self._points[lead], "seed": self._seeds[place]}
        lead = next(reversed(self._groups), None)
        if lead is None or len(self._groups[lead]) == len(self._seeds):
            proposed = self._proposer.suggest(trial_id)
            if proposed is None or proposed == Searcher.FINISHED:
                return proposed
            lead = trial_id
            self._points[lead], self._groups[lead] = proposed, {}
        group = self._groups[lead]
        seed = self._seeds[len(group)]
        group[trial_id] = None
        self._lead_of[trial_id] = lead
        return {**self._points[lead], "seed": seed}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Passes on what a single seed reports; of several, the means count alone."""
        if len(self._seeds) == 1:
            self._proposer.on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tells the proposer the means over seeds once all trials of the point have ended.

        A point of which a seed has failed is a failure to it: the others alone may be the lucky
        ones.
        """
        lead = self._lead_of[trial_id]
        group = self._groups[lead]
        known = result if result and not error else {}
        group[trial_id] = {name: known.get(name, math.nan) for name in self._figures}
        ends = [end for end in group.values() if end is not None]
        if len(ends) < len(self._seeds):
            return
        means = {name: mean(end[name] for end in ends) for name in self._figures}
        if all(map(math.isfinite, means.values())):
            self._proposer.on_trial_complete(lead, means)
        else:
            self._proposer.on_trial_complete(lead, None, error=True)

    def save(self, checkpoint_path: str) -> None:
        """Writes this searcher and the other one down."""
        inner = f"{checkpoint_path}.proposer"
        self._proposer.save(inner)
        state = {name: getattr(self, name) for name in ("_points", "_groups", "_lead_of")}
        content = {"own": state, "proposer": Path(inner).read_bytes()}
        write_whole(checkpoint_path, pickle.dumps(content))
        Path(inner).unlink()

    def restore(self, checkpoint_path: str) -> None:
        """Takes up what `save` wrote; the file is the sweep's own."""
        stored = pickle.loads(Path(checkpoint_path).read_bytes())
        inner = Path(f"{checkpoint_path}.proposer")
        write_whole(inner, stored["proposer"])
        self._proposer.restore(str(inner))
        inner.unlink()
        for name, value in stored["own"].items():
            setattr(self, name, value)
