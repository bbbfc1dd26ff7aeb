"""Two ranks = one: gradients, updates, averages and checkpoints of sharded roles; nothing leaks.

One group of two processes goes through everything once; the tests look at what it brought back.
Sums over two halves round differently from one sum, hence a tolerance: 1e-5 of the largest entry.
"""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sgmd_core.types import MicroBatchKey, Purpose
from tests.helpers.ranks import on_ranks
from tests.helpers.roles import (
    Roles,
    iterate,
    negative_text,
    relative_error,
    same_bits,
    text_batch,
    tiny_roles,
)
from workers.role_state import load_role
from workers.settings import ComputeSettings
from workers.sharding import is_sharded

NUM_ITERATIONS = 3
BATCHES = ((0, 1), (2, 3))
TOLERANCE = 1e-5
TRACKING = ("shared", "fresh")

pytestmark = pytest.mark.slow


def iterate_in_parts(roles: Roles, iteration: int, rank: int, size: int) -> None:
    """`iterate` of the helpers, of which this rank does its part of every micro-batch."""
    share = 1 / (len(BATCHES) * size)
    learn_in_parts(roles, iteration, rank, size, share)
    roles.generator.gradient_report(iteration)
    if roles.shared_tracking:
        roles.fake_score.gradient_report(iteration)
    roles.generator.step(iteration)
    if not roles.shared_tracking:
        for index, batch in enumerate(BATCHES):
            key = MicroBatchKey(iteration, index, Purpose.TRACK)
            text = text_batch(part_of(batch, rank, size), iteration + 500)
            roles.fake_score.track(roles.generator.sample(key, text), share)
        roles.fake_score.gradient_report(iteration)
    roles.fake_score.step(iteration)


def learn_in_parts(
    roles: Roles, iteration: int, rank: int, size: int, share: float, signal_factor: float = 1.0
) -> None:
    for index, batch in enumerate(BATCHES):
        key = MicroBatchKey(iteration, index)
        text = text_batch(part_of(batch, rank, size), iteration)
        query = roles.generator.rollout(key, text)
        prediction = roles.teacher.denoise(query, negative_text())
        signal = roles.fake_score.signal(query, prediction, share * signal_factor)
        roles.generator.learn(signal)
        if roles.shared_tracking:
            roles.fake_score.track(query, share)


def part_of(batch: tuple[int, ...], rank: int, size: int) -> tuple[int, ...]:
    width = len(batch) // size
    return batch[rank * width : (rank + 1) * width]


def on_two(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Everything that takes two ranks."""
    brought: dict[str, Any] = {}
    for tracking in TRACKING:
        roles = tiny_roles(tracking)
        brought["sharded"] = all(
            is_sharded(roles.networks[role]) for role in ("generator", "fake_score")
        )
        for iteration in range(NUM_ITERATIONS):
            iterate_in_parts(roles, iteration, rank, size)
        brought[f"final {tracking}"] = roles.generator.final_weights()
        roles.generator.save(str(folder / tracking))
        roles.fake_score.save(str(folder / tracking))
        brought[f"resumed {tracking}"] = resumed_weights(folder / tracking, tracking, rank, size)
        iterate_in_parts(roles, NUM_ITERATIONS, rank, size)
        brought[f"uninterrupted {tracking}"] = roles.generator.final_weights()
    brought["from one rank"] = resumed_weights(folder / "one", "shared", rank, size)
    for name, factor in (("once", 1.0), ("thousandfold", 1000.0)):
        roles = tiny_roles("shared")
        learn_in_parts(roles, 0, rank, size, 0.25, factor)
        brought[f"tracking gradient, signal {name}"] = whole_gradients(roles, "fake_score")
        brought[f"generator gradient, signal {name}"] = whole_gradients(roles, "generator")
    if rank:
        # The first rank alone reads and writes; here there is nothing to be read.
        roles.generator.export("nowhere", "nowhere", 5.0, checkpoint="nowhere")
    roles = tiny_roles("shared", compute=ComputeSettings(checkpointing=True))
    learn_in_parts(roles, 0, rank, size, 0.25)
    for role in ("generator", "fake_score"):
        brought[f"checkpointed {role}"] = whole_gradients(roles, role)
    return brought


def resumed_weights(folder: Path, tracking: str, rank: int, size: int) -> dict[str, Tensor]:
    """Averaged weights one iteration after a resume."""
    roles = tiny_roles(tracking)
    roles.generator.load(str(folder))
    roles.fake_score.load(str(folder))
    iterate_in_parts(roles, NUM_ITERATIONS, rank, size)
    return roles.generator.final_weights()


def whole_gradients(roles: Roles, role: str) -> dict[str, Tensor]:
    return {
        name: value.grad.full_tensor()
        for name, value in roles.networks[role].named_parameters()
        if value.grad is not None
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """The same iterations on one rank."""
    found: dict[str, dict[str, Tensor]] = {}
    for tracking in TRACKING:
        roles = tiny_roles(tracking)
        for iteration in range(NUM_ITERATIONS):
            iterate(roles, iteration, BATCHES)
        found[tracking] = roles.generator.final_weights()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints: `one` from one rank, the others from two."""
    folder = tmp_path_factory.mktemp("checkpoints")
    roles = tiny_roles("shared")
    for iteration in range(NUM_ITERATIONS):
        iterate(roles, iteration, BATCHES)
    roles.generator.save(str(folder / "one"))
    roles.fake_score.save(str(folder / "one"))
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, on_two, tmp_path_factory.mktemp("ranks"), folder)


def test_the_networks_are_really_sharded(ranks):
    assert all(rank["sharded"] for rank in ranks)


@pytest.mark.parametrize("tracking", TRACKING)
def test_two_ranks_make_the_weights_of_one(ranks, alone, tracking):
    assert relative_error(ranks[0][f"final {tracking}"], alone[tracking]) < TOLERANCE
    assert ranks[1][f"final {tracking}"] == {}


@pytest.mark.parametrize("tracking", TRACKING)
def test_two_resumed_ranks_go_on_bitwise(ranks, tracking):
    resumed, uninterrupted = (
        ranks[0][f"{what} {tracking}"] for what in ("resumed", "uninterrupted")
    )
    assert same_bits(resumed, uninterrupted)


def test_a_checkpoint_of_one_rank_goes_on_with_two(ranks):
    assert relative_error(ranks[0]["from one rank"], ranks[0]["uninterrupted shared"]) < TOLERANCE


@pytest.mark.usefixtures("ranks")
def test_a_checkpoint_of_two_ranks_is_one_of_one_rank(folder, alone):
    saved = load_role(str(folder / "shared"), "generator")
    expected = load_role(str(folder / "one"), "generator")
    assert saved.updates == expected.updates
    assert relative_error(dict(saved.weights), dict(expected.weights)) < TOLERANCE
    assert saved.moments.keys() == expected.moments.keys()
    roles = tiny_roles("shared")
    roles.generator.load(str(folder / "shared"))
    assert relative_error(roles.generator.final_weights(), alone["shared"]) < TOLERANCE


def test_the_generators_loss_leaves_nothing_in_a_sharded_fake_score(ranks):
    # Two micro-batches, so that gradients gather; a leak would grow with the signal.
    once, thousandfold = (
        ranks[0][f"tracking gradient, signal {name}"] for name in ("once", "thousandfold")
    )
    assert once
    assert same_bits(once, thousandfold)
    told, shouted = (
        ranks[0][f"generator gradient, signal {name}"] for name in ("once", "thousandfold")
    )
    largest = max(float(value.abs().max()) for value in told.values())
    assert max(float(value.abs().max()) for value in shouted.values()) > 100 * largest


def test_the_gradient_is_that_of_the_whole_batch(ranks):
    roles = tiny_roles("shared")
    learn_in_parts(roles, 0, 0, 1, 0.5)
    found = ranks[0]["tracking gradient, signal once"]
    expected = {
        name: value.grad
        for name, value in roles.networks["fake_score"].named_parameters()
        if value.grad is not None
    }
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("role", "whose"), [("fake_score", "tracking"), ("generator", "generator")]
)
def test_sharded_layers_can_be_computed_again_instead_of_kept(ranks, role, whose):
    plain = ranks[0][f"{whose} gradient, signal once"]
    assert same_bits(ranks[0][f"checkpointed {role}"], plain)
