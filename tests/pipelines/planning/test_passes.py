"""Passes of the networks: against the method cards' table, and against networks that count."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from cluster.local import LocalWorkerGroup
from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.config.roles import DISCRIMINATOR, ROLES
from pipelines.distillation.iteration import PromptBatch, Roles, iterate
from pipelines.distillation.iteration_plan import plan_iteration
from pipelines.distillation.lag import measure_lag
from pipelines.planning.passes import (
    PassTable,
    expected_lag,
    expected_passes,
    iteration_passes,
    lag_share,
    pass_costs,
    run_passes,
    teacher_shape,
    total_units,
    units_by_role,
)
from pipelines.planning.stage_work import role_costs
from pipelines.planning.workload import Workload
from pipelines.stages.costs import PassCosts, Passes
from pipelines.transition import make_transition
from sgmd_core.inner_flow import inner_grid
from sgmd_core.objectives.meanflow import flow_of
from sgmd_core.types import DataBatch, TextBatch, per_sample
from workers.discriminator import Discriminator
from workers.discriminator_heads import build_heads
from workers.fake_score_tracker import FakeScoreTracker
from workers.generator_learner import GeneratorLearner
from workers.models.family import Denoiser, TransitionDenoiser
from workers.score_teacher import ScoreTeacher

SUMS = ("schedule.renoise=true", "generator.optimizer.max_grad_norm=1.0e+6")
"""What a consistency term asks for beside its method."""
FRESH = "fake_score.tracking=fresh"
LATENT_SHAPE = (2, 1, 2, 2)

METHODS = {
    "sgmd shared": (),
    "sgmd fresh": (FRESH,),
    "sgmd fresh, three updates": (FRESH, "objective.fake_updates=3"),
    "dmd shared": ("objective.method=dmd",),
    "dmd2": ("objective.method=dmd2", FRESH),
    "pdmd": ("objective.method=pdmd", FRESH),
    "cdm": ("objective.method=cdm", FRESH),
    "cdm random steps": (
        "objective.method=cdm",
        FRESH,
        "generator.random_steps={min_steps: 1, max_steps: 6}",
    ),
    "cdm joint": ("objective.method=cdm", FRESH, "objective.guidance=joint"),
    "cdm on the trajectory": ("objective.method=cdm", FRESH, "objective.off_trajectory=0.0"),
    "phased_dmd": ("objective={method: phased_dmd, high_iterations: 2}", "iterations=3", FRESH),
    "phased_dmd alternate": ("objective={method: phased_dmd, order: alternate}", FRESH),
    "phased_dmd diversity": (
        "objective={method: phased_dmd, high_iterations: 2}",
        "iterations=3",
        FRESH,
        "generator.diversity.weight=0.1",
        "generator.diversity.anchor_step=3",
    ),
    "tsg_fisher": ("objective.method=tsg_fisher", FRESH),
    "tsg_sim": ("objective.method=tsg_sim",),
    "sid": ("objective.method=sid", FRESH),
    "unguided": ("teacher.guidance_scale=1.0",),
    "diversity": ("generator.diversity.weight=0.1", "generator.diversity.anchor_step=3"),
    "dmd2 diversity": (
        "objective.method=dmd2",
        FRESH,
        "generator.diversity.weight=0.1",
        "generator.diversity.anchor_step=3",
    ),
    "four micro-batches": ("batch.micro_batches=4", FRESH),
    "adm": ("objective.method=adm",),
    "adm fresh": ("objective.method=adm", FRESH),
    "adm penalty": ("objective={method: adm, adversary: {r1_weight: 20.0}}", FRESH),
    "rcm": ("objective.method=rcm", FRESH, *SUMS),
    "rcm shared": (
        "objective={method: rcm, fake_updates: 1}",
        "fake_score.tracking=shared",
        *SUMS,
    ),
    "rcm, consistency alone": (
        "objective={method: rcm, matching_weight: 0.0, fake_updates: 1}",
        FRESH,
        *SUMS,
    ),
    "tmd": ("objective.method=tmd", FRESH),
    "tmd strides": ("objective={method: tmd, stage: meanflow, fake_updates: 2}", FRESH),
    "tmd guided strides": (
        "objective={method: tmd, stage: meanflow, fake_updates: 1, meanflow: {guidance: 3.0}}",
        FRESH,
    ),
    "dmd2 gan": ("objective={method: dmd2, adversary: {loss: softplus}}", FRESH),
}


ONE = PassCosts(to_input=1.0, to_weights=2.0)
"""The usual estimate, which leaves attention out."""
USUAL = dict.fromkeys((*ROLES, DISCRIMINATOR), ONE)


def config_of(*overrides: str) -> DistillConfig:
    return load_recipe("tiny", ["batch.size=8", "topology.mode=local", *overrides])


@pytest.mark.parametrize(
    ("method", "units"),
    # Section 1.3 of the method cards: four steps, a guided teacher, checkpointed training.
    [
        ("sgmd shared", 13.5),
        ("sgmd fresh", 17),
        ("dmd2", 41),
        ("tsg_fisher", 43),
        ("sid", 47),
        # The card has about 27.5: its discriminator makes passes of its own for either loss.
        ("adm fresh", 21),
    ],
)
def test_the_cost_of_an_iteration_is_that_of_the_method_cards(method, units):
    passes = expected_passes(config_of(*METHODS[method]))
    assert total_units(passes, USUAL, checkpointed=True) == units


def test_attention_makes_the_signal_dearer_than_a_forward_pass():
    """480x832, 81 frames: attention is 0.70 of a forward pass, and the weights see none of it."""
    work = Workload.of(load_recipe("wan21-1.3b"), "1.3b")
    for own in role_costs(work).values():
        assert own.forward == 1
        assert own.to_input == pytest.approx(1.70, abs=0.005)
        assert own.to_weights == pytest.approx(2.0, abs=1e-3)
    shared, dmd2 = (expected_passes(config_of(*METHODS[name])) for name in ("sgmd shared", "dmd2"))
    assert units_by_role(shared, role_costs(work))["fake_score"] == pytest.approx(4.70, abs=0.005)
    units = [total_units(table, role_costs(work), checkpointed=True) for table in (shared, dmd2)]
    assert units[1] / units[0] == pytest.approx(2.89, abs=0.005)


def test_costs_are_those_of_the_recipes_clip():
    config = config_of()
    assert pass_costs(config) == role_costs(Workload.of(config))
    small = pass_costs(config)["generator"]
    # Products with data as their input end a pass to the weights early: a little less than two.
    assert 1.02 < small.to_input < 1.03
    assert 1.99 < small.to_weights < 2
    longer = pass_costs(config_of("video.num_frames=25"))["generator"]
    assert longer.to_input > small.to_input


def test_a_generator_of_another_size_counts_in_passes_of_the_teacher(tmp_path: Path):
    """The flow head of one of four layers, in two inner steps: 1 + 1/4 and what embeds a state."""
    folder = make_transition("assets/tiny-wan", tmp_path / "flow", 1, 2)
    settings = (f"model.folder={folder}", "teacher.model=assets/tiny-wan", *METHODS["dmd2"])
    config, plain = config_of(*settings), config_of(*METHODS["dmd2"])
    costs, base = pass_costs(config), pass_costs(plain)
    assert costs["teacher"] == costs["fake_score"] == base["teacher"]
    shape = Workload.of(config).shape_of("generator")
    latent_shape, text_length = Workload.of(config).latent_shape, config.model.text_length
    own, one = (
        each.pass_flops(latent_shape, text_length) for each in (shape, teacher_shape(config))
    )
    assert costs["generator"].forward == own.forward / one.forward
    assert 1.25 < costs["generator"].forward < 1.4
    # Its passes are as many; each costs more.
    table = expected_passes(config)
    assert table == expected_passes(plain)
    shares, base_shares = units_by_role(table, costs), units_by_role(table, base)
    assert shares["generator"] == pytest.approx(
        base_shares["generator"] * costs["generator"].forward, rel=0.03
    )
    assert shares["fake_score"] == base_shares["fake_score"]
    assert total_units(table, costs, checkpointed=True) > total_units(
        table, base, checkpointed=True
    )


def test_without_checkpointing_nothing_is_computed_twice():
    shared, dmd2 = (expected_passes(config_of(*METHODS[name])) for name in ("sgmd shared", "dmd2"))
    assert (total_units(shared, USUAL), total_units(dmd2, USUAL)) == (10.5, 35)


def test_a_roles_share_is_the_sum_of_its_stages():
    shares = units_by_role(expected_passes(config_of()), USUAL)
    assert shares == {"generator": 4.5, "teacher": 2, "fake_score": 4}


def test_passes_add_up():
    assert Passes(1, 2, 3) + Passes(1, 0, 0).times(2) == Passes(3, 2, 3)
    assert Passes(1, 2, 3).units(ONE) == 9
    assert Passes(1, 2, 3).units(ONE, checkpointed=True) == 14
    assert Passes(1, 2, 3).units(PassCosts(1.5, 2.0)) == 10
    assert Passes(1, 2, 3).units(PassCosts(1.0, 2.0, forward=0.5), checkpointed=True) == 11
    assert Passes(1, 0, 0, 1).times(2).units(PassCosts(1.5, 2.0), checkpointed=True) == 5


@pytest.mark.slow
def test_a_run_is_the_sum_of_its_iterations_and_near_its_expectation():
    config = config_of(FRESH)
    whole = run_passes(config, 400)
    by_hand = sum(total_units(iteration_passes(config, i), USUAL) for i in range(400))
    assert total_units(whole, USUAL) == pytest.approx(by_hand)
    mean = total_units(expected_passes(config), USUAL)
    assert total_units(whole, USUAL) / 400 == pytest.approx(mean, rel=0.02)


class CountingNetwork(nn.Module):
    """The smallest velocity model; knows how many rows went through it, and which way.

    A hook on what a forward pass took runs when a backward pass asks for the gradient there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.counts: Counter[str] = Counter()

    def forward(self, x_t, sigma, text):
        weight = self.weight.expand(len(x_t))
        self.counts["forwards"] += len(x_t)
        if forward_ad.unpack_dual(x_t).tangent is not None:
            self.counts["tangents"] += len(x_t)
        for value, kind in ((x_t, "to_input"), (weight, "to_weights")):
            if value.requires_grad:
                value.register_hook(lambda grad, kind=kind: self._add(kind, len(grad)))
        return per_sample(weight, x_t) * x_t

    def _add(self, kind: str, rows: int) -> None:
        self.counts[kind] += rows


class CountingDenoiser(Denoiser):
    """The same with a layer, whose output is what it took."""

    def __init__(self) -> None:
        super().__init__()
        self.network = CountingNetwork()
        self.layer = nn.Identity()

    def forward(self, x_t, sigma, text):
        tokens = self.layer(self.network(x_t, sigma, text).flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(x_t.shape)

    @property
    def blocks(self):
        return [self.layer]

    def set_checkpointing(self, enabled):
        raise NotImplementedError


class CountingTransition(TransitionDenoiser):
    """The same with a flow head that answers as its network, whatever the inner state."""

    def __init__(self) -> None:
        super().__init__()
        self.network = CountingNetwork()
        self.inner_levels = inner_grid(2, 10.0)

    def forward(self, x_t, sigma, text, states=None, levels=None, targets=None):
        answer = self.network(x_t, sigma, text)
        return answer if levels is None else torch.stack([answer] * len(levels))

    @property
    def blocks(self):
        return []

    def set_checkpointing(self, enabled):
        raise NotImplementedError


def counting_discriminator(config: DistillConfig, network: CountingDenoiser) -> Discriminator:
    heads = build_heads([LATENT_SHAPE[0]], 8, 0, config.seed)
    optimizer = config.discriminator.optimizer
    return Discriminator(network, heads, (1,), config.objective, optimizer, config.seed)


class Captions:
    """A text encoder that embeds every caption as zero."""

    def encode(self, captions, sample_indices):
        return TextBatch(torch.zeros(len(captions), 1, 1), tuple(sample_indices))

    def negative(self):
        return torch.zeros(1, 1, 1)

    def data(self):
        return DataBatch(torch.ones(8, *LATENT_SHAPE))


def counting_roles(config: DistillConfig) -> tuple[Roles, dict[str, CountingNetwork]]:
    """The roles over networks that count."""
    flow = flow_of(config.objective)
    learning = CountingDenoiser() if flow is None else CountingTransition()
    networks = {role: CountingNetwork() for role in ("fake_score", "teacher")}
    networks["generator"] = learning.network
    generator = GeneratorLearner(
        learning,
        config.schedule,
        config.generator,
        LATENT_SHAPE,
        config.seed,
        task=config.generator_task,
    )
    fake_score = FakeScoreTracker(networks["fake_score"], config.objective, config.fake_score)
    judge = None
    if config.adversary is not None:
        denoiser = CountingDenoiser()
        networks["discriminator"] = denoiser.network
        judge = LocalWorkerGroup("discriminator", [counting_discriminator(config, denoiser)])
    roles = Roles(
        generator=LocalWorkerGroup("generator", [generator]),
        fake_score=LocalWorkerGroup("fake_score", [fake_score]),
        teacher=LocalWorkerGroup("teacher", [ScoreTeacher(networks["teacher"], config.teacher)]),
        text=LocalWorkerGroup("text", [Captions()]),
        discriminator=judge,
    )
    return roles, networks


def assert_foretold(
    networks: dict[str, CountingNetwork], table: PassTable, batch_size: int
) -> None:
    """Every network has counted the passes of its role."""
    foretold: dict[str, Passes] = {}
    for stage, passes in table.items():
        role = stage.partition(".")[0]
        foretold[role] = foretold.get(role, Passes()) + passes
    for role, network in networks.items():
        counted = {kind: rows / batch_size for kind, rows in network.counts.items()}
        assert Passes(**counted) == foretold.get(role, Passes()), role


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_networks_that_count_find_what_was_foretold(method):
    config = config_of("seed=3", *METHODS[method])
    roles, networks = counting_roles(config)
    plan = plan_iteration(config, roles.text.call_rank(0, Captions.negative))
    captions = PromptBatch(tuple("abcdefgh"), data=roles.text.call_rank(0, Captions.data))
    num_iterations = 3
    for iteration in range(num_iterations):
        iterate(roles, plan, iteration, [captions] * plan.batches_per_iteration)
    assert_foretold(networks, run_passes(config, num_iterations), config.batch.size)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgmd shared", "sgmd fresh", "phased_dmd alternate", "rcm"])
def test_they_find_the_passes_of_a_measured_lag(method):
    lag = "lag={every: 1, updates: 3, batches: 2, rates: [1.0, 4.0]}"
    config = config_of("seed=3", "batch.micro_batches=2", lag, *METHODS[method])
    roles, networks = counting_roles(config)
    plan = plan_iteration(config, roles.text.call_rank(0, Captions.negative))
    data = roles.text.call_rank(0, Captions.data)
    captions = [PromptBatch(tuple("abcdefgh"), data=data)] * plan.batches_per_iteration
    iterate(roles, plan, 0, captions)
    assert measure_lag(roles, plan, config.lag, 1, captions)["tracking_lag"] != 0
    iterate(roles, plan, 1, captions)
    assert_foretold(networks, run_passes(config, 2), config.batch.size)
    costs = pass_costs(config)
    mean = total_units(expected_lag(config), costs)
    without = total_units(expected_passes(config_of(*METHODS[method])), costs)
    assert lag_share(config, costs) == pytest.approx(mean / without)
    assert total_units(expected_passes(config), costs) == pytest.approx(without + mean)
