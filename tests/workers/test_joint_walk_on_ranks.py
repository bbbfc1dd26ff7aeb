"""One backward pass for both gradients of a fake score that two ranks share.

One group of two processes goes through everything once; the tests look at what it brought back.
Two walks on the same ranks make the same sums, hence the same bits. One rank's sums round
differently: 1e-5 of the largest entry.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sgmd_core.objectives.tsg_sim import TsgSimObjective
from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.ranks import on_ranks
from tests.helpers.roles import (
    Roles,
    gather,
    iterate,
    key_of,
    make_extra,
    negative_text,
    part_of,
    same_bits,
    text_batch,
    tiny_roles,
)
from tests.workers.test_sharding import (
    BF16_TOLERANCE,
    TOLERANCE,
    Weights,
    all_weights,
    whole_gradients,
)
from workers.network_settings import ComputeSettings, LoraSettings
from workers.sharding import is_sharded, num_ranks, own_rank

WALKS = ("joint", "apart")
BATCHES = ((0, 1), (2, 3))
FIRST_HALVES = ((0,), (2,))
UNEVEN = ((0, 1), (2,))
"""The second rank has no sample of the last micro-batch: it stands in with a weight of 0."""
AGAIN = ComputeSettings(checkpointing=True)
RUNS: dict[str, dict[str, Any]] = {
    "sgmd": {},
    "paper, offload": {"form": "paper", "compute": replace(AGAIN, checkpointing="offload")},
    "tsg_sim": {"objective": TsgSimObjective()},
    "bf16": {"compute": replace(AGAIN, precision="bf16")},
    "adapters": {"lora": LoraSettings(rank=4, alpha=8.0)},
    "ulysses": {"compute": replace(AGAIN, ulysses=2)},
}

pytestmark = pytest.mark.slow


class Gathered(TorchDispatchMode):
    """Counts the gatherings of weights by the entries that a rank sends."""

    def __init__(self) -> None:
        super().__init__()
        self.by_size: Counter[int] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.c10d._allgather_base_.default:
            self.by_size[args[1].numel()] += 1
        return func(*args, **(kwargs or {}))


def roles_of(run: dict[str, Any], walk: str = "joint") -> Roles:
    return tiny_roles(**{"compute": AGAIN, **run}, walk=walk)


def both_gradients(roles: Roles) -> Weights:
    return {
        f"{role}/{name}": value
        for role in ("generator", "fake_score")
        for name, value in whole_gradients(roles, role).items()
    }


def gathered(run: dict[str, Any], walk: str = "joint", batches=BATCHES) -> Weights:
    roles = roles_of(run, walk)
    gather(roles, 0, batches)
    return both_gradients(roles)


def gathered_unevenly(walk: str) -> Weights:
    """Gradients of a batch whose last micro-batch has one sample, whatever the ranks."""
    roles = roles_of({}, walk)
    for micro_batch, batch in enumerate(UNEVEN):
        own = batch[own_rank() :: num_ranks()]
        share = len(own) / 3
        query = roles.generator.rollout(key_of(0, micro_batch), text_batch(own or batch[:1]))
        prediction = roles.teacher.denoise(query, negative_text())
        roles.generator.learn(roles.fake_score.signal(query, prediction, share))
        roles.fake_score.track(query, share)
    return both_gradients(roles)


def trained(walk: str) -> Weights:
    """Weights after iterations with plain passes of the fake score, and updates, between walks."""
    roles = roles_of({}, walk)
    for iteration in range(2):
        make_extra(roles, iteration)
        roles.fake_score.end_extra()
        iterate(roles, iteration, BATCHES)
    return all_weights(roles)


def gatherings(walk: str) -> list[dict[int, int]]:
    """Gatherings of the fake score's weights in its stages of each of two micro-batches."""
    roles, found = roles_of({}, walk), []
    for micro_batch, batch in enumerate(BATCHES):
        query = roles.generator.rollout(key_of(0, micro_batch), text_batch(part_of(batch)))
        prediction = roles.teacher.denoise(query, negative_text())
        with Gathered() as counts:
            roles.fake_score.signal(query, prediction, 0.25)
            roles.fake_score.track(query, 0.25)
        found.append(dict(counts.by_size))
    return found


def on_two(_rank: int, _size: int) -> dict[str, Any]:
    brought: dict[str, Any] = {}
    for walk in WALKS:
        for name, run in RUNS.items():
            brought[f"{name} {walk}"] = gathered(run, walk)
        brought[f"uneven {walk}"] = gathered_unevenly(walk)
        brought[f"trained {walk}"] = trained(walk)
        brought[f"gatherings {walk}"] = gatherings(walk)
    fake_score = roles_of({}).networks["fake_score"]
    parts = {
        name: sum(value.to_local().numel() for value in part.parameters())
        for name, part in (("layer", fake_score.blocks[0]), ("whole", fake_score))
    }
    return brought | {"sharded": is_sharded(fake_score), "parts": parts}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, on_two, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [*RUNS, "uneven", "trained"])
def test_one_walk_has_the_bits_of_two(ranks, name):
    for rank in ranks:
        assert rank["sharded"]
        assert rank[f"{name} joint"]
        assert same_bits(rank[f"{name} joint"], rank[f"{name} apart"])


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_gather_the_gradients_of_one(ranks, name):
    run = dict(RUNS[name])
    if name == "ulysses":
        run["compute"] = AGAIN
    tolerance = BF16_TOLERANCE if name == "bf16" else TOLERANCE
    alone = gathered(run)
    # The samples of the second rank, or, where both work on all, a sample of each micro-batch.
    assert_moves(alone, gathered(run, batches=FIRST_HALVES), tolerance)
    assert relative_error(ranks[0][f"{name} joint"], alone) < tolerance


def test_a_rank_without_a_sample_adds_nothing(ranks):
    alone = gathered_unevenly("joint")
    assert_moves(alone, gathered({}), TOLERANCE)
    assert relative_error(ranks[0]["uneven joint"], alone) < TOLERANCE


def test_updates_between_walks_make_the_weights_of_one_rank(ranks):
    alone = trained("joint")
    assert_moves(alone, all_weights(roles_of({})), TOLERANCE)
    assert relative_error(ranks[0]["trained joint"], alone) < TOLERANCE


def test_each_layer_is_gathered_once_less_in_a_micro_batch(ranks):
    parts = ranks[0]["parts"]
    layer, outside = parts["layer"], parts["whole"] - 2 * parts["layer"]
    joint, apart = (ranks[0][f"gatherings {walk}"] for walk in WALKS)
    # Two layers, forward and back; what lies outside of layers stays from one to the other.
    assert joint == 2 * [{layer: 2 * 2, outside: 1}]
    assert apart == 2 * [{layer: 2 * 3, outside: 2}]
