"""The decisions of a guard: limits, budget, and the same ones after a resume."""

from typing import Any

import pytest
import torch
from torch import nn

from cluster.local import LocalWorkerGroup
from cluster.schedule.schedule import REPORT, STEP, Call
from pipelines.config.guards import GuardSettings
from pipelines.config.roles import FAKE_SCORE, GENERATOR, TEACHER
from pipelines.distillation.guards import UpdateGuard
from sgmd_core.errors import AlarmError, NonFiniteError
from sgmd_core.types import MicroBatchKey
from workers.finite import Diagnosis, FiniteChecks
from workers.reports import GradientReport

NAN = float("nan")


class _Role:
    """The part of a role that a guard asks."""

    def __init__(self) -> None:
        self.network = nn.Linear(2, 2)
        self.checks = FiniteChecks(raises=False)

    def diagnose(self, iteration: int) -> Diagnosis:
        return self.checks.diagnose(iteration, self.network)


class _Run:
    """Iterations of one update of both roles, as a run makes them."""

    def __init__(self, lines: tuple[dict[str, Any], ...] = (), ranks: int = 1, **settings: Any):
        self.roles = {
            role: [_Role() for _ in range(ranks)] for role in (GENERATOR, TEACHER, FAKE_SCORE)
        }
        groups = {role: LocalWorkerGroup(role, own) for role, own in self.roles.items()}
        self.guard = UpdateGuard(GuardSettings(**settings), groups, 1.0, lines)
        self.lines = list(lines)

    def iterate(self, generator: float = 1.0, fake_score: float = 1.0) -> list[str]:
        """Roles that skip; writes the line of metrics.jsonl."""
        iteration, norms = len(self.lines), {GENERATOR: generator, FAKE_SCORE: fake_score}
        skipping: list[str] = []
        for stage in (REPORT, STEP):
            calls = {role: Call(iteration, 1, role, 0, stage, None, (0, 0)) for role in norms}
            if stage == REPORT:
                for role, norm in norms.items():
                    report = GradientReport(norm, norm == norm and abs(norm) != float("inf"))
                    self.guard.inspect(calls[role], report, ("a", "b"))
            else:
                skipping = [role for role, call in calls.items() if self.guard.skips(call)]
        skipped = self.guard.skipped_in(iteration)
        made = {role: norm for role, norm in norms.items() if role not in skipping}
        self.guard.finished(iteration, made, skipped)
        line = {"iteration": iteration, "grad_norms": made}
        self.lines.append(
            line | ({"skipped": [one.to_json() for one in skipped]} if skipped else {})
        )
        return skipping


BOTH = [GENERATOR, FAKE_SCORE]


@pytest.mark.parametrize("role", BOTH)
def test_a_bad_gradient_of_one_role_skips_the_update_of_both(role: str) -> None:
    run = _Run()
    assert run.iterate() == []
    assert run.iterate(**{role: NAN}) == BOTH
    (skipped,) = run.lines[1]["skipped"]
    assert skipped["roles"] == tuple(BOTH)
    # The keys of metrics.jsonl, which older runs have as well.
    assert set(skipped) == {"phase", "roles", "kind", "reason", "norm", "sample_ids"}
    assert run.iterate() == []


def test_a_spike_is_measured_by_the_median_of_the_updates_that_were_made() -> None:
    run = _Run(spike_factor=10.0, spike_window=4, max_skipped=9)
    assert run.iterate(50.0) == []  # one norm is known: too few
    assert run.iterate(1.0) == []
    assert run.iterate(2.0) == []
    assert run.iterate(19.9) == []  # median 2
    assert run.iterate(200.0) == BOTH  # median of 50, 1, 2, 19.9: 10.95
    assert run.iterate(109.4) == []
    # The skipped one is not among the last four: 1, 2, 19.9, 109.4.
    assert run.iterate(109.6) == BOTH
    assert run.iterate(1.0, 10.1) == BOTH
    assert run.iterate(1.0, 9.9) == []
    assert not any(_Run(max_skipped=9).iterate(norm) for norm in (1.0, 1.0, 1e30))


def test_a_guard_that_is_resumed_anywhere_decides_as_one_that_was_not() -> None:
    settings = {"spike_factor": 4.0, "spike_window": 6, "max_skipped": 9, "window": 12}
    stream = torch.Generator().manual_seed(3)
    norms = (torch.rand(60, 2, generator=stream, dtype=torch.float64) ** -0.7).tolist()
    norms[20][0], norms[41][1] = NAN, float("inf")
    whole = _Run(**settings)
    decided = [bool(whole.iterate(*pair)) for pair in norms]
    assert 3 < sum(decided) < 30
    for at in range(0, 60, 7):
        resumed = _Run(tuple(whole.lines[:at]), **settings)
        assert [bool(resumed.iterate(*pair)) for pair in norms[at:]] == decided[at:]


def test_the_budget_counts_iterations_of_its_window() -> None:
    run = _Run(max_skipped=2, window=5)
    for norm in (NAN, 1.0, NAN, 1.0, 1.0):
        run.iterate(norm)
    assert run.iterate(fake_score=NAN) == BOTH  # iteration 5: the skip of iteration 0 is too old
    with pytest.raises(NonFiniteError, match=r"iterations 2, 5 already.*max_skipped is 2 of 5"):
        run.iterate(NAN)
    again = _Run(tuple(run.lines), max_skipped=2, window=5)
    with pytest.raises(NonFiniteError, match="iterations 2, 5 already"):
        again.iterate(NAN)
    assert _Run(tuple(run.lines), max_skipped=3, window=5).iterate(NAN) == BOTH


def test_a_budget_of_nothing_raises_at_the_first_bad_gradient_and_names_the_samples() -> None:
    with pytest.raises(NonFiniteError, match="samples of its batch: a, b"):
        _Run(max_skipped=0).iterate(NAN)
    spiky = _Run(max_skipped=0, spike_factor=2.0, spike_window=2)
    spiky.iterate()
    with pytest.raises(AlarmError, match=r"a gradient norm of 3.*samples of its batch: a, b"):
        spiky.iterate(3.0)


def test_the_cause_is_the_first_fault_of_the_earliest_role_on_any_rank() -> None:
    run = _Run(ranks=2)
    broken, fine = torch.full((2,), NAN), torch.ones(2)
    faults = ((FAKE_SCORE, 0, 1, 2), (TEACHER, 1, 1, 1), (GENERATOR, 1, 2, 0), (GENERATOR, 0, 1, 4))
    for role, rank, micro_batch, before in faults:
        checks = run.roles[role][rank].checks
        key = MicroBatchKey(0, micro_batch)
        value = checks.checked(
            fine, key, f"working on the {role}", {"it": broken}, "look", stages_before=before
        )
        assert value.isnan().all()
        assert checks.checked(fine, key, "working", {"it": fine}, "look").equal(fine)
    run.iterate(NAN)
    assert "working on the teacher" in run.lines[0]["skipped"][0]["reason"]


@pytest.mark.parametrize("role", [GENERATOR, TEACHER, FAKE_SCORE])
def test_a_weight_that_is_not_finite_ends_the_run_whatever_the_budget(role: str) -> None:
    run = _Run(ranks=2, max_skipped=9)
    with torch.no_grad():
        run.roles[role][1].network.weight[0, 1] = float("inf")
    with pytest.raises(
        NonFiniteError, match=rf"weight weight of the {role.replace('_', ' ')} \(rank 1\)"
    ):
        run.iterate(NAN)
    assert not run.guard.weights_are_finite


def test_a_role_that_has_stepped_keeps_its_update_and_one_that_has_not_skips() -> None:
    """With a staleness the roles are asked, and step, one after the other."""
    for first, second, expected in ((1.0, NAN, [FAKE_SCORE]), (NAN, 1.0, BOTH)):
        guard = _Run().guard
        for role, norm in ((GENERATOR, first), (FAKE_SCORE, second)):
            gather, step = (Call(0, 1, role, 0, stage, None, (0, 0)) for stage in (REPORT, STEP))
            guard.inspect(gather, GradientReport(norm, norm == norm), ())
            guard.skips(step)
        (skipped,) = guard.skipped_in(0)
        assert list(skipped.roles) == expected
