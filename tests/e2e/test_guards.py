"""Updates that are skipped: both roles stay in step, and a resumed run repeats every decision."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from pipelines.config.recipe import DistillConfig
from pipelines.data.stream.ledger import Ledger
from pipelines.distillation.run import distill
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.records import IterationRecord, RunEvent
from sgmd_core.errors import AlarmError, NonFiniteError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.test_encoded import changed
from tests.e2e.test_equivalence import history, slow_but, state

_EVERY = ("checkpoint.every=1", "checkpoint.keep=9")


def samples_of(config: DistillConfig, iteration: int, batch: int = 0) -> tuple[str, ...]:
    """Samples of a batch of an iteration."""
    own = [
        e for e in Ledger(RunFolder(config.run_folder).ledger).entries() if e.iteration == iteration
    ]
    size = config.batch.size
    return own[0].sample_ids[batch * size : (batch + 1) * size]


def lines_of(config: DistillConfig) -> list[dict[str, Any]]:
    return read_jsonl(RunFolder(config.run_folder).metrics)


def weights_at(config: DistillConfig, step: int, role: str) -> dict[str, Any]:
    folder = RunFolder(config.run_folder).checkpoints / f"step-{step:06d}" / role
    return load_file(folder / "weights.safetensors")


def counters_at(config: DistillConfig, step: int, role: str) -> tuple[int, int]:
    """Updates made and skipped."""
    folder = RunFolder(config.run_folder).checkpoints / f"step-{step:06d}" / role
    record = json.loads((folder / "role.json").read_text())
    return record["updates"], record["skipped"]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name].equal(other[name]) for name in one)


class Killed(Exception):
    """Ends a run as a kill does: without a state saved."""


class _Killer(RunObserver):
    def __init__(self, after: int) -> None:
        self._after = after
        self.events: list[RunEvent] = []

    def event(self, event: RunEvent) -> None:
        self.events.append(event)

    def iteration(self, record: IterationRecord) -> None:
        if record.iteration == self._after:
            raise Killed


def planted(encoded: Path, folder: Path, bad: dict[str, float]) -> Path:
    """The shards again, the embeddings of some samples times a factor."""
    change: Callable[[str, np.ndarray], np.ndarray]
    change = lambda name, text: text * np.float32(bad.get(name, 1.0))  # noqa: E731
    return changed(encoded, folder, change)


@pytest.mark.slow
@pytest.mark.parametrize("tracking", slow_but("shared", "fresh"))
def test_a_sample_that_is_not_a_number_skips_one_update_of_both_roles(
    make_recipe: MakeRecipe, encoded: Path, tmp_path: Path, tracking: str
) -> None:
    mode = f"fake_score.tracking={tracking}"
    calm = make_recipe("name=calm", "iterations=3", mode, f"data.train={encoded}")
    distill(calm)
    ids = samples_of(calm, 2)
    train = planted(encoded, tmp_path / "bad", {ids[3]: float("nan")})
    settings = [mode, f"data.train={train}", "iterations=5"]
    whole = make_recipe("name=whole", *settings, *_EVERY)
    observer = _Killer(99)
    summary = distill(whole, observer=observer)

    lines = lines_of(whole)
    assert [bool(line.get("skipped")) for line in lines] == [False, False, True, False, False]
    (skipped,) = lines[2]["skipped"]
    assert skipped["kind"] == "non_finite"
    assert "the text embedding and the generator's x0 not finite" in skipped["reason"]
    assert "iteration 2, micro-batch 1" in skipped["reason"]
    assert tuple(skipped["sample_ids"]) == ids
    assert summary["iterations_skipped"] == 1
    (event,) = [event for event in observer.events if event.kind == "skipped_update"]
    assert (event.iteration, ids[3] in event.cause) == (2, True)
    assert read_jsonl(RunFolder(whole.run_folder).events) == [
        json.loads(json.dumps(event.to_json()))
    ]
    # With fresh tracking the fake score learns from other samples, which are sound.
    roles = ["generator", "fake_score"] if tracking == "shared" else ["generator"]
    assert skipped["roles"] == roles
    for role in ("generator", "fake_score"):
        kept = same(weights_at(whole, 2, role), weights_at(whole, 3, role))
        assert kept == (role in roles)
        assert not same(weights_at(whole, 3, role), weights_at(whole, 4, role))
        assert counters_at(whole, 5, role) == ((4, 1) if role in roles else (5, 0))
        assert all(value.isfinite().all() for value in weights_at(whole, 5, role).values())
    assert history(calm)[:2] == history(whole)[:2]
    assert samples_of(whole, 2) == ids
    assert "NaN" not in RunFolder(whole.run_folder).metrics.read_text()

    # Killed after the skip: once it is in the state that the run goes on from, once it is not.
    for name, every in (("before", 2), ("after", 3)):
        again = make_recipe(f"name={name}", *settings, f"checkpoint.every={every}")
        with pytest.raises(Killed):
            distill(again, observer=_Killer(3))
        assert len(lines_of(again)) == 4
        distill(again, resume=True)
        assert history(again) == history(whole)
        assert state(again, 5) == state(whole, 5)


@pytest.mark.slow
def test_nothing_is_mixed_into_the_fake_score_after_a_skipped_update_of_the_generator(
    make_recipe: MakeRecipe, encoded: Path, tmp_path: Path
) -> None:
    settings = ["objective={method: dmd2, fake_updates: 1}", "fake_score.ida_decay=0.5"]
    # The rate is too small to move a weight, so whatever moves was mixed.
    settings += ["fake_score.tracking=fresh", "fake_score.optimizer.lr=1e-30", "iterations=3"]
    calm = make_recipe("name=calm", *settings, *_EVERY, f"data.train={encoded}")
    distill(calm)
    bad = {samples_of(calm, 1)[0]: float("nan")}
    train = planted(encoded, tmp_path / "bad", bad)
    whole = make_recipe("name=whole", *settings, *_EVERY, f"data.train={train}")
    distill(whole)
    assert [bool(line.get("skipped")) for line in lines_of(whole)] == [False, True, False]
    before, after, mixed = (weights_at(whole, step, "fake_score") for step in (1, 2, 3))
    assert same(before, after)
    assert not same(after, mixed)
    assert not same(weights_at(calm, 1, "fake_score"), weights_at(calm, 2, "fake_score"))


@pytest.mark.slow
def test_a_spike_is_skipped_and_a_resumed_run_knows_the_norms_before_it(
    make_recipe: MakeRecipe, encoded: Path, tmp_path: Path
) -> None:
    spikes = ("guards.spike_factor=3", "guards.spike_window=6")
    calm = make_recipe("name=calm", "iterations=5", f"data.train={encoded}")
    distill(calm)
    train = planted(encoded, tmp_path / "bad", dict.fromkeys(samples_of(calm, 3), 300.0))
    settings = [f"data.train={train}", "iterations=5", "generator.ema_decay=0.9"]
    blind = make_recipe("name=blind", *settings)
    distill(blind)
    norms = [line["grad_norms"]["generator"] for line in lines_of(blind)]
    assert norms[3] > 3 * median(norms[:3])
    assert not any("skipped" in line for line in lines_of(blind))

    whole = make_recipe("name=whole", *settings, *spikes)
    distill(whole)
    lines = lines_of(whole)
    assert [bool(line.get("skipped")) for line in lines] == [False, False, False, True, False]
    (skipped,) = lines[3]["skipped"]
    assert (skipped["kind"], skipped["roles"]) == ("spike", ["generator", "fake_score"])
    assert skipped["norm"] == norms[3]
    assert lines[3]["grad_norms"] == {}
    again = make_recipe("name=again", *settings, *spikes, "checkpoint.every=3")
    with pytest.raises(Killed):
        distill(again, observer=_Killer(3))
    distill(again, resume=True)
    assert history(again) == history(whole)
    assert state(again, 5) == state(whole, 5)

    stops = make_recipe("name=stops", *settings, *spikes, "guards.max_skipped=0")
    with pytest.raises(AlarmError, match="a gradient norm of") as caught:
        distill(stops)
    assert samples_of(calm, 3)[0] in str(caught.value)
    assert any("step-000003" in note for note in caught.value.__notes__)


@pytest.mark.slow
def test_a_run_stops_when_its_budget_is_spent_and_goes_on_with_a_larger_one(
    make_recipe: MakeRecipe, encoded: Path, tmp_path: Path
) -> None:
    calm = make_recipe("name=calm", "iterations=4", f"data.train={encoded}")
    distill(calm)
    bad = {samples_of(calm, at)[0]: float("inf") for at in (1, 3)}
    settings = [f"data.train={planted(encoded, tmp_path / 'bad', bad)}", "checkpoint.every=0"]
    stops = make_recipe("name=stops", *settings, "guards.max_skipped=1")
    with pytest.raises(NonFiniteError, match=r"skipped in iterations 1 already") as caught:
        distill(stops)
    assert set(samples_of(calm, 3)) <= set(caught.value.found.replace(",", " ").split())
    assert any("step-000003" in note for note in caught.value.__notes__)
    assert len(lines_of(stops)) == 3
    more = make_recipe("name=stops", *settings, "guards.max_skipped=2")
    distill(more, resume=True)
    whole = make_recipe("name=whole", *settings)
    distill(whole)
    assert history(more) == history(whole)
    assert state(more, 5) == state(whole, 5)


@pytest.mark.slow
def test_weights_that_are_not_finite_stop_the_run_at_once(make_recipe: MakeRecipe) -> None:
    config = make_recipe(
        "generator.optimizer.lr=3.4e38",
        "generator.optimizer.weight_decay=1",
        "iterations=9",
        "checkpoint.every=0",
    )
    with pytest.raises(NonFiniteError, match=r"the weight .* of the generator .*not finite"):
        distill(config)
    assert len(lines_of(config)) == 1
    assert not list(RunFolder(config.run_folder).checkpoints.iterdir())
