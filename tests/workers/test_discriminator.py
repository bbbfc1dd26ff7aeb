"""The discriminator: split = one plain step, who gets gradient, parts = whole, saved = kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from sgmd_core.errors import NonFiniteError, ShapeError, StaleCallError
from sgmd_core.objectives.adm import AdmObjective
from sgmd_core.objectives.adversarial import AdversarialTerm, perturbation
from sgmd_core.objectives.dmd2 import Dmd2Objective
from sgmd_core.schedule import FlowMatchSchedule
from sgmd_core.seeds import draw
from sgmd_core.types import DataBatch, FakePrediction, NoisedBatch
from tests.helpers.moves import assert_moves, relative_error
from tests.helpers.ranks import on_ranks
from tests.helpers.roles import (
    SEED,
    gradients,
    key_of,
    negative_text,
    part_of,
    poisoned,
    same_bits,
    text_batch,
    tiny_roles,
    weights,
)
from tests.helpers.tiny_wan import LATENT_SHAPE, tiny_velocity
from workers.compute import prepare_network
from workers.discriminator import Discriminator
from workers.discriminator_heads import DiscriminatorHeads, build_heads, num_head_parameters
from workers.finite import FiniteChecks
from workers.models.features import features_of
from workers.models.wan import WanVelocity
from workers.network_settings import ComputeSettings, OptimizerSettings
from workers.role_state import load_role
from workers.sharding import full_tensor, is_sharded, parameters_of, shard

WIDTH = 32
"""Of the tokens of a tiny Wan."""
PENALTY = AdversarialTerm(r1_weight=20.0, r1_sigma=0.5)
ADM = AdmObjective(delta=1 / 64, adversary=PENALTY)
GAN = Dmd2Objective(fake_updates=1, adversary=AdversarialTerm(0.5, "softplus", 20.0, 0.5))
# Sums in another order, through group norms over three positions: 1e-4 of the largest entry.
TOLERANCE = 1e-4
SOFTPLUS = "softplus"


def spoken(heads: DiscriminatorHeads) -> DiscriminatorHeads:
    """Heads with a last layer that says something; new ones are silent."""
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for head in heads.heads:
            head.last.weight.copy_(torch.randn(head.last.weight.shape, generator=stream))
    return heads


class World:
    """The roles of an adversarial method over tiny networks; sharded in a process group."""

    def __init__(
        self, objective, tracking: str = "shared", *, raises: bool = True, lr: float = 1e-3
    ) -> None:
        self.objective = objective
        self.roles = tiny_roles(tracking, objective=objective)
        self.backbone = tiny_velocity(3)
        shard(self.backbone, self.backbone.blocks)
        self.heads = spoken(build_heads([WIDTH] * 2, 8, 1, SEED))
        shard(self.heads, self.heads.heads)
        optimizer = OptimizerSettings(lr=lr)
        checks = FiniteChecks(raises=raises)
        self.discriminator = Discriminator(
            self.backbone, self.heads, (1, 2), objective, optimizer, SEED, checks
        )

    def gather(self, batches, iteration: int = 0, exit_step: int = 2) -> None:
        """The generator's half of an iteration, as the program orders it."""
        num_samples = sum(len(batch) for batch in batches)
        for index, batch in enumerate(batches):
            own = part_of(batch)
            share = len(own) / num_samples
            query = self.roll_out(own, iteration, index, exit_step)
            teacher = self.roles.teacher.denoise(query, negative_text())
            if isinstance(self.objective, AdmObjective):
                fake = self.roles.fake_score.predict(query)
                signal = self.discriminator.compare_steps(query, teacher, fake, share)
                signal = self.roles.fake_score.complete(signal)
            else:
                signal = self.roles.fake_score.signal(query, teacher, share)
                signal = self.discriminator.compare_data(query, data_of(own), signal, share)
            if self.roles.shared_tracking:
                self.roles.fake_score.track(query, share)
            self.roles.generator.learn(signal)

    def roll_out(self, samples, iteration: int = 0, index: int = 0, exit_step: int = 2):
        key = key_of(iteration, index)
        draws = draw(SEED, key, samples, LATENT_SHAPE, FlowMatchSchedule(), 4)
        text = text_batch(samples, iteration)
        return self.roles.generator.rollout(key, text, replace(draws, exit_step=exit_step))

    def step(self, iteration: int = 0) -> None:
        for role in (self.roles.generator, self.roles.fake_score, self.discriminator):
            role.gradient_report(iteration)
            role.step(iteration)

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        own = self.roles.networks
        return {
            "generator": own["generator"],
            "fake_score": own["fake_score"],
            "discriminator": self.heads,
        }


def data_of(samples) -> DataBatch:
    streams = [torch.Generator().manual_seed(77 + sample) for sample in samples]
    return DataBatch(
        torch.stack([torch.randn(LATENT_SHAPE, generator=stream) for stream in streams])
    )


def logits_at(world: World, state: Tensor, sigma: Tensor, text: Tensor, weights=None) -> Tensor:
    maps = features_of(world.backbone, (1, 2), state, sigma, text)
    return world.heads(maps) if weights is None else functional_call(world.heads, weights, (maps,))


def plain_step(world: World, samples: tuple[int, ...]) -> None:
    """The same gradients by one graph for each loss."""
    networks, objective = world.roles.networks, world.objective
    generator, fake_score = networks["generator"], networks["fake_score"]
    key, text = key_of(0), text_batch(samples)
    draws = draw(SEED, key, samples, LATENT_SHAPE, FlowMatchSchedule(), 4)
    grid = FlowMatchSchedule().few_step_grid(4)
    x = draws.initial_noise
    with torch.no_grad():
        for step in range(2):
            level = grid[step].expand(len(samples))
            x = x + (grid[step + 1] - grid[step]) * generator(x, level, text.text)
    x0 = x - grid[2] * generator(x, grid[2].expand(len(samples)), text.text)
    query = NoisedBatch(x0, draws.sigma, draws.noise, text.text, key)
    still = replace(query, x0=x0.detach())
    teacher = world.roles.teacher.denoise(still, negative_text()).velocity
    constant = {name: value.detach() for name, value in fake_score.named_parameters()}
    velocity = functional_call(fake_score, constant, (query.x_t, query.sigma, query.text))
    if isinstance(objective, AdmObjective):
        real = still.x_t - objective.delta * teacher
        made, sigma = query.x_t - objective.delta * velocity, query.sigma - objective.delta
        rest = torch.zeros(())
    else:
        level = query.sigma.reshape(-1, 1, 1, 1, 1)
        real = (1 - level) * data_of(samples).x0 + level * query.noise
        made, sigma = query.x_t, query.sigma
        rest = objective.generator_loss(query, velocity, teacher).value
    silent = {name: value.detach() for name, value in world.heads.named_parameters()}
    of_made = logits_at(world, made, sigma, query.text, silent)
    term, softly = objective.adversary, objective.adversary.loss == SOFTPLUS
    taught = torch.nn.functional.softplus(-of_made).mean() if softly else -of_made.mean()
    (rest + term.weight * taught).backward()
    noise = perturbation(SEED, 0, samples, LATENT_SHAPE)
    one, other, moved = (
        logits_at(world, state.detach(), sigma, query.text)
        for state in (real, made, real + term.r1_sigma * noise)
    )
    if softly:
        soft = torch.nn.functional.softplus
        own = soft(-one).mean() + soft(other).mean()
    else:
        own = (1 - one).relu().mean() + (1 + other).relu().mean()
    (own + term.r1_weight * (one - moved).square().mean()).backward()
    velocity = fake_score(still.x_t, still.sigma, still.text)
    objective.tracking_loss(still, velocity).value.backward()


@pytest.mark.slow
@pytest.mark.parametrize("objective", [ADM, GAN], ids=["adm", "gan"])
def test_split_gradients_equal_those_of_one_plain_step(objective):
    split, plain, other = World(objective), World(objective), World(objective)
    split.gather([(0, 1, 2)])
    plain_step(plain, (0, 1, 2))
    other.gather([(3, 4, 5)])
    for role, network in split.networks.items():
        expected = gradients(plain.networks[role])
        assert_moves(expected, gradients(other.networks[role]), TOLERANCE)
        assert relative_error(gradients(network), expected) < TOLERANCE, role
    assert not gradients(split.backbone)
    assert not gradients(split.roles.networks["teacher"])


def test_without_a_word_of_the_heads_the_generator_learns_nothing_and_they_do():
    world = World(ADM)
    torch.nn.init.zeros_(world.heads.heads[0].last.weight)
    torch.nn.init.zeros_(world.heads.heads[1].last.weight)
    world.gather([(0, 1)])
    assert all(value.abs().max() == 0 for value in gradients(world.networks["generator"]).values())
    of_heads = gradients(world.heads)
    assert max(value.abs().max() for name, value in of_heads.items() if "last" in name) > 0


def test_a_fake_score_that_predicts_as_the_teacher_leaves_the_hinge_at_two():
    world = World(AdmObjective())
    query = world.roll_out((0, 1))
    teacher = world.roles.teacher.denoise(query, negative_text())
    fake = FakePrediction(query.key, teacher.velocity)
    for scale in (1e-3, 0.0):
        with torch.no_grad():
            for head in world.heads.heads:
                head.last.weight.mul_(scale)
        signal = world.discriminator.compare_steps(query, teacher, fake, 1.0)
        assert signal.metrics["discriminator"] == pytest.approx(2)
        assert signal.metrics["logit_gap"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", [ADM, GAN], ids=["adm", "gan"])
@pytest.mark.parametrize("batches", [[(0, 1), (2, 3)], [(0,), (1, 2, 3)]])
def test_gradients_of_micro_batches_add_up_to_those_of_one_batch(objective, batches):
    whole, parts, one = (World(objective, "fresh") for _ in range(3))
    whole.gather([(0, 1, 2, 3)])
    parts.gather(batches)
    one.gather([(0, 1, 2)])
    for role in ("generator", "discriminator"):
        expected = gradients(whole.networks[role])
        assert_moves(expected, gradients(one.networks[role]), TOLERANCE)
        assert relative_error(gradients(parts.networks[role]), expected) < TOLERANCE


@pytest.mark.slow
def test_shared_tracking_gathers_the_bits_of_a_forward_pass_of_its_own():
    shared, fresh = World(ADM), World(ADM, "fresh")
    for world in (shared, fresh):
        world.gather([(0, 1)])
    query = World(ADM).roll_out((0, 1))
    fresh.roles.fake_score.track(query, 1.0)
    found, expected = (gradients(each.networks["fake_score"]) for each in (shared, fresh))
    assert same_bits(found, expected)
    for role in ("generator", "discriminator"):
        assert same_bits(gradients(shared.networks[role]), gradients(fresh.networks[role]))


PLAIN_GAN = Dmd2Objective(adversary=AdversarialTerm(loss=SOFTPLUS))


@pytest.mark.parametrize("objective", [AdmObjective(delta=0.3), PLAIN_GAN], ids=["adm", "gan"])
@pytest.mark.slow
def test_heads_that_see_the_same_samples_again_learn_to_tell_them_apart(objective):
    world = World(objective, "fresh", lr=1e-2)
    losses: list[float] = []
    query = world.roll_out((0, 1))
    query = replace(query, sigma=torch.full_like(query.sigma, 0.6))
    teacher = world.roles.teacher.denoise(query, negative_text())
    fake = world.roles.fake_score.predict(query)
    if isinstance(objective, Dmd2Objective):
        signal = world.roles.fake_score.signal(query, teacher, 1.0)
    for update in range(60):
        key = key_of(update)
        again = replace(query, key=key)
        if isinstance(objective, AdmObjective):
            own = replace(teacher, key=key), replace(fake, key=key)
            found = world.discriminator.compare_steps(again, *own, 1.0)
        else:
            given = data_of((0, 1)), replace(signal, key=key)
            found = world.discriminator.compare_data(again, *given, 1.0)
        losses.append(found.metrics["discriminator"])
        world.discriminator.gradient_report(update)
        world.discriminator.step(update)
    assert losses[-1] < 0.5 * losses[0]
    assert found.metrics["discriminator_accuracy"] > 0.9
    assert found.metrics["logit_gap"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", [True, "selective", "offload"])
def test_features_made_again_teach_the_same_bits(mode):
    plain, again = World(ADM), World(ADM)
    prepare_network(again.backbone, ComputeSettings(checkpointing=mode))
    for world in (plain, again):
        world.gather([(0, 1)])
    for role, network in plain.networks.items():
        assert same_bits(gradients(network), gradients(again.networks[role]))


@pytest.mark.slow
@pytest.mark.parametrize("tracking", ["shared", "fresh"])
@pytest.mark.parametrize("mode", [True, "selective", "offload"])
def test_a_fake_score_that_is_made_again_completes_the_same_bits(mode, tracking):
    plain, again = World(ADM, tracking), World(ADM, tracking)
    prepare_network(again.roles.networks["fake_score"], ComputeSettings(checkpointing=mode))
    for world in (plain, again):
        world.gather([(0, 1)])
    assert same_bits(*(gradients(world.networks["generator"]) for world in (plain, again)))


class TestState:
    @pytest.mark.slow
    def test_loaded_and_restored_heads_go_on_bit_for_bit(self, tmp_path: Path):
        world, loaded, restored, fresh = (World(ADM) for _ in range(4))
        world.gather([(0, 1)])
        world.step()
        for name in ("generator", "fake_score"):
            getattr(world.roles, name).save(str(tmp_path))
        digests = world.discriminator.save(str(tmp_path))
        assert {Path(name).parts[0] for name in digests} == {"discriminator"}
        snapshot = world.discriminator.snapshot()
        for other in (loaded, restored):
            for name in ("generator", "fake_score"):
                getattr(other.roles, name).load(str(tmp_path))
        assert loaded.discriminator.load(str(tmp_path)) == 1
        assert restored.discriminator.restore(snapshot) == 1
        for each in (world, loaded, restored):
            each.gather([(2, 3)], iteration=1)
            each.step(1)
        assert_moves(weights(world.heads), weights(fresh.heads))
        for other in (loaded, restored):
            for role, network in world.networks.items():
                assert same_bits(weights(network), weights(other.networks[role]))

    def test_the_copy_of_the_teacher_is_not_saved(self, tmp_path: Path):
        world = World(ADM)
        world.discriminator.save(str(tmp_path))
        saved = load_role(str(tmp_path), "discriminator")
        assert set(saved.weights) == {name for name, _ in world.heads.named_parameters()}


class TestRefusals:
    def test_inputs_of_another_query_and_calls_in_another_order(self):
        world = World(ADM)
        query = world.roll_out((0, 1))
        other = world.roll_out((2, 3), index=1)
        teacher = world.roles.teacher.denoise(query, negative_text())
        fake = world.roles.fake_score.predict(query)
        compare = world.discriminator.compare_steps
        with pytest.raises(StaleCallError, match="input for"):
            compare(query, world.roles.teacher.denoise(other, negative_text()), fake, 1.0)
        stale = [replace(each, key=key_of(3)) for each in (query, teacher, fake)]
        with pytest.raises(StaleCallError, match="iteration 3"):
            compare(*stale, 1.0)
        signal = compare(query, teacher, fake, 1.0)
        with pytest.raises(StaleCallError, match="predict first"):
            world.roles.fake_score.complete(replace(signal, key=other.key))
        done = world.roles.fake_score.complete(signal)
        with pytest.raises(StaleCallError, match="no cotangent"):
            world.roles.fake_score.complete(done)

    def test_a_sample_that_is_not_a_number_is_refused_or_reaches_every_gradient(self):
        careful, run = World(ADM), World(ADM, raises=False)
        for world in (careful, run):
            query = world.roll_out((0, 1))
            teacher = world.roles.teacher.denoise(query, negative_text())
            fake = world.roles.fake_score.predict(query)
            query = poisoned(query)
            if world is careful:
                with pytest.raises(NonFiniteError, match="the generator's x0"):
                    world.discriminator.compare_steps(query, teacher, fake, 1.0)
                assert not gradients(world.heads)
                continue
            signal = world.discriminator.compare_steps(query, teacher, fake, 1.0)
            assert signal.fake_cotangent is not None
            assert signal.grad_x0.isnan().all()
            assert signal.fake_cotangent.isnan().all()
            assert not world.discriminator.gradient_report(0).finite
            assert world.discriminator.diagnose(0).fault is not None


class Misnumbered(WanVelocity):
    """A denoiser that says of its tokens what is not so."""

    patch_size = (1, 1, 1)


class TestHeadsAndFeatures:
    def test_heads_are_drawn_by_the_seed_alone(self):
        state = torch.get_rng_state()
        first, again, other = (build_heads([6, 4], 32, 2, seed) for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), state)
        assert same_bits(weights(first), weights(again))
        moved = weights(other)["heads.0.layers.0.weight"]
        assert not torch.equal(weights(first)["heads.0.layers.0.weight"], moved)
        layer = first.heads[0].layers[0]
        bound = (6 * 27) ** -0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound

    def test_parameters_are_counted(self):
        (head,) = build_heads([6], 32, 2, 0).heads
        assert num_head_parameters(6, 32, 2) == sum(value.numel() for value in head.parameters())

    def test_maps_lie_as_the_latents_do(self):
        network = tiny_velocity(1)
        x_t = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
        sigma, text = torch.tensor([0.3, 0.6]), text_batch((0, 1)).text
        seen: list[Tensor] = []
        handle = network.blocks[1].register_forward_hook(lambda *given: seen.append(given[2]))
        (found,) = features_of(network, (2,), x_t, sigma, text)
        handle.remove()
        # A token a frame and two rows and columns; frames are the slowest.
        assert found.shape == (2, WIDTH, 3, 2, 2)
        torch.testing.assert_close(found[1, :, 2, 0, 1], seen[0][1, 9])
        assert not network.blocks[1]._forward_hooks

    def test_a_layer_whose_output_is_no_map_is_refused(self):
        network = Misnumbered(tiny_velocity(1).transformer)
        x_t, text = torch.zeros(1, *LATENT_SHAPE), text_batch((0,)).text
        with pytest.raises(ShapeError, match="48, width"):
            features_of(network, (1,), x_t, torch.tensor([0.5]), text)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: full_tensor(value.detach()).clone() for name, value in tensors.items()}


def all_gradients(world: World) -> dict[str, Tensor]:
    return {
        f"{role}/{name}": value
        for role, network in world.networks.items()
        for name, value in whole(gradients(network)).items()
    }


def gathered(objective, batches) -> World:
    world = World(objective)
    world.gather(batches)
    return world


def on_two(rank: int, size: int, folder: Path) -> dict[str, Any]:
    brought: dict[str, Any] = {}
    for name, objective in (("adm", ADM), ("gan", GAN)):
        world = gathered(objective, [(0, 1), (2, 3)])
        assert is_sharded(world.heads)
        brought[name] = all_gradients(world)
        world.step()
        brought[f"{name} heads"] = whole(parameters_of(world.heads))
        world.discriminator.save(str(folder / name))
    return brought


@pytest.mark.slow
def test_two_ranks_gather_the_gradients_of_one_and_save_what_one_goes_on_from(tmp_path: Path):
    (brought, _) = on_ranks(2, on_two, tmp_path, tmp_path)
    for name, objective in (("adm", ADM), ("gan", GAN)):
        expected = all_gradients(gathered(objective, [(0, 1), (2, 3)]))
        assert_moves(expected, all_gradients(gathered(objective, [(0,), (2,)])), TOLERANCE)
        assert relative_error(brought[name], expected) < TOLERANCE
        fresh = World(objective)
        assert fresh.discriminator.load(str(tmp_path / name)) == 1
        assert same_bits(weights(fresh.heads), brought[f"{name} heads"])
