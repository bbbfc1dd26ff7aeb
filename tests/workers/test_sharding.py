"""Two ranks = one: gradients, updates, averages and checkpoints of sharded roles; nothing leaks.

One group of two processes goes through everything once; the tests look at what it brought back.
Sums over two halves round differently from one sum, hence a tolerance: 1e-5 of the largest entry.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sgmd_core.objectives.dmd import DmdObjective
from sgmd_core.objectives.dmd2 import Dmd2Objective
from sgmd_core.objectives.sid import SidObjective
from sgmd_core.types import Purpose
from tests.helpers.moves import assert_every_tensor_moves, assert_moves, relative_error
from tests.helpers.ranks import on_ranks
from tests.helpers.roles import (
    Roles,
    gather,
    held_loss,
    iterate,
    key_of,
    make_extra,
    mix_weights,
    negative_text,
    part_of,
    same_bits,
    text_batch,
    tiny_roles,
)
from tests.helpers.tiny_wan import tiny_velocity
from workers.compute import prepare_network
from workers.models.exporting import narrowed
from workers.models.wan_family import WanFamily
from workers.network_settings import ComputeSettings, LoraSettings
from workers.role_state import load_role
from workers.score_teacher import ScoreTeacher
from workers.settings import DiversitySettings, TeacherSettings
from workers.sharding import full_tensor, is_sharded, parameters_of, shard
from workers.snapshots import RoleSnapshot

NUM_ITERATIONS = 2
BATCHES = ((0, 1), (2, 3))
FIRST_HALVES = ((0,), (2,))
TOLERANCE = 1e-5
RUNS: dict[str, dict[str, Any]] = {
    "shared": {"tracking": "shared"},
    "dmd2, mixed": {
        "tracking": "fresh",
        "objective": Dmd2Objective(fake_updates=2),
        "ida_decay": 0.5,
    },
    "sid, diverse, offloaded, momentum": {
        "tracking": "fresh",
        "objective": SidObjective(fake_updates=1),
        "diversity": DiversitySettings(weight=1.0, teacher_steps=4, anchor_step=2),
        "betas": (0.5, 0.999),
        "offloaded": True,
    },
    "fresh, adapters": {"tracking": "fresh", "lora": LoraSettings(rank=4, alpha=8.0)},
}
EXTRAS = {"ida_decay": 1.0, "diversity": DiversitySettings(), "betas": (0.0, 0.999)}
"""What some of these runs have more than others, left out."""
MEASURED = ("sid, diverse, offloaded, momentum", "fresh, adapters")
FIRST_UPDATE_TOLERANCE = 5e-5
"""Adam's first update moves an entry by its rate, be its gradient nothing but rounding."""
BF16 = ComputeSettings(precision="bf16")
BF16_TOLERANCE = 2e-2
"""Of the largest entry: norms and modulation are gathered in bfloat16 as well."""
CHECKPOINTING = (True, "selective", "offload")
Weights = dict[str, Tensor]

pytestmark = pytest.mark.slow


def whole_weights(network: nn.Module) -> Weights:
    return {
        name: full_tensor(value.detach()).clone() for name, value in parameters_of(network).items()
    }


def all_weights(roles: Roles) -> Weights:
    """Those of both learners and of the average."""
    found = {f"average/{name}": value for name, value in roles.generator.final_weights().items()}
    for role in ("generator", "fake_score"):
        own = whole_weights(roles.networks[role])
        found |= {f"{role}/{name}": value for name, value in own.items()}
    return found


def own_parts(roles: Roles) -> Weights:
    """This rank's rows of the weights of both learners."""
    return {
        f"{role}/{name}": value.detach().to_local().clone()
        for role in ("generator", "fake_score")
        for name, value in parameters_of(roles.networks[role]).items()
    }


def brought_weights(roles: Roles) -> dict[str, Weights]:
    """All weights; what the test can put together is not gathered."""
    return {"average": roles.generator.final_weights(), "parts": own_parts(roles)}


def own_state(generator: RoleSnapshot, fake_score: RoleSnapshot) -> Weights:
    """This rank's rows of weights, moments and average of both learners: nothing is gathered."""
    return {
        f"{role}/{kind}/{name}": value
        for role, snapshot in (("generator", generator), ("fake_score", fake_score))
        for kind in ("weights", "moments", "average")
        for name, value in getattr(snapshot, kind).items()
    }


def state_of(roles: Roles) -> Weights:
    return own_state(roles.generator.snapshot(), roles.fake_score.snapshot())


def weights_in(state: Weights) -> Weights:
    """What `own_state` has of weights and average; a rank may have no row of a small one."""
    return {
        name: value for name, value in state.items() if "/moments/" not in name and value.numel()
    }


def put_together(ranks: list[dict[str, Any]]) -> None:
    """Makes `all_weights` of what ranks have brought, on each."""
    for name, first in ranks[0].items():
        if isinstance(first, dict) and first.keys() == {"average", "parts"}:
            parts = [rank[name]["parts"] for rank in ranks]
            whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            for rank in ranks:
                average = rank[name]["average"].items()
                rank[name] = {f"average/{key}": value for key, value in average} | whole


def weights_after(run: dict[str, Any], batches: tuple[tuple[int, ...], ...] = BATCHES) -> Weights:
    roles = tiny_roles(**run)
    for iteration in range(NUM_ITERATIONS):
        iterate(roles, iteration, batches)
    return all_weights(roles)


def measured(run: dict[str, Any]) -> dict[str, Any]:
    """A run with extra updates of the fake score, which are taken back, before each iteration."""
    roles, losses = tiny_roles(**run), list[float]()
    for iteration in range(NUM_ITERATIONS):
        losses += [held_loss(roles, iteration), make_extra(roles, iteration)]
        roles.fake_score.end_extra()
        iterate(roles, iteration, BATCHES)
    return {"weights": all_weights(roles), "losses": losses}


def on_two(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Everything that takes two ranks."""
    brought: dict[str, Any] = {}
    for name, run in RUNS.items():
        roles = tiny_roles(**run)
        brought["sharded"] = all(
            is_sharded(roles.networks[role]) for role in ("generator", "fake_score")
        )
        for iteration in range(NUM_ITERATIONS):
            iterate(roles, iteration, BATCHES)
        brought[f"final {name}"] = brought_weights(roles)
        roles.generator.save(str(folder / name))
        roles.fake_score.save(str(folder / name))
        # The first rank writes; in a run the controller waits for it.
        dist.barrier()
        brought[f"resumed {name}"] = resumed_state(folder / name, run)
        snapshots = roles.generator.snapshot(), roles.fake_score.snapshot()
        brought[f"snapshot bytes {name}"] = sum(part.num_bytes for part in snapshots)
        brought[f"before {name}"] = own_state(*snapshots)
        iterate(roles, NUM_ITERATIONS, BATCHES)
        brought[f"uninterrupted {name}"] = state_of(roles)
        # A survivor stands in the middle of an iteration; a process that replaces another is new.
        gather(roles, NUM_ITERATIONS + 1, BATCHES[:1])
        for what, restored in (("survivor", roles), ("replaced", tiny_roles(**run))):
            restored.generator.restore(snapshots[0])
            restored.fake_score.restore(snapshots[1])
            iterate(restored, NUM_ITERATIONS, BATCHES)
            brought[f"{what} {name}"] = state_of(restored)
    for name in MEASURED:
        brought[f"measured {name}"] = measured(RUNS[name])
    brought["fused"] = roles.generator._optimizer._adamw.param_groups[0]["fused"]
    brought["from one rank"] = resumed_state(folder / "one", RUNS["shared"])
    for name, factor in (("once", 1.0), ("thousandfold", 1000.0)):
        roles = tiny_roles("shared")
        gather(roles, 0, BATCHES, signal_factor=factor)
        brought[f"tracking gradient, signal {name}"] = whole_gradients(roles, "fake_score")
        brought[f"generator gradient, signal {name}"] = whole_gradients(roles, "generator")
    if rank:
        # The first rank alone reads and writes; here there is nothing to be read.
        roles.generator.export("nowhere", "nowhere", {}, checkpoint="nowhere")
    for mode in CHECKPOINTING:
        roles = tiny_roles("shared", compute=ComputeSettings(checkpointing=mode))
        gather(roles, 0, BATCHES)
        for role in ("generator", "fake_score"):
            brought[f"checkpointed {mode} {role}"] = whole_gradients(roles, role)
    roles = tiny_roles("shared", compute=BF16)
    with GatheredBytes() as gathered:
        gather(roles, 0, BATCHES)
    brought["gathered in bf16"] = gathered.by_dtype
    for role in ("generator", "fake_score"):
        brought[f"bf16 {role}"] = whole_gradients(roles, role)
    brought["final in bf16"] = roles.generator.final_weights()
    brought["validated in bf16"] = roles.generator.validated_weights()
    brought["frozen"] = [frozen_answer(sharded=sharded) for sharded in (True, False)]
    return brought


def frozen_answer(*, sharded: bool) -> Tensor:
    """Velocity of a teacher in bfloat16, except for what diffusers keeps in float32."""
    network = prepare_network(tiny_velocity(3), BF16)
    for name, value in network.named_parameters():
        if not WanFamily.traits.keep_fp32 & set(name.split(".")):
            value.data = value.data.bfloat16()
    if sharded:
        shard(network, network.blocks, dtype=network.autocast_dtype)
    roles = tiny_roles("shared")
    query = roles.generator.rollout(key_of(0), text_batch(part_of((0, 1))))
    return ScoreTeacher(network, TeacherSettings()).denoise(query, negative_text()).velocity


class GatheredBytes(TorchDispatchMode):
    """Counts what each rank sends to others when parameters are gathered, by type."""

    def __init__(self) -> None:
        super().__init__()
        self.by_dtype: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.c10d._allgather_base_.default:
            sent = args[1]
            self.by_dtype[sent.dtype] = self.by_dtype.get(sent.dtype, 0) + sent.nbytes
        return func(*args, **(kwargs or {}))


def resumed_state(folder: Path, run: dict[str, Any]) -> Weights:
    """This rank's state one iteration after a resume."""
    roles = tiny_roles(**run)
    roles.generator.load(str(folder))
    roles.fake_score.load(str(folder))
    iterate(roles, NUM_ITERATIONS, BATCHES)
    return state_of(roles)


def whole_gradients(roles: Roles, role: str) -> Weights:
    return {
        name: full_tensor(value.grad)
        for name, value in parameters_of(roles.networks[role]).items()
        if value.grad is not None
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Weights]:
    """The same iterations on one rank."""
    return {name: weights_after(run) for name, run in RUNS.items()}


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
    ranks = on_ranks(2, on_two, tmp_path_factory.mktemp("ranks"), folder)
    put_together(ranks)
    return ranks


def test_the_networks_are_really_sharded(ranks):
    assert all(rank["sharded"] for rank in ranks)


def test_the_parts_of_sharded_parameters_are_updated_in_one_kernel(ranks):
    assert all(rank["fused"] for rank in ranks)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_make_the_weights_of_one(ranks, alone, name):
    run = RUNS[name]
    assert_every_tensor_moves(alone[name], all_weights(tiny_roles(**run)))
    # The samples of the second rank, and what this run has more than a plain one.
    assert_moves(alone[name], weights_after(run, FIRST_HALVES), TOLERANCE)
    for extra in run.keys() & EXTRAS.keys():
        assert_moves(alone[name], weights_after(run | {extra: EXTRAS[extra]}), TOLERANCE)
    assert relative_error(ranks[0][f"final {name}"], alone[name]) < TOLERANCE
    assert not any(key.startswith("average") for key in ranks[1][f"final {name}"])


def assert_goes_on(rank: dict[str, Any], name: str, tolerance: float = 0.0) -> None:
    """The iteration after which states are compared moves the weights of a rank."""
    after, before = (weights_in(rank[f"{when} {name}"]) for when in ("uninterrupted", "before"))
    assert_moves(after, before, tolerance)


@pytest.mark.parametrize("name", RUNS)
def test_two_resumed_ranks_go_on_bitwise(ranks, name):
    for rank in ranks:
        assert_goes_on(rank, name)
        assert same_bits(rank[f"resumed {name}"], rank[f"uninterrupted {name}"])


@pytest.mark.parametrize("whose", ["survivor", "replaced"])
@pytest.mark.parametrize("name", RUNS)
def test_restored_ranks_go_on_bitwise(ranks, name, whose):
    for rank in ranks:
        assert_goes_on(rank, name)
        assert same_bits(rank[f"{whose} {name}"], rank[f"uninterrupted {name}"])


@pytest.mark.parametrize("name", MEASURED)
def test_extra_updates_leave_no_bit_behind_and_make_the_losses_of_one_rank(ranks, name):
    alone = measured(RUNS[name])["losses"]
    found = [rank[f"measured {name}"] for rank in ranks]
    for rank, own in zip(ranks, found, strict=True):
        assert same_bits(own["weights"], rank[f"final {name}"])
    for before, after in zip(alone[::2], alone[1::2], strict=True):
        assert abs(after - before) > 1e-3 * before
    means = [sum(losses) / 2 for losses in zip(*(own["losses"] for own in found), strict=True)]
    assert means == pytest.approx(alone, rel=1e-4)


def test_a_snapshot_holds_the_parts_of_one_rank(ranks):
    sizes = [rank["snapshot bytes shared"] for rank in ranks]
    roles = tiny_roles("shared")
    iterate(roles, 0, BATCHES)
    whole = sum(
        part.num_bytes for part in (roles.generator.snapshot(), roles.fake_score.snapshot())
    )
    assert max(sizes) < 0.7 * whole
    assert sum(sizes) >= whole


def test_a_checkpoint_of_one_rank_goes_on_with_two(ranks):
    for rank in ranks:
        assert_goes_on(rank, "shared", TOLERANCE)
        found, expected = (
            weights_in(rank[key]) for key in ("from one rank", "uninterrupted shared")
        )
        assert relative_error(found, expected) < TOLERANCE


@pytest.mark.usefixtures("ranks")
def test_a_checkpoint_of_two_ranks_is_one_of_one_rank(folder, alone):
    saved = load_role(str(folder / "shared"), "generator")
    expected = load_role(str(folder / "one"), "generator")
    assert saved.updates == expected.updates
    roles = tiny_roles("shared")
    assert_moves(alone["shared"], all_weights(roles), TOLERANCE)
    assert relative_error(dict(saved.weights), dict(expected.weights)) < TOLERANCE
    assert saved.moments.keys() == expected.moments.keys()
    roles.generator.load(str(folder / "shared"))
    roles.fake_score.load(str(folder / "shared"))
    assert relative_error(all_weights(roles), alone["shared"]) < TOLERANCE


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


@pytest.mark.parametrize(
    ("role", "whose"), [("fake_score", "tracking"), ("generator", "generator")]
)
def test_the_gradient_is_that_of_the_whole_batch(ranks, role, whose):
    roles, halves = tiny_roles("shared"), tiny_roles("shared")
    gather(roles, 0, BATCHES)
    gather(halves, 0, FIRST_HALVES)
    expected = whole_gradients(roles, role)
    assert_moves(expected, whole_gradients(halves, role), TOLERANCE)
    assert relative_error(ranks[0][f"{whose} gradient, signal once"], expected) < TOLERANCE


@pytest.mark.parametrize(
    ("role", "whose"), [("fake_score", "tracking"), ("generator", "generator")]
)
def test_sharded_layers_can_be_computed_again_instead_of_kept(ranks, role, whose):
    plain = ranks[0][f"{whose} gradient, signal once"]
    for mode in CHECKPOINTING:
        assert same_bits(ranks[0][f"checkpointed {mode} {role}"], plain)


def test_parameters_computed_in_bf16_are_gathered_in_bf16(ranks):
    found = ranks[0]["gathered in bf16"]
    assert set(found) == {torch.bfloat16}
    # Forward and backward pass of each micro-batch gather each learner's half at least once.
    halves = sum(value.numel() for value in tiny_velocity(1).parameters()) / 2
    assert found[torch.bfloat16] >= 2 * 2 * 2 * 2 * halves


def test_weights_to_validate_are_narrowed_before_they_are_gathered_and_the_first_rank_has_them(
    ranks,
):
    final, found = ranks[0]["final in bf16"], ranks[0]["validated in bf16"]
    assert same_bits(found, narrowed(final, torch.bfloat16, WanFamily.traits.keep_fp32))
    assert {value.dtype for value in found.values()} == {torch.bfloat16, torch.float32}
    assert ranks[1]["validated in bf16"] == {}


@pytest.mark.parametrize("role", ["generator", "fake_score"])
def test_gradients_in_bf16_are_those_of_one_rank_within_its_rounding(ranks, role):
    roles, halves = tiny_roles("shared", compute=BF16), tiny_roles("shared", compute=BF16)
    gather(roles, 0, BATCHES)
    gather(halves, 0, FIRST_HALVES)
    expected, found = whole_gradients(roles, role), ranks[0][f"bf16 {role}"]
    assert_moves(expected, whole_gradients(halves, role), BF16_TOLERANCE)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert relative_error(found, expected) < BF16_TOLERANCE


def test_a_frozen_teacher_answers_the_same_sharded_or_whole(ranks):
    alone = frozen_answer(sharded=False)
    sharded, whole = (torch.cat([rank["frozen"][place] for rank in ranks]) for place in (0, 1))
    # The other sample is another answer.
    assert_moves({"velocity": alone}, {"velocity": alone.flip(0)}, BF16_TOLERANCE)
    assert relative_error({"velocity": whole}, {"velocity": alone}) < TOLERANCE
    assert relative_error({"velocity": sharded}, {"velocity": alone}) < BF16_TOLERANCE


def without_graph(roles: Roles) -> Weights:
    """Makes both learners' last pass one without a graph; returns what they answered."""
    text = text_batch(part_of((0, 1)))
    updates = roles.generator._optimizer.updates
    query = roles.generator.sample(key_of(updates, purpose=Purpose.TRACK), text)
    generated = roles.generator.sample(key_of(updates), text)
    prediction = roles.teacher.denoise(generated, negative_text())
    # DMD's signal asks for no gradient of the fake score.
    signal = roles.fake_score.signal(generated, prediction, len(part_of((0, 1))) / 2)
    return {"sampled": query.x0, "signal": signal.grad_x0}


def mixed_roles() -> Roles:
    return tiny_roles("fresh", objective=DmdObjective(), ida_decay=0.5)


def mixing(roles: Roles, folder: Path) -> None:
    mix_weights(roles)


def loading(roles: Roles, folder: Path) -> None:
    roles.generator.load(str(folder / "trained"))
    roles.fake_score.load(str(folder / "trained"))


def saving(roles: Roles, folder: Path) -> None:
    target = str(folder / f"saved-{roles.generator._optimizer.updates}")
    roles.generator.save(target)
    roles.fake_score.save(target)
    if dist.is_initialized():
        # The first rank writes; in a run the controller waits for it.
        dist.barrier()
    loading(roles, folder)
    roles.generator.load(target)
    roles.fake_score.load(target)
    mix_weights(roles)


def averaging(roles: Roles, folder: Path) -> None:
    """After another update of the weights, whose average is then what is trained on."""
    average = roles.generator._average
    with torch.no_grad():
        for value in parameters_of(roles.networks["generator"]).values():
            value.mul_(1.5)
    without_graph(roles)
    average.update(0)
    weights = roles.generator.final_weights()
    handed = [weights]
    if is_sharded(roles.networks["generator"]):
        torch.distributed.broadcast_object_list(handed)
    roles.fake_score.mix_weights(handed[0])


def stepping(roles: Roles, folder: Path) -> None:
    """Gradients gathered, then a pass without a graph, then the update."""
    gather(roles, 0, BATCHES)
    query = roles.generator.sample(key_of(0, purpose=Purpose.TRACK), text_batch(part_of((0, 1))))
    roles.fake_score.track(query, len(part_of((0, 1))) / 2)
    without_graph(roles)
    for role in (roles.generator, roles.fake_score):
        role.gradient_report(0)
        role.step(0)


ACCESSES: dict[str, Callable[[Roles, Path], None]] = {
    "mix_weights": mixing,
    "load": loading,
    "save": saving,
    "average": averaging,
    "step": stepping,
}


def accessed(folder: Path, name: str) -> tuple[Weights, Weights]:
    """All weights after an access that follows a pass without a graph, and the next answers."""
    roles = mixed_roles()
    without_graph(roles)
    ACCESSES[name](roles, folder)
    answers = without_graph(roles)
    return all_weights(roles), answers


def access_on_two(rank: int, size: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ACCESSES:
        found[f"{name} weights"], found[f"{name} answers"] = accessed(folder, name)
    return found


@pytest.fixture(scope="module")
def accesses(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("accesses")
    roles = mixed_roles()
    for iteration in range(2):
        iterate(roles, iteration, BATCHES)
    roles.generator.save(str(folder / "trained"))
    roles.fake_score.save(str(folder / "trained"))
    return on_ranks(2, access_on_two, tmp_path_factory.mktemp("ranks"), folder), folder


@pytest.mark.parametrize("name", ACCESSES)
def test_a_pass_without_a_graph_hides_no_weight_from_what_comes_after(accesses, name):
    """FSDP keeps the outermost module's parameters gathered after such a pass."""
    ranks, folder = accesses
    tolerance = FIRST_UPDATE_TOLERANCE if name == "step" else TOLERANCE
    weights, answers = accessed(folder, name)
    start = mixed_roles()
    before = all_weights(start)
    changed = {key: value for key, value in weights.items() if not torch.equal(value, before[key])}
    assert_every_tensor_moves(
        {key: value for key, value in weights.items() if key.startswith("fake_score")}, before
    )
    assert_moves(changed, {key: before[key] for key in changed}, tolerance)
    assert_moves(answers, without_graph(start), tolerance)
    assert relative_error(ranks[0][f"{name} weights"], weights) < tolerance
    for key, value in answers.items():
        found = torch.cat([rank[f"{name} answers"][key] for rank in ranks])
        assert relative_error({key: found}, {key: value}) < tolerance
