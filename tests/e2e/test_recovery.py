"""A run whose processes are killed goes on by itself, to the bits of a calm run."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from safetensors.torch import load_file

from cluster.errors import WorkerDiedError
from cluster.ray import replacement
from pipelines.config.recipe import DistillConfig
from pipelines.distillation import run as runs
from pipelines.distillation.groups import Groups
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.run.observer import RunObserver
from pipelines.run.records import IterationRecord, RunEvent
from tests.e2e.conftest import MakeRecipe
from workers.generator_learner import GeneratorLearner

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

COMMON = ("iterations=7", "validation.every=2", "checkpoint.every=3", "checkpoint.keep_best=2")
MID_ITERATION_S = 0.02


class Killer(RunObserver):
    """Kills the process of a group after an iteration, or in the middle of the next one.

    Args:
        victims: Group by iteration; each is killed once.
        groups: Filled when the run has opened them.
    """

    def __init__(self, victims: dict[int, str], groups: list[Groups]) -> None:
        self.left = dict(victims)
        self._groups = groups

    def iteration(self, record: IterationRecord) -> None:
        victim = self.left.pop(record.iteration, None)
        if victim is None:
            return
        delay_s = MID_ITERATION_S if record.iteration % 2 else 0.0
        threading.Timer(delay_s, os.kill, (self.process(victim), signal.SIGKILL)).start()

    def process(self, name: str) -> int:
        (group,) = [group for group in self._groups[-1].all if group.name == name]
        return group.process_ids()[0]


class KillerAfterRepair(Killer):
    """Kills the teacher, too, once the first repair has ended, before the run goes on."""

    def event(self, event: RunEvent) -> None:
        if event.kind == "recovered" and not self.repaired:
            self.repaired = True
            process = psutil.Process(self.process("teacher"))
            process.kill()
            psutil.wait_procs([process], timeout=60)

    repaired = False


def distilled(
    config: DistillConfig, victims: dict[int, str], monkeypatch, kind: type[Killer] = Killer
) -> None:
    opened: list[Groups] = []
    original = runs.open_groups

    @contextmanager
    def open_groups(*arguments, **options) -> Iterator[Groups]:
        with original(*arguments, **options) as groups:
            opened.append(groups)
            yield groups

    monkeypatch.setattr(runs, "open_groups", open_groups)
    killer = kind(victims, opened)
    runs.distill(config, observer=killer)
    assert not killer.left


def state_of(config: DistillConfig) -> dict[str, dict]:
    """Everything that decides how the run would go on, and what it has used and found."""
    folder = RunFolder(config.run_folder)
    last = folder.checkpoints / f"step-{config.iterations:06d}"
    found = {
        str(path.relative_to(last)): load_file(path) for path in sorted(last.rglob("*.safetensors"))
    }
    metrics = read_jsonl(folder.metrics)
    kept = ("iteration", "losses", "grad_norms", "samples_seen", "cursor", "exit_steps")
    found["metrics"] = {line["iteration"]: [line[key] for key in kept] for line in metrics}
    found["validation"] = {
        line["iteration"]: line["figures"] for line in read_jsonl(folder.validation)
    }
    found["ledger"] = {
        path.name: path.read_text() for path in sorted(folder.ledger.glob("*.jsonl"))
    }
    return found


def assert_same(found: dict[str, dict], expected: dict[str, dict]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].keys() == values.keys(), name
        for key, value in values.items():
            same = found[name][key]
            assert same.equal(value) if hasattr(value, "equal") else same == value, (name, key)


@pytest.fixture(scope="module")
def calm(module_recipe: MakeRecipe) -> dict[str, dict]:
    config = module_recipe("name=calm", *COMMON)
    runs.distill(config)
    return state_of(config)


@pytest.mark.parametrize(
    ("topology", "victims"),
    [
        (
            ("topology.mode=pools", "recovery.snapshot_share=0.5"),
            ("teacher", "generator", "fake_score", "text", "feed", "validator"),
        ),
        # Text, feed and validator are on no pool; the case above loses them.
        (("topology.mode=map", "recovery.snapshot_share=0"), ("generator", "fake_score")),
    ],
    ids=["pools, copies in memory", "shared processes, checkpoints"],
)
def test_every_process_may_be_killed(
    calm, make_recipe, monkeypatch, topology, victims, capfd
) -> None:
    config = make_recipe("name=stormy", *COMMON, *topology, "recovery.backoff_s=0")
    distilled(config, dict(enumerate(victims)), monkeypatch)
    found, expected = state_of(config), dict(calm)
    # While two validations wait, a further one is left out; a slow repair makes several wait.
    judged, in_calm = found.pop("validation"), expected.pop("validation")
    assert judged.items() <= in_calm.items()
    assert config.iterations in judged
    assert_same(found, expected)
    events = read_jsonl(RunFolder(config.run_folder).events)
    died = [event for event in events if event["kind"] == "worker_died"]
    # A teacher or validator that is not needed again may be lost unnoticed.
    certain = {*victims} - {"teacher", "validator"}
    assert {event["role"] for event in died} >= certain
    recovered = [event for event in events if event["kind"] == "recovered"]
    assert len(recovered) == len(died) >= len(certain)
    assert all(event["lost_s"] > 0 for event in recovered)
    # A command's JSON is on standard output.
    assert "(raylet)" not in capfd.readouterr().out


def test_a_failure_right_after_a_repair_is_repaired_too_and_the_newest_state_is_taken(
    calm, make_recipe, monkeypatch
) -> None:
    # The first copy in memory is the only one: all checkpoints are newer.
    settings = ("topology.mode=pools", "recovery.snapshot_share=1.0e-9", "recovery.backoff_s=0")
    config = make_recipe("name=twice", *COMMON, *settings)
    distilled(config, {4: "fake_score"}, monkeypatch, KillerAfterRepair)
    found, expected = state_of(config), dict(calm)
    judged, in_calm = found.pop("validation"), expected.pop("validation")
    assert judged.items() <= in_calm.items()
    assert_same(found, expected)
    events = read_jsonl(RunFolder(config.run_folder).events)
    kinds = [event["kind"] for event in events]
    assert kinds == ["worker_died", "recovered", "worker_died", "recovered"]
    assert [event["role"] for event in events[::2]] == ["fake_score", "teacher"]
    assert all("(the newest checkpoint)" in event["action"] for event in events[1::2])


def test_a_failure_while_new_processes_are_built_is_repaired_too(
    calm, make_recipe, monkeypatch
) -> None:
    built, rebuild = [], replacement.rebuild

    def rebuild_and_lose(groups, processes, *arguments, **options) -> None:
        built.append({name for name, _ in processes})
        if len(built) == 1:
            # The processes of teacher and feed are there, and have no workers yet.
            (generator,) = [group for group in groups if group.name == "generator"]
            os.kill(generator.process_ids()[0], signal.SIGKILL)
            with pytest.raises(WorkerDiedError) as caught:
                generator.fetch(generator.call(GeneratorLearner.snapshot_bytes), 60.0, "waiting")
            raise caught.value
        rebuild(groups, processes, *arguments, **options)

    monkeypatch.setattr(replacement, "rebuild", rebuild_and_lose)
    config = make_recipe("name=within", *COMMON, "topology.mode=pools", "recovery.backoff_s=0")
    distilled(config, {2: "teacher"}, monkeypatch)
    assert built == [{"teacher"}, {"teacher", "generator"}]
    found, expected = state_of(config), dict(calm)
    judged, in_calm = found.pop("validation"), expected.pop("validation")
    assert judged.items() <= in_calm.items()
    assert_same(found, expected)


def test_a_spent_budget_ends_the_run_with_the_whole_story(make_recipe, monkeypatch) -> None:
    config = make_recipe(
        "name=spent", *COMMON, "topology.mode=pools", "recovery.failures_per_hour=1"
    )
    with pytest.raises(WorkerDiedError, match="fake_score") as caught:
        distilled(config, {0: "teacher", 1: "fake_score"}, monkeypatch)
    notes = "\n".join(caught.value.__notes__)
    assert "recovery.failures_per_hour is 1" in notes
    assert "teacher" in notes
    assert "--resume" in notes
    events = read_jsonl(RunFolder(config.run_folder).events)
    assert [event["kind"] for event in events][-1] == "gave_up"
