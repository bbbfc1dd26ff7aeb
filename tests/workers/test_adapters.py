"""Adapters: the same function as the base at first, gradients by the chain rule, no cross-talk.

Roles over one base are compared bit for bit with roles that have a network each.
"""

import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sgmd_core.errors import CheckpointError, ConfigError
from sgmd_core.objectives.sgmd import SgmdObjective
from sgmd_core.objectives.sid import SidObjective
from sgmd_core.schedule import FlowMatchSchedule
from tests.helpers.moves import assert_moves
from tests.helpers.moves import relative_error as relative_error_of_all
from tests.helpers.roles import (
    SEED,
    Roles,
    gradients,
    iterate,
    same_bits,
    text_batch,
    weights,
)
from tests.helpers.tiny_wan import (
    HEIGHT,
    LATENT_SHAPE,
    NUM_FRAMES,
    TEXT_LENGTH,
    WIDTH,
    write_tiny_wan,
)
from workers.adapters import add_adapters, make_trainable
from workers.base_networks import shared_base, view_of
from workers.build import build_evaluator, build_fake_score, build_generator, build_teacher
from workers.clip_settings import VideoSettings
from workers.models.adapter_files import adapter_factors, merged_weights
from workers.models.wan import WanVelocity, load_transformer
from workers.network_settings import ComputeSettings, LoraSettings, OptimizerSettings
from workers.role_state import load_role
from workers.settings import (
    DiversitySettings,
    FakeScoreSettings,
    GeneratorSettings,
    ModelSettings,
    TeacherSettings,
)
from workers.sharding import parameters_of

LORA = LoraSettings(rank=4, alpha=8.0)
VIDEO = VideoSettings(NUM_FRAMES, HEIGHT, WIDTH, fps=8)
CPU = torch.device("cpu")
OPTIMIZER = OptimizerSettings(lr=1e-2, max_grad_norm=1.0)
CHECKPOINTED = ComputeSettings(checkpointing=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_wan(tmp_path_factory.mktemp("wan"), ["a", "red", "circle"])


@pytest.fixture(scope="module")
def copies(folder, tmp_path_factory) -> Path:
    """A folder for each role: each is a base of its own."""
    root = tmp_path_factory.mktemp("copies")
    for role in ("generator", "fake_score", "teacher"):
        shutil.copytree(folder, root / role)
    return root


def relative_error(found: Tensor, expected: Tensor) -> float:
    return relative_error_of_all({"": found.detach()}, {"": expected.detach()})


def assert_moved(found: Tensor, without: Tensor) -> None:
    assert_moves({"": found}, {"": without}, tolerance=1e-3)


def adapted(folder: Path, role: str = "generator", lora: LoraSettings = LORA) -> WanVelocity:
    network = view_of(shared_base(folder, torch.float32, CPU))
    add_adapters(network, lora, SEED, role)
    return network


def with_drawn_adapters(network: WanVelocity, seed: int = 3) -> WanVelocity:
    """Both halves of each adapter away from their beginning."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in parameters_of(network).values():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return network


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn((2, *LATENT_SHAPE), generator=generator)
    return x_t, torch.tensor([0.3, 0.8]), text_batch([0, 1]).text


def adapted_roles(
    folder: Path, copies: Path | None = None, tracking: str = "shared", **options
) -> Roles:
    """Generator and fake score as adapters, over one base or over a base each."""
    compute = options.get("compute", CHECKPOINTED)
    objective = options.get("objective") or SgmdObjective()
    diversity = options.get("diversity") or DiversitySettings()
    model = ModelSettings(str(folder), TEXT_LENGTH)
    settings = GeneratorSettings(
        optimizer=OPTIMIZER, compute=compute, lora=LORA, diversity=diversity
    )
    score = FakeScoreSettings(tracking=tracking, optimizer=OPTIMIZER, compute=compute, lora=LORA)
    threads = torch.get_num_threads()
    own = {
        role: model if copies is None else ModelSettings(str(copies / role), TEXT_LENGTH)
        for role in ("generator", "fake_score", "teacher")
    }
    roles = {
        "generator": build_generator(
            own["generator"], VIDEO, FlowMatchSchedule(), settings, SEED, threads
        ),
        "fake_score": build_fake_score(own["fake_score"], objective, score, threads, SEED),
        "teacher": build_teacher(
            own["teacher"], TeacherSettings(2.0, compute=compute), threads, copies is None
        ),
    }
    networks = {name: role._network for name, role in roles.items()}
    for seed, name in enumerate(("generator", "fake_score")):
        # Away from the beginning, where fake score and teacher are the same.
        with_drawn_adapters(networks[name], seed)
    return Roles(
        **roles,
        networks=networks,
        shared_tracking=tracking == "shared",
        objective=objective,
        diversity=diversity,
        mixes_weights=False,
    )


class TestFunction:
    @pytest.mark.slow
    def test_at_first_a_role_is_the_base_to_the_last_bit(self, folder):
        base = shared_base(folder, torch.float32, CPU)
        assert torch.equal(adapted(folder)(*inputs()), base(*inputs()))

    def test_adapters_that_are_drawn_move_the_prediction(self, folder):
        base = shared_base(folder, torch.float32, CPU)
        assert_moved(with_drawn_adapters(adapted(folder))(*inputs()), base(*inputs()))

    @pytest.mark.slow
    def test_its_first_weights_are_drawn_by_seed_and_role(self, folder):
        first, again = weights(adapted(folder)), weights(adapted(folder))
        other = weights(adapted(folder, "fake_score"))
        drawn = [name for name in first if "lora_A" in name]
        assert same_bits(first, again)
        assert drawn
        assert all(not torch.equal(first[name], other[name]) for name in drawn)

    def test_only_adapters_are_trained_and_they_are_float32_on_a_base_of_bfloat16(self, folder):
        network = view_of(shared_base(folder, torch.bfloat16, CPU))
        add_adapters(network, LORA, SEED, "generator")
        trained = parameters_of(make_trainable(network))
        assert trained
        assert all("lora_" in name for name in trained)
        assert {value.dtype for value in trained.values()} == {torch.float32}
        assert network.blocks[0].attn1.to_q.base_layer.weight.dtype == torch.bfloat16

    @pytest.mark.slow
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_a_base_of_bfloat16_gives_nearly_the_prediction_of_float32(self, folder, precision):
        exact = with_drawn_adapters(adapted(folder))
        rounded = view_of(shared_base(folder, torch.bfloat16, CPU))
        add_adapters(rounded, LORA, SEED, "generator")
        with_drawn_adapters(rounded)
        rounded.autocast_dtype = torch.bfloat16 if precision == "bf16" else None
        assert relative_error(rounded(*inputs()), exact(*inputs())) < 0.05


class TestTargets:
    def test_without_names_every_projection_of_the_layers_gets_an_adapter(self, folder):
        names = {name.split(".lora_")[0] for name in parameters_of(adapted(folder))}
        shape = shared_base(folder, torch.float32, CPU)
        assert len(names) == 10 * len(shape.blocks)

    def test_a_name_means_the_projections_that_end_with_it(self, folder):
        network = adapted(folder, lora=LoraSettings(rank=2, targets=("to_q", "attn2.to_out.0")))
        names = {name.split(".lora_")[0].split(".", 3)[-1] for name in parameters_of(network)}
        assert names == {"attn1.to_q", "attn2.to_q", "attn2.to_out.0"}

    def test_an_unknown_name_is_refused_with_those_that_there_are(self, folder):
        with pytest.raises(ConfigError, match=r"to_z.*attn1\.to_q"):
            adapted(folder, lora=LoraSettings(targets=("to_q", "to_z")))


class TestGradient:
    @pytest.mark.slow
    def test_it_follows_from_that_of_full_weights_by_the_chain_rule(self, folder):
        """dA = s B' dW and dB = s dW A', where dW is the gradient of the merged weight."""
        network = with_drawn_adapters(adapted(folder))
        network(*inputs()).square().sum().backward()
        whole = load_transformer(folder)
        whole.load_state_dict(merged_weights(folder, weights_of(network), LORA))
        whole(*inputs()).square().sum().backward()
        gradient = gradients(whole)
        pairs = [name for name in parameters_of(network) if "lora_A" in name]
        assert pairs
        for name in pairs:
            first = network.get_parameter(name)
            second = network.get_parameter(name.replace("lora_A", "lora_B"))
            full = gradient[name.replace(".lora_A.default", "")]
            assert relative_error(first.grad, LORA.scale * second.T @ full) < 1e-3
            assert relative_error(second.grad, LORA.scale * full @ first.T) < 1e-3

    def test_an_adapter_of_full_rank_learns_what_one_full_layer_learns(self, folder):
        """With A = 1 and plain descent, a step of B is a step of the weight itself."""
        name = "transformer.blocks.1.ffn.net.2"
        size = 32
        lora = LoraSettings(rank=size, alpha=size, targets=("ffn.net.2",))
        network, whole = adapted(folder, lora=lora), load_transformer(folder)
        first = network.get_parameter(f"{name}.lora_A.default.weight")
        second = network.get_parameter(f"{name}.lora_B.default.weight")
        weight = whole.get_parameter(f"{name}.weight")
        before = weight.detach().clone()
        with torch.no_grad():
            first.copy_(torch.eye(size))
        for _ in range(3):
            for model, learned in ((network, second), (whole, weight)):
                loss = model(*inputs()).square().mean()
                (grad,) = torch.autograd.grad(loss, learned)
                learned.data -= 0.5 * grad
        change = weight.detach() - before
        assert change.norm() > 1e-2
        assert relative_error(second.detach(), change) < 1e-4

    def test_nothing_of_the_base_gathers_gradient(self, folder):
        network = with_drawn_adapters(adapted(folder))
        make_trainable(network)(*inputs()).sum().backward()
        base = shared_base(folder, torch.float32, CPU)
        assert all(value.grad is None for value in base.parameters())
        assert not any(value.requires_grad for value in base.parameters())


def weights_of(network: WanVelocity) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in parameters_of(network).items()}


CASES: dict[str, dict] = {
    "shared tracking": {"tracking": "shared"},
    "fresh tracking": {"tracking": "fresh"},
    "through the teacher": {"tracking": "fresh", "objective": SidObjective(fake_updates=1)},
    "diverse": {
        "tracking": "fresh",
        "diversity": DiversitySettings(weight=1.0, teacher_steps=4, anchor_step=2),
    },
    "kept activations": {"tracking": "shared", "compute": ComputeSettings()},
}


class TestCrossTalk:
    @pytest.mark.slow
    @pytest.mark.parametrize("case", CASES)
    def test_roles_over_one_base_learn_as_roles_with_a_network_each(self, folder, copies, case):
        together = adapted_roles(folder, **CASES[case])
        apart = adapted_roles(folder, copies, **CASES[case])
        assert addresses(together, "generator") & addresses(together, "fake_score")
        assert addresses(together, "generator") & addresses(together, "teacher")
        assert not addresses(apart, "generator") & addresses(apart, "fake_score")
        before = {role: weights_of(together.networks[role]) for role in LEARNERS}
        for iteration in range(2):
            iterate(together, iteration)
            iterate(apart, iteration)
        for role in LEARNERS:
            learned = weights_of(together.networks[role])
            assert same_bits(learned, weights_of(apart.networks[role]))
            assert all(not torch.equal(learned[name], before[role][name]) for name in learned)

    @pytest.mark.parametrize(
        ("changed", "asked"),
        [
            (changed, asked)
            for changed in ("generator", "fake_score")
            for asked in ("generator", "fake_score", "teacher")
            if changed != asked
        ],
    )
    def test_changing_one_role_leaves_another_as_it_is(self, folder, changed, asked):
        roles = adapted_roles(folder)
        own = [network(*inputs()) for network in (roles.networks[changed], roles.networks[asked])]
        with_drawn_adapters(roles.networks[changed], seed=9)
        assert_moved(roles.networks[changed](*inputs()), own[0])
        assert torch.equal(roles.networks[asked](*inputs()), own[1])

    @pytest.mark.slow
    @pytest.mark.parametrize("first", ["generator", "fake_score"])
    def test_a_graph_is_made_again_under_its_own_adapters_whoever_has_worked_since(
        self, folder, first
    ):
        roles = adapted_roles(folder)
        network = roles.networks[first]
        network(*inputs()).square().sum().backward()
        alone = gradients(network)
        for value in parameters_of(network).values():
            value.grad = None
        loss = network(*inputs()).square().sum()
        for role in ("teacher", "fake_score", "generator"):
            with torch.no_grad():
                roles.networks[role](*inputs(7))
        loss.backward()
        assert same_bits(gradients(network), alone)


LEARNERS = ("generator", "fake_score")


def addresses(roles: Roles, role: str) -> set[int]:
    """Where the frozen tensors of a role are."""
    network = roles.networks[role]
    return {value.data_ptr() for value in network.parameters() if not value.requires_grad}


class TestBase:
    @pytest.mark.slow
    def test_it_is_read_once_and_freed_with_the_last_role(self, folder):
        base = shared_base(folder, torch.float64, CPU)
        views = [view_of(base), view_of(base)]
        assert shared_base(folder, torch.float64, CPU) is base
        known = weakref.ref(base)
        del base
        gc.collect()
        assert known() is not None
        views.pop()
        gc.collect()
        assert known() is shared_base(folder, torch.float64, CPU)
        views.clear()
        gc.collect()
        assert known() is None

    def test_another_type_or_other_files_are_another_base(self, folder, tmp_path):
        first = shared_base(folder, torch.float32, CPU)
        assert shared_base(folder, torch.bfloat16, CPU) is not first
        other = write_tiny_wan(tmp_path / "other", ["a"], seed=5)
        assert shared_base(other, torch.float32, CPU) is not first


class TestState:
    @pytest.mark.slow
    def test_a_resumed_role_goes_on_bit_for_bit(self, folder, tmp_path):
        roles = adapted_roles(folder)
        iterate(roles, 0)
        roles.generator.save(str(tmp_path))
        roles.fake_score.save(str(tmp_path))
        resumed = adapted_roles(folder)
        assert resumed.generator.load(str(tmp_path)) == 1
        assert resumed.fake_score.load(str(tmp_path)) == 1
        for each in (roles, resumed):
            iterate(each, 1)
        for role in LEARNERS:
            kept = weights_of(roles.networks[role])
            assert same_bits(kept, weights_of(resumed.networks[role]))
        assert same_bits(roles.generator.final_weights(), resumed.generator.final_weights())

    @pytest.mark.slow
    def test_a_checkpoint_holds_adapters_alone_and_says_so(self, folder, tmp_path):
        roles = adapted_roles(folder)
        iterate(roles, 0)
        roles.generator.save(str(tmp_path))
        for part in ("generator", "ema"):
            state = load_role(str(tmp_path), part)
            assert state.lora == LORA
            assert all("lora_" in name for name in state.weights)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "other", [replace(LORA, alpha=4.0), replace(LORA, rank=2), replace(LORA, targets=("to_q",))]
    )
    def test_other_settings_are_refused_by_name(self, folder, tmp_path, other):
        roles = adapted_roles(folder)
        iterate(roles, 0)
        roles.fake_score.save(str(tmp_path))
        settings = FakeScoreSettings(optimizer=OPTIMIZER, lora=other)
        model = ModelSettings(str(folder), TEXT_LENGTH)
        threads = torch.get_num_threads()
        fake_score = build_fake_score(model, SgmdObjective(), settings, threads, SEED)
        with pytest.raises(CheckpointError, match=f"rank {other.rank} and alpha {other.alpha:g}"):
            fake_score.load(str(tmp_path))

    @pytest.mark.slow
    def test_adapters_are_not_loaded_into_a_whole_network(self, folder, tmp_path):
        roles = adapted_roles(folder)
        iterate(roles, 0)
        roles.fake_score.save(str(tmp_path))
        model = ModelSettings(str(folder), TEXT_LENGTH)
        whole = build_fake_score(
            model, SgmdObjective(), FakeScoreSettings(), torch.get_num_threads()
        )
        with pytest.raises(CheckpointError, match="weights of a whole network"):
            whole.load(str(tmp_path))


class TestFiles:
    def test_merged_weights_predict_as_the_adapters_do(self, folder):
        network = with_drawn_adapters(adapted(folder))
        whole = load_transformer(folder)
        assert_moved(network(*inputs()), whole(*inputs()))
        whole.load_state_dict(merged_weights(folder, weights_of(network), LORA))
        assert relative_error(whole(*inputs()), network(*inputs())) < 1e-5

    def test_factors_are_the_change_of_the_merged_weights(self, folder):
        adapters = weights_of(with_drawn_adapters(adapted(folder)))
        merged, base = merged_weights(folder, adapters, LORA), load_transformer(folder).state_dict()
        factors = adapter_factors(adapters, LORA)
        changed = {f"{name}.weight" for name in factors}
        assert changed == {name for name in merged if not torch.equal(merged[name], base[name])}
        for name, factor in factors.items():
            change = merged[f"{name}.weight"] - base[f"{name}.weight"]
            assert relative_error(factor.up @ factor.down, change) < 1e-5
            assert factor.energy == pytest.approx(float(change.square().sum()), rel=1e-4)

    @pytest.mark.slow
    def test_an_export_holds_the_merged_average(self, folder, tmp_path):
        roles = adapted_roles(folder)
        iterate(roles, 0)
        average = roles.generator.final_weights()
        settings = {"flow_shift": 5.0, "num_steps": 4}
        roles.generator.export(str(tmp_path / "out"), str(folder), settings)
        exported = load_transformer(tmp_path / "out")
        expected = load_transformer(folder)
        expected.load_state_dict(merged_weights(folder, average, LORA))
        assert relative_error(exported(*inputs()), expected(*inputs())) < 0.05

    @pytest.mark.parametrize("change", ["half", "whole", "other"])
    def test_weights_that_are_no_adapters_of_this_denoiser_are_refused(self, folder, change):
        adapters = weights_of(adapted(folder))
        if change == "half":
            del adapters[next(iter(adapters))]
        elif change == "whole":
            adapters = dict(load_transformer(folder).state_dict())
        else:
            adapters = {name.replace("blocks.1", "blocks.7"): v for name, v in adapters.items()}
        with pytest.raises(CheckpointError):
            merged_weights(folder, adapters, LORA)

    @pytest.mark.slow
    def test_the_evaluator_samples_adapters_as_merged_weights(self, folder):
        model = ModelSettings(str(folder), TEXT_LENGTH)
        adapters = weights_of(with_drawn_adapters(adapted(folder)))
        threads = torch.get_num_threads()
        schedule = FlowMatchSchedule()
        settings = GeneratorSettings(lora=LORA)
        own = build_evaluator(model, VIDEO, schedule, threads, weights=settings)
        whole = build_evaluator(model, VIDEO, schedule, threads)
        merged = merged_weights(folder, adapters, LORA)
        asked = (["a red circle"], 0, SEED, 2, 1.0)
        clip, expected = own.sample(*asked, adapters), whole.sample(*asked, merged)
        assert_moved(clip, own.sample(*asked))
        assert relative_error(clip, expected) < 1e-4
        assert torch.equal(own.sample(*asked), whole.sample(*asked))
