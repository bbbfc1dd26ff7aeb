"""Tokens of a sample over two ranks = one rank: velocities, the input VJP, gradients, updates.

One group of two processes goes through everything once; the tests look at what it brought back.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from pipelines.config.roles import FAKE_SCORE, ROLES
from pipelines.planning.traffic import exchanged_bytes
from pipelines.planning.workload import Workload
from sgmd_core.buckets import LatentBuckets
from sgmd_core.objectives.sid import SidObjective
from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.ranks import on_ranks
from tests.helpers.roles import SEED, iterate, same_bits, tiny_roles
from tests.helpers.tiny_wan import LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, tiny_velocity
from tests.workers.test_sharding import BF16_TOLERANCE, all_weights
from workers.compute import prepare_network
from workers.models.experts import ExpertDenoiser
from workers.models.family import Denoiser
from workers.models.wan_arithmetic import WanShape
from workers.moment_codes import MomentCodes, decode_moments
from workers.network_settings import ComputeSettings, LoraSettings
from workers.sharding import full_tensor, shard

TOLERANCE = 1e-5
SPLIT = ComputeSettings(ulysses=2)
BATCHES = ((0, 1), (2, 3))

pytestmark = pytest.mark.slow

# The first iteration draws the second size, the next one the first.
SIZES = LatentBuckets((LATENT_SHAPE, (LATENT_SHAPE[0], 2, 4, 8)), (0.78, 0.22))
RUNS: dict[str, dict[str, Any]] = {
    "shared": {"tracking": "shared"},
    "through the teacher": {"tracking": "fresh", "objective": SidObjective(fake_updates=1)},
    "two sizes": {"tracking": "shared", "latent_shape": SIZES},
    "fresh, adapters": {"tracking": "fresh", "lora": LoraSettings(rank=4, alpha=8.0)},
}


UPDATE_TOLERANCE = 5e-5
"""Adam's first update moves an entry by its rate, be its gradient nothing but rounding."""


def after(run: dict[str, Any], iterations: int = 2) -> dict[str, Tensor]:
    """Weights of both learners and of the average after some iterations of two micro-batches."""
    roles = tiny_roles(**run)
    for iteration in range(iterations):
        iterate(roles, iteration, BATCHES)
    return all_weights(roles)


def experts_vjp(compute: ComputeSettings) -> dict[str, Tensor]:
    """Velocity and gradients of two experts, a sample for each."""
    network = prepare_network(ExpertDenoiser(tiny_velocity(1), tiny_velocity(2), 0.5), compute)
    shard(network, network.blocks)
    return walked(network)


def vjp(compute: ComputeSettings, *, alone: bool = False) -> dict[str, Tensor]:
    """What `walked` brings of a network, or of one whose ranks leave out the exchange."""
    network = prepare_network(tiny_velocity(2), compute)
    if alone:
        # As if every rank attended to its own tokens only.
        for processor in network.transformer.attn_processors.values():
            processor._parallel_config = None
    shard(network, network.blocks)
    return walked(network)


def walked(network: Denoiser) -> dict[str, Tensor]:
    """Velocity, gradient at the input and at the parameters, of one graph walked twice."""
    stream = torch.Generator().manual_seed(5)
    x_t = torch.randn(2, *LATENT_SHAPE, generator=stream).requires_grad_()
    text = torch.randn(2, TEXT_LENGTH, TEXT_DIM, generator=stream)
    velocity = network(x_t, torch.tensor([0.3, 0.8]), text)
    cotangent = torch.randn(velocity.shape, generator=stream)
    (at_input,) = torch.autograd.grad(velocity, x_t, cotangent, retain_graph=True)
    velocity.backward(cotangent)
    found = {"velocity": velocity.detach(), "input": at_input}
    for name, value in network.named_parameters():
        assert value.grad is not None
        found[name] = full_tensor(value.grad).clone()
    return found


def exchanged(compute: ComputeSettings) -> dict[str, int]:
    """Bytes of the tensors that this rank exchanges with the other one, by way."""
    network = prepare_network(tiny_velocity(2), compute)
    shard(network, network.blocks)
    own, sizes = funcol.all_to_all_single, []

    def counted(value: Tensor, *arguments: Any) -> Tensor:
        sizes.append(value.numel() * value.element_size())
        return own(value, *arguments)

    funcol.all_to_all_single = counted
    try:
        x_t = torch.randn(1, *LATENT_SHAPE).requires_grad_()
        velocity = network(x_t, torch.tensor([0.3]), torch.randn(1, TEXT_LENGTH, TEXT_DIM))
        found = {"forward": sum(sizes)}
        torch.autograd.grad(velocity.sum(), x_t)
        return found | {"to_input": sum(sizes) - found["forward"]}
    finally:
        funcol.all_to_all_single = own


def in_8_bits(folder: str) -> dict[str, Any]:
    """Moments in 8 bits of two ranks, saved, taken up again, and gone on with."""
    run = {"moment_bits": 8, "compute": SPLIT}
    roles = tiny_roles(**run)
    iterate(roles, 0, BATCHES)
    roles.generator.save(folder)
    roles.fake_score.save(folder)
    dist.barrier()
    resumed = tiny_roles(**run)
    resumed.generator.load(folder)
    resumed.fake_score.load(folder)
    for each in (roles, resumed):
        iterate(each, 1, BATCHES)
    return {"whole": all_weights(roles), "resumed": all_weights(resumed)}


def on_ranks_together(rank: int, size: int, folder: str) -> dict[str, Any]:
    """Everything that takes several ranks; of four, two and two work together."""
    if size == 4:
        return {"shared": after(RUNS["shared"] | {"compute": SPLIT}, iterations=1)}
    brought: dict[str, Any] = {
        "vjp": vjp(SPLIT),
        "checkpointed": vjp(ComputeSettings(ulysses=2, checkpointing=True)),
        "offloaded": vjp(ComputeSettings(ulysses=2, checkpointing="offload")),
        "alone": vjp(SPLIT, alone=True),
        "bf16": vjp(ComputeSettings("bf16", ulysses=2)),
        "experts": experts_vjp(SPLIT),
        "exchanged": {
            (precision, again): exchanged(ComputeSettings(precision, again, ulysses=2))
            for precision in ("fp32", "bf16")
            for again in (False, True)
        },
    }
    brought["8 bits"] = in_8_bits(folder)
    return brought | {name: after(run | {"compute": SPLIT}) for name, run in RUNS.items()}


@pytest.fixture(scope="module")
def brought(tmp_path_factory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("saved"))
    found = on_ranks(2, on_ranks_together, tmp_path_factory.mktemp("ranks"), folder)
    return [one | {"folder": folder} for one in found]


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return vjp(ComputeSettings())


def test_a_rank_that_attends_to_its_own_tokens_alone_would_be_noticed(brought, plain):
    assert_moves(plain, brought[0]["alone"], TOLERANCE)


@pytest.mark.parametrize("way", ["vjp", "checkpointed", "offloaded"])
@pytest.mark.parametrize("rank", [0, 1])
def test_velocities_and_both_gradients_are_those_of_one_rank(brought, plain, way, rank):
    for name, value in plain.items():
        found = {name: brought[rank][way][name]}
        assert relative_error(found, {name: value}) < TOLERANCE, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("again", [False, True])
def test_a_plan_counts_the_bytes_that_are_exchanged(brought, precision, again):
    shape = WanShape.from_config(tiny_velocity(2).transformer.config)
    work = Workload(
        shape,
        LATENT_SHAPE,
        TEXT_LENGTH,
        1,
        bf16=frozenset(ROLES if precision == "bf16" else ()),
        checkpointing=frozenset(ROLES if again else ()),
        ulysses=((FAKE_SCORE, 2),),
    )
    found = brought[0]["exchanged"][precision, again]
    planned = exchanged_bytes(work)[FAKE_SCORE, "signal"]
    assert found["forward"] + found["to_input"] == planned
    assert found["to_input"] == (2 if again else 1) * found["forward"]


def test_products_in_bfloat16_are_split_up_to_their_rounding(brought):
    plain = vjp(ComputeSettings("bf16"))
    for rank in (0, 1):
        assert relative_error(brought[rank]["bf16"], plain) < BF16_TOLERANCE


def test_samples_of_both_experts_are_split_alike(brought):
    plain = experts_vjp(ComputeSettings())
    assert min(float(value.abs().max()) for value in plain.values()) > 0
    for rank in (0, 1):
        assert relative_error(brought[rank]["experts"], plain) < TOLERANCE


@pytest.mark.parametrize("name", RUNS)
def test_iterations_of_ranks_together_end_where_those_of_one_rank_do(brought, name):
    plain = after(RUNS[name])
    assert_moves(plain, after(RUNS[name], iterations=1), UPDATE_TOLERANCE)
    assert relative_error(brought[0][name], plain) < UPDATE_TOLERANCE


def test_moments_in_8_bits_go_on_bitwise_on_two_ranks_and_are_read_by_one(brought):
    found = brought[0]["8 bits"]
    assert same_bits(found["resumed"], found["whole"])
    one = tiny_roles(moment_bits=8)
    one.generator.load(brought[0]["folder"])
    plain = tiny_roles(moment_bits=8)
    iterate(plain, 0, BATCHES)
    moments = [roles.generator.snapshot().moments for roles in (one, plain)]
    coded = [name for name in moments[0] if name.startswith("exp_avg_sq_codes/")]
    assert len(coded) > 20
    for name in coded:
        decoded = [
            decode_moments(MomentCodes(kept[name], kept[name.replace("codes", "bases")]))
            for kept in moments
        ]
        # Both are rounded at random, by a step of the grid at most.
        assert (decoded[0] <= 1.2 * decoded[1] + 1e-12).all(), name
        assert (decoded[1] <= 1.2 * decoded[0] + 1e-12).all(), name


def test_iterations_of_two_sizes_are_other_iterations():
    shapes = [SIZES.shape_at(SEED, iteration) for iteration in (0, 1)]
    assert shapes == [SIZES.shapes[1], SIZES.shapes[0]]
    assert_moves(after(RUNS["shared"]), after(RUNS["two sizes"]), UPDATE_TOLERANCE)


def test_two_parties_of_two_ranks_share_a_batch_out(tmp_path):
    found = on_ranks(4, on_ranks_together, tmp_path, str(tmp_path))
    plain = after(RUNS["shared"], iterations=1)
    assert_moves(plain, after(RUNS["shared"], iterations=0), UPDATE_TOLERANCE)
    assert relative_error(found[0]["shared"], plain) < UPDATE_TOLERANCE
