"""A plan's arithmetic by hand, its search by trying everything, and what it refuses."""

import json
import re
import shlex
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

from cluster.errors import StorageError
from cluster.schedule.program import Home, Team
from cluster.schedule.schedule import order_calls
from cluster.schedule.simulate import Costs, simulate
from pipelines.cli import app
from pipelines.config.recipe import load_recipe
from pipelines.config.roles import DISCRIMINATOR, FAKE_SCORE, GENERATOR, TEACHER
from pipelines.distillation.pools import pools_of
from pipelines.planning.fitting import fastest_fit
from pipelines.planning.hardware import GB, Hardware
from pipelines.planning.layouts import fastest_map, fused_layout, map_layout
from pipelines.planning.memory import (
    discriminator_memory,
    fake_score_memory,
    generator_memory,
    teacher_memory,
)
from pipelines.planning.plan import best_layouts, make_plan
from pipelines.planning.pool_maps import PoolMap, fused_map, map_fits, map_memory
from pipelines.planning.savings import fitting_savings, run_fits, savings
from pipelines.planning.search import PoolSplit, find_batch, find_best, predict, rank_memory
from pipelines.planning.stage_times import StageTimes, measured, modelled, rescaled, update_s
from pipelines.planning.stage_work import units_by_stage
from pipelines.planning.traffic import exchanged_bytes, gathered_bytes, result_bytes
from pipelines.planning.workload import Workload
from pipelines.stages.kind import IterationKind
from sgmd_core.buckets import LatentBuckets
from sgmd_core.errors import ConfigError
from sgmd_core.objectives import GradientPath
from sgmd_core.types import Looks
from tests.helpers.kept_graphs import graphs_kept
from tests.helpers.runs import start_run
from workers.models.wan_arithmetic import RELEASED_SHAPES

LATENTS = (16, 21, 60, 104)
"""480x832, 81 frames."""
SMALL = Workload(RELEASED_SHAPES["1.3b"], LATENTS, text_length=512, batch_size=24)
LARGE = replace(SMALL, shape=RELEASED_SHAPES["14b"])
FREE = Hardware(wire_bandwidth=1e15, wire_latency_s=0.0, call_s=0.0, answer_s=0.0)
"""Where nothing but the stages takes time."""
ADAPTED = [
    *(f"{role}.lora.rank=64" for role in (GENERATOR, FAKE_SCORE)),
    *(f"{role}.compute.weights=bf16" for role in (GENERATOR, TEACHER, FAKE_SCORE)),
]


def sgmd(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


_RECORD = {"iteration": 0, "losses": {}, "grad_norms": {}, "data_wait_s": 0.0, "samples_seen": 0}


def test_moments_in_8_bits_are_counted_in_state_and_saves():
    roles = frozenset((GENERATOR, FAKE_SCORE))
    for make in (generator_memory, fake_score_memory):
        whole, coded = (
            make(replace(SMALL, moments_in_8_bits=which), 1, 1, 1) for which in (frozenset(), roles)
        )
        parameters = SMALL.shape.num_parameters
        for saved in (whole.state - coded.state, whole.saves - coded.saves):
            assert saved == pytest.approx((3 - 2 / 256) * parameters)
    assert coded.graphs == whole.graphs
    config = load_recipe("wan21-1.3b", ["generator.optimizer.moment_bits=8"])
    assert Workload.of(config, "1.3b").moments_in_8_bits == {GENERATOR}


class TestSeveralSizes:
    SHAPES = ((16, 9, 60, 104), LATENTS, (16, 9, 104, 60))
    MIXED = replace(SMALL, buckets=LatentBuckets(SHAPES, (3.0, 1.0, 4.0)))

    def test_memory_is_that_of_the_largest_and_seconds_are_the_mean_by_weight(self):
        for make in (generator_memory, fake_score_memory):
            assert make(self.MIXED, 2, 1, 1) == make(SMALL, 2, 1, 1)
        hardware = Hardware()
        alone = [
            modelled(replace(SMALL, latent_shape=shape), hardware).seconds for shape in self.SHAPES
        ]
        mixed = modelled(self.MIXED, hardware).seconds
        for name, seconds in mixed.items():
            parts = [one[name] for one in alone]
            assert seconds == pytest.approx((3 * parts[0] + parts[1] + 4 * parts[2]) / 8)
            assert seconds < 0.7 * parts[1] or not parts[1]

    def test_what_is_sent_is_the_mean_as_well(self):
        sent, largest = result_bytes(self.MIXED), result_bytes(SMALL)
        text = 4 * SMALL.text_length * SMALL.shape.text_width
        rollout = (GENERATOR, "rollout")
        frames = (3 * 9 + 21 + 4 * 9) / 8
        assert sent[rollout] - text == pytest.approx((largest[rollout] - text) * frames / 21)

    @pytest.mark.slow
    def test_a_recipe_is_planned_at_its_largest_bucket_and_says_so(self):
        sizes = (
            "[{num_frames: 33, height: 832, width: 480, weight: 3}, "
            "{num_frames: 81, height: 480, width: 832}]"
        )
        done = sgmd(
            "plan", "wan21-1.3b", "--gpus", 8, "--model", "1.3b", f"video.buckets={sizes}", "--json"
        )
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert told["workload"]["tokens"] == 32760
        assert any("memory is that of the largest, 480x832x81" in line for line in told["advice"])
        plain = sgmd("plan", "wan21-1.3b", "--gpus", 8, "--model", "1.3b", "--json")
        assert told["iteration_s"] < 0.6 * json.loads(plain.stdout)["iteration_s"]

    def test_seconds_of_a_run_of_several_sizes_are_those_of_their_mean(self, tmp_path):
        sizes = (
            "[{num_frames: 13, height: 32, width: 32}, "
            "{num_frames: 13, height: 64, width: 64, weight: 3}]"
        )
        run = start_run(tmp_path / "run", 0, overrides=(f"video.buckets={sizes}",))
        config = load_recipe(str(run / "config.yaml"))
        work = Workload.of(config)
        rate, lines = 1e9, []
        flops = {one.latent_shape[2]: one.forward_flops for _, one in work.sizes}
        for iteration in range(4):
            bucket = config.video.buckets[iteration % 2]
            flops_there = flops[bucket.height // 8]
            seconds = {
                ".".join(name): passes * flops_there * config.batch.size / rate
                for name, passes in units_by_stage(dict(work.sizes)[0.25]).items()
                if passes
            }
            lines.append(
                {
                    **_RECORD,
                    "iteration": iteration,
                    "bucket": bucket.label,
                    "seconds": {"total": 1.0, **seconds},
                }
            )
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = measured(run, work).seconds[(TEACHER, "denoise")]
        passes = units_by_stage(work)[TEACHER, "denoise"]
        mean = 0.25 * flops[4] + 0.75 * flops[8]
        assert found == pytest.approx(passes * mean / rate, rel=1e-6)


class TestSamplesOverSeveralRanks:
    TOGETHER = ("generator", "fake_score", "teacher")

    def work(self, number: int, size: int = 8) -> Workload:
        roles = tuple((role, number) for role in self.TOGETHER)
        return replace(SMALL, batch_size=size, ulysses=roles if number > 1 else ())

    def test_a_rank_has_its_part_of_the_activations_and_the_same_state(self):
        one = PoolMap({"all": 8}, dict.fromkeys(self.TOGETHER, ("all",)), 1)
        whole = map_memory(self.work(1), one)["all"]
        # Eight samples: one per rank, or two of each two ranks: as many bytes.
        assert map_memory(self.work(2), one)["all"] == whole
        # Fewer samples than ranks leave ranks idle, unless they work together.
        fewer = replace(one, micro_batches=4)
        idle = map_memory(self.work(1), fewer)["all"]
        shared = map_memory(self.work(4), fewer)["all"]
        assert (idle.graphs, idle.working) == (whole.graphs, whole.working)
        assert shared.graphs == pytest.approx(whole.graphs / 4)
        assert shared.working == pytest.approx(whole.working / 4)
        assert (shared.state, shared.gathered) == (whole.state, whole.gathered)

    @pytest.mark.slow
    def test_a_plan_fits_smaller_gpus_with_it_and_says_so(self):
        hardware = Hardware(memory_gb=80)
        works = self.work(1, 16), self.work(4, 16)
        plans = [make_plan(work, modelled(work, hardware), hardware, 8) for work in works]
        least = [
            max(pool.memory.graphs for pool in plan.layouts[0].pools.values()) for plan in plans
        ]
        assert least[1] <= least[0] / 3
        assert plans[1].best.iteration_s == pytest.approx(plans[0].best.iteration_s, rel=0.1)
        assert plans[1].to_json()["workload"]["ulysses"] == dict(works[1].ulysses)
        recipe = ["plan", "wan21-1.3b", "--gpus", 8, "--model", "1.3b"]
        settings = ["topology.pools.learn.ranks=4", "batch.micro_batches=4"]
        done = sgmd(*recipe, "generator.compute.ulysses=4", *settings)
        assert done.exit_code == 0, done.output
        words = " ".join(done.output.split())
        assert "generator.compute.ulysses 4: each sample lies on 4 ranks" in words
        assert "the seconds contain the exchange of tokens for heads" in words

    @pytest.mark.parametrize(("number", "words"), [(5, "12 heads"), (24, "12 heads")])
    def test_heads_that_do_not_divide_are_refused(self, number, words):
        settings = [f"generator.compute.ulysses={number}", f"topology.fused.ranks={number}"]
        batch = "batch={size: 48, micro_batches: 2}"
        config = load_recipe("wan21-1.3b", [*settings, "topology.mode=fused", batch])
        with pytest.raises(ConfigError, match=words):
            Workload.of(config, "1.3b")

    def test_an_exchange_takes_the_time_of_its_bytes(self):
        work, hardware = self.work(4, 2), Hardware(memory_gb=80)
        times = modelled(work, hardware)
        seconds = {
            speed: fused_layout(
                work, times, replace(hardware, gather_bandwidth=speed, ranks_per_machine=8), 8
            ).iteration_s
            for speed in (20e9, 200e9, 1e30)
        }
        # Each of two groups has a sample; three of four parts come from others.
        exchanged = sum(exchanged_bytes(work).values()) * 3 / 4
        assert exchanged / 20e9 > 0.01 * seconds[1e30]
        for speed in (20e9, 200e9):
            spent = seconds[speed] - seconds[1e30]
            assert spent == pytest.approx(exchanged / speed, rel=0.01)

    def test_an_exchange_that_was_measured_is_not_added_again(self):
        work, hardware = self.work(4, 2), Hardware(memory_gb=80, ranks_per_machine=8)
        plain = modelled(work, hardware)
        slow, free = (replace(hardware, gather_bandwidth=speed) for speed in (20e9, 1e30))

        def iteration_s(times, machine=slow):
            return fused_layout(work, times, machine, 8).iteration_s

        added = iteration_s(plain) - iteration_s(plain, free)
        assert added > 0.01 * iteration_s(plain)
        same = replace(plain, ulysses=work.ulysses)
        assert iteration_s(same) == pytest.approx(iteration_s(plain, free), rel=1e-9)
        # Two ranks exchange 1/2 of a sample's bytes where four exchange 3/4: the rest is added.
        fewer = replace(plain, ulysses=self.work(2, 2).ulysses)
        assert iteration_s(fewer) - iteration_s(same) == pytest.approx(added / 3, rel=0.01)

    @pytest.mark.slow
    def test_the_exchange_of_the_measured_run_gives_way_to_that_of_the_plan(self):
        hardware = Hardware(memory_gb=80, ranks_per_machine=8, gather_bandwidth=20e9)
        plain, four = modelled(self.work(4), hardware), self.work(4)
        exchange_s = {
            name: hardware.gather_s(4 * parts, 4) for name, parts in exchanged_bytes(four).items()
        }
        # Seconds as a run with four ranks a sample has them.
        seconds = {name: own + exchange_s[name] for name, own in plain.seconds.items()}
        measured_run = replace(plain, seconds=seconds, ulysses=four.ulysses)
        for number in (1, 2, 4, 12):
            work, gpus = self.work(number), 24 if number == 12 else 8
            known = fused_layout(work, plain, hardware, gpus).iteration_s
            taken = replace(measured_run, ulysses=())
            assert fused_layout(work, taken, hardware, gpus).iteration_s > 1.01 * known
            found = fused_layout(work, measured_run, hardware, gpus).iteration_s
            assert found == pytest.approx(known, rel=1e-9)

    def test_a_bandwidth_that_the_measured_times_contradict_is_refused(self):
        work, slow = self.work(4), Hardware(memory_gb=80, gather_bandwidth=1e6)
        times = replace(modelled(work, slow), ulysses=work.ulysses)
        with pytest.raises(ConfigError, match="--node-bandwidth"):
            fused_layout(work, times, slow, 8)

    def test_fewer_gpus_than_ranks_of_a_sample_are_refused(self):
        hardware, work = Hardware(memory_gb=80), self.work(4)
        with pytest.raises(ConfigError, match="4 ranks work on each sample together"):
            make_plan(work, modelled(work, hardware), hardware, 2)


class TestWork:
    def test_an_iteration_takes_fourteen_passes_and_fewer_without_checkpointing(self):
        # A backward pass to the input costs 1.70 forward passes, attention's share and one.
        fake_score = 1 + 1.6984 + 2
        assert sum(units_by_stage(SMALL).values()) == pytest.approx(
            5.5 + 2 + fake_score + 2, abs=1e-3
        )
        kept = replace(SMALL, checkpointing=frozenset())
        assert sum(units_by_stage(kept).values()) == pytest.approx(4.5 + 2 + fake_score, abs=1e-3)

    def test_one_walk_for_both_gradients_saves_a_forward_pass_and_only_with_checkpointing(self):
        for work, saved in ((SMALL, 1), (replace(SMALL, checkpointing=frozenset()), 0)):
            joint = units_by_stage(work.walking(joint=True))
            assert joint[FAKE_SCORE, "track"] == 0
            assert sum(joint.values()) == pytest.approx(sum(units_by_stage(work).values()) - saved)

    @pytest.mark.parametrize(
        "settings",
        [
            ("fake_score.tracking=fresh",),
            ("objective.method=dmd",),
            ("fake_score.compute.checkpointing=false",),
            ("fake_score.compute.compile=true",),
        ],
    )
    def test_an_iteration_has_another_walk_only_where_a_recipe_may_ask_for_it(self, settings):
        work = Workload.of(load_recipe("wan21-1.3b"), "1.3b")
        other = work.other_walk
        assert other == work.walking(joint=True)
        assert other is not None
        assert other.other_walk == work
        assert Workload.of(load_recipe("wan21-1.3b", settings), "1.3b").other_walk is None
        # The family of two experts does not walk so.
        assert Workload.of(load_recipe("wan22-a14b"), "a14b").other_walk is None

    def test_one_walk_for_both_gradients_gathers_the_weights_once_less(self):
        names = [(FAKE_SCORE, stage) for stage in ("signal", "track")]
        apart, joint = (SMALL.walking(joint=one) for one in (False, True))
        # Forward and back twice, and the sum of the gradients in float32.
        weights, sums = (size * SMALL.shape.num_parameters for size in (2, 4))
        for work, times in ((apart, 3), (joint, 2)):
            moved = sum(gathered_bytes(work)[name] for name in names)
            assert moved == times * weights + sums
        assert gathered_bytes(joint)[names[1]] == 0

    def test_fresh_tracking_samples_and_predicts_again(self):
        extra = units_by_stage(replace(SMALL, kind=IterationKind(1)))
        assert extra[GENERATOR, "sample"] == 2.5
        assert extra[FAKE_SCORE, "track"] == pytest.approx(1 + 3, abs=1e-4)

    def test_a_sample_of_the_released_training_has_32760_tokens_and_283_tflop_a_pass(self):
        assert SMALL.shape.num_tokens(LATENTS) == 32760
        assert SMALL.forward_flops == pytest.approx(283e12, rel=0.01)
        # 14B: 2 operations a token and weight of its layers, keys and values of the text left out,
        # and attention.
        dense = 2 * 40 * (351e6 - 2 * 5120**2) * 32760
        assert LARGE.forward_flops == pytest.approx(dense + 4 * 40 * 32760**2 * 5120, rel=0.03)

    def test_a_pass_hands_on_less_than_thirty_megabytes_a_sample(self):
        assert max(result_bytes(SMALL).values()) < 30e6

    def test_a_recipe_says_what_there_is_to_do(self):
        config = load_recipe("wan21-1.3b", ["fake_score.tracking=fresh"])
        work = Workload.of(config, "1.3b")
        learners = frozenset({GENERATOR, FAKE_SCORE})
        assert work == replace(
            SMALL,
            batch_size=16,
            kind=IterationKind(1),
            checkpointing=learners,
            teacher_weights="bf16",
        )
        settings = ["teacher.batched_guidance=false", "generator.compute.precision=fp32"]
        other = Workload.of(load_recipe("wan21-1.3b", settings), "1.3b")
        assert other.in_turn
        assert other.bf16 == {TEACHER, FAKE_SCORE}

    def test_a_shipped_model_is_read_from_its_folder(self):
        work = Workload.of(load_recipe("tiny"))
        assert work.shape.num_layers < 10
        assert work.shape.num_tokens(work.latent_shape) == 64

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("recipe", "model", "billions", "latents", "tokens"),
        [
            ("wan21-1.3b", "1.3b", 1.42, (16, 21, 60, 104), 32760),
            ("wan21-14b", "14b", 14.29, (16, 21, 60, 104), 32760),
            ("wan22-a14b", "a14b", 28.58, (16, 21, 60, 104), 32760),
            ("wan22-5b", "5b", 5.0, (48, 31, 44, 80), 27280),
            ("ltx-2b", "ltx-2b", 1.92, (128, 13, 16, 22), 4576),
        ],
    )
    def test_a_shipped_recipe_is_planned_at_the_released_size_and_its_own_pools_fit(
        self, recipe, model, billions, latents, tokens
    ):
        config = load_recipe(recipe)
        work = Workload.of(config, model)
        assert work.shape.num_parameters / 1e9 == pytest.approx(billions, rel=0.01)
        assert work.latent_shape == latents
        assert work.shape.num_tokens(latents) == tokens
        pools = config.topology.pools
        gpus = sum(pool.ranks for pool in pools.values())
        plan = make_plan(work, modelled(work, Hardware()), Hardware(), gpus)
        (layout,) = (each for each in plan.layouts if each.name == "map")
        assert layout.fits
        assert layout.num_gpus == gpus

    def test_three_roles_over_one_base_fit_a_small_gpu(self):
        config = load_recipe("wan21-1.3b-lora")
        work, card = Workload.of(config, "1.3b"), Hardware(memory_gb=24.0)
        (layout,) = make_plan(work, modelled(work, card), card, 1).layouts
        assert layout.fits

    def test_another_family_is_planned_by_its_own_sizes(self):
        settings = ["video={num_frames: 161, height: 512, width: 704, fps: 25}"]
        work = Workload.of(load_recipe("wan21-1.3b", settings), "ltx-2b")
        # 28 layers of width 2048: 14 d^2 products a token and layer, 28 d^2 weights.
        assert work.shape.num_parameters / 1e9 == pytest.approx(1.92, rel=0.01)
        assert work.latent_shape == (128, 21, 16, 22)
        assert work.shape.num_tokens(work.latent_shape) == 21 * 16 * 22

    def test_a_clip_that_does_not_fit_and_an_unknown_model_are_refused(self):
        config = load_recipe("wan21-1.3b", ["video.height=484"])
        for model, words in (("1.3b", "484x832"), ("7b", "a model called 7b")):
            with pytest.raises(ConfigError, match=words):
                Workload.of(config, model)


def test_savings_of_an_adversarial_run_take_nothing_back_and_reach_the_discriminator():
    options = [
        "objective.method=adm",
        "discriminator.compute.precision=fp32",
        "discriminator.compute.checkpointing=false",
        "generator.compute.precision=fp32",
    ]
    work = Workload.of(load_recipe("wan21-1.3b", options), "1.3b")
    named = [name for saving in savings(work) for name in saving.settings]
    assert "discriminator.compute.precision=bf16" in named
    assert "discriminator.compute.checkpointing=true" in named
    saved = replace(work, bf16=frozenset({DISCRIMINATOR}))
    for saving in savings(saved):
        assert DISCRIMINATOR in saving.apply(saved).bf16
    without = replace(work, heads=None)
    assert not any("discriminator" in key for each in savings(without) for key in each.settings)


class TestMemory:
    def test_state_is_twelve_bytes_a_parameter_and_four_for_a_momentum_and_an_average(self):
        parameters = LARGE.shape.num_parameters
        assert fake_score_memory(LARGE, 1, 1, 1).state == 12 * parameters
        assert generator_memory(LARGE, 8, 1, 1).state == 16 * parameters / 8
        without = replace(LARGE, averages=False)
        assert generator_memory(without, 1, 1, 1).state == 12 * parameters
        with_momentum = replace(LARGE, momentum=frozenset({FAKE_SCORE}))
        assert fake_score_memory(with_momentum, 1, 1, 1).state == 16 * parameters
        assert teacher_memory(LARGE, 1, 1).state == 4 * parameters

    def test_what_lies_in_main_memory_leaves_the_gpu_and_takes_time_of_the_update(self):
        config = load_recipe(
            "wan-1.3b", ["generator.optimizer.moments=cpu", "generator.ema_device=cpu"]
        )
        offloaded, plain = Workload.of(config, "14b"), Workload.of(load_recipe("wan-1.3b"), "14b")
        parameters = plain.shape.num_parameters
        memory = generator_memory(offloaded, 4, 1, 1)
        assert memory.state == 8 * parameters / 4
        assert memory.host == 8 * parameters / 4
        assert memory.total == generator_memory(plain, 4, 1, 1).total - memory.host
        assert fake_score_memory(offloaded, 4, 1, 1) == fake_score_memory(plain, 4, 1, 1)
        slower, faster = (update_s(one, Hardware(), GENERATOR, 4) for one in (offloaded, plain))
        assert slower > faster

    def test_a_save_holds_weights_moments_and_average_once_more_in_main_memory(self):
        parameters = LARGE.shape.num_parameters
        assert generator_memory(LARGE, 8, 1, 1).saves == 12 * parameters / 8
        assert fake_score_memory(LARGE, 8, 1, 1).saves == 8 * parameters / 8
        assert teacher_memory(LARGE, 1, 1).saves == 0
        adapted = Workload.of(load_recipe("wan21-1.3b-lora"), "1.3b")
        trained = dict(adapted.adapters)[FAKE_SCORE]
        assert fake_score_memory(adapted, 1, 1, 1).saves == 8 * trained
        memory = generator_memory(LARGE, 1, 1, 1)
        room = memory.saves / GB
        on = Hardware(memory_gb=1e6, host_memory_gb=room)
        assert memory.fits(on)
        assert not memory.fits(replace(on, host_memory_gb=0.99 * room))

    def test_a_measured_lag_holds_the_fake_scores_state_once_more_in_main_memory(self):
        measured = replace(LARGE, measures_lag=True)
        more = fake_score_memory(measured, 8, 1, 1).host - fake_score_memory(LARGE, 8, 1, 1).host
        assert more == 8 * LARGE.shape.num_parameters / 8
        assert generator_memory(measured, 8, 1, 1) == generator_memory(LARGE, 8, 1, 1)
        assert Workload.of(load_recipe("wan21-1.3b", ["lag.every=100"]), "1.3b").measures_lag

    def test_a_prediction_that_a_discriminator_compares_waits_with_its_graph(self):
        adm, plain = (
            Workload.of(load_recipe("wan21-1.3b", [f"objective.method={method}"]), "1.3b")
            for method in ("adm", "sgmd")
        )
        for work, waiting in ((adm, 2), (plain, 1)):
            graphs = {
                depth: rank_memory(work, PoolSplit(1, 1, 1, 4, depth))[FAKE_SCORE].graphs
                for depth in (1, 3)
            }
            assert graphs[3] == waiting * graphs[1]

    def test_with_checkpointing_a_graph_is_the_input_of_every_layer(self):
        graph = generator_memory(SMALL, 1, 1, 1).graphs
        layers = 30 * 2 * 32760 * 1536
        assert layers < graph < 1.3 * layers
        assert generator_memory(SMALL, 1, 1, 3).graphs == 3 * graph
        kept_whole = generator_memory(replace(SMALL, checkpointing=frozenset()), 1, 1, 1).graphs
        assert kept_whole > 30 * graph

    # Of two experts of its size a sample passes one.
    @pytest.mark.parametrize(("recipe", "model"), [("wan21-14b", "14b"), ("wan22-a14b", "a14b")])
    def test_modes_of_checkpointing_trade_memory_of_the_gpu_for_time_and_main_memory(
        self, recipe, model
    ):
        found = {}
        for mode in ("true", "selective", "offload"):
            options = [f"{role}.compute.checkpointing={mode}" for role in (GENERATOR, FAKE_SCORE)]
            work = Workload.of(load_recipe(recipe, options), model)
            seconds = modelled(work, Hardware()).seconds
            found[mode] = generator_memory(work, 4, 1, 1), seconds[GENERATOR, "learn"]
        again, selective, offload = (memory for memory, _ in found.values())
        streams = 40 * 2 * 32760 * 5120
        assert selective.graphs == again.graphs + streams
        assert offload.graphs == again.graphs - streams > 0
        assert (again.host, selective.host, offload.host) == (0, 0, streams)
        again_s, selective_s, offload_s = (seconds for _, seconds in found.values())
        # Self-attention is half of the operations at this size.
        assert 0.8 * again_s < selective_s < 0.9 * again_s
        assert again_s < offload_s < 1.1 * again_s

    def test_weights_are_gathered_in_the_type_of_products_and_gradients_summed_in_float32(self):
        exact = replace(LARGE, bf16=frozenset())
        parameters = LARGE.shape.num_parameters
        wide, narrow = (gathered_bytes(one) for one in (exact, LARGE))
        assert narrow[TEACHER, "denoise"] == wide[TEACHER, "denoise"] / 2 == 2 * parameters
        assert wide[GENERATOR, "learn"] == 8 * parameters
        assert narrow[GENERATOR, "learn"] == 6 * parameters
        assert teacher_memory(LARGE, 8, 1).gathered == teacher_memory(exact, 8, 1).gathered / 2
        learners = (generator_memory(one, 8, 1, 1).gathered for one in (LARGE, exact))
        assert next(learners) < next(learners)

    def test_a_teacher_is_charged_for_its_type_and_for_being_whole(self):
        parameters = LARGE.shape.num_parameters
        found = {}
        for options in ("weights=fp32", "weights=bf16", "weights=fp8 teacher.sharded=false"):
            settings = f"teacher.compute.{options}".split()
            work = Workload.of(load_recipe("wan21-1.3b", settings), "14b")
            found[work.teacher_weights] = work, teacher_memory(work, 4, 1)
        assert found["fp32"][1].state == parameters
        assert found["bf16"][1].state == parameters / 2
        work, whole = found["fp8"]
        assert parameters < whole.state < 1.1 * parameters
        assert whole.gathered == gathered_bytes(work)[TEACHER, "denoise"] == 0
        through = replace(work, kind=replace(work.kind, path=GradientPath.BOTH_SCORES))
        assert teacher_memory(through, 4, 1).state == whole.state + 2 * parameters

    def test_samples_off_the_trajectory_take_a_second_graph(self):
        off = replace(SMALL, kind=IterationKind(looks=Looks(off_trajectory=True)))
        assert generator_memory(off, 1, 1, 2).graphs == 2 * generator_memory(SMALL, 1, 1, 2).graphs
        assert result_bytes(off)[GENERATOR, "rollout"] > result_bytes(SMALL)[GENERATOR, "rollout"]

    def test_a_discriminator_is_charged_for_its_copy_its_heads_and_their_features(self):
        work = Workload.of(load_recipe("tiny-adm"))
        assert work.heads is not None
        memory = discriminator_memory(work, 1, 2)
        copy, heads = work.shape.num_parameters, work.heads.num_parameters
        assert memory.state == 4 * copy + 3 * 4 * heads
        features = 4 * 2 * 2 * work.shape.num_tokens(work.latent_shape) * work.shape.width
        less = replace(work, kind=replace(work.kind, compared_states=1))
        assert memory.working - discriminator_memory(less, 1, 2).working == 2 * features / 2
        half = discriminator_memory(work, 2, 2)
        assert half.state == memory.state / 2
        fused = fused_map(work, 1)
        without = replace(work, heads=None)
        assert map_memory(work, fused)["fused"].state == (
            map_memory(without, fused_map(without, 1))["fused"].state + memory.state
        )

    def test_a_fake_score_that_starts_anew_keeps_its_first_weights_in_main_memory(self):
        options = ["objective.method=phased_dmd", "fake_score.tracking=fresh"]
        phased, plain = (
            Workload.of(load_recipe("wan21-1.3b", each), "14b") for each in (options, [])
        )
        kept = fake_score_memory(phased, 4, 1, 1).host - fake_score_memory(plain, 4, 1, 1).host
        assert kept == 4 * plain.shape.num_parameters / 4
        assert generator_memory(phased, 4, 1, 1).host == generator_memory(plain, 4, 1, 1).host

    def test_guidance_in_turn_halves_what_a_teacher_works_on(self):
        batched, in_turn = (teacher_memory(replace(SMALL, in_turn=t), 1, 1) for t in (False, True))
        assert batched.working == 2 * in_turn.working

    def test_a_map_is_charged_for_the_graphs_that_its_schedule_keeps(self):
        one = PoolMap(
            {"learn": 4, "score": 4},
            {GENERATOR: ("learn",), TEACHER: ("learn", "score"), FAKE_SCORE: ("score",)},
            micro_batches=6,
            depth=3,
        )
        homes = Home("learn", 4), Home("score", 4)
        teams = {
            GENERATOR: Team.on(homes[0]),
            TEACHER: Team.on(*homes),
            FAKE_SCORE: Team.on(homes[1]),
        }
        calls = order_calls(
            SMALL.program,
            teams,
            6,
            3,
            samples_per_micro_batch=4,
            stage_seconds=modelled(SMALL, Hardware()).seconds,
        )
        kept = graphs_kept(calls, SMALL.program)
        memory = map_memory(SMALL, one)
        graph = generator_memory(SMALL, 1, 1, 1).graphs
        assert memory["learn"].graphs >= kept[GENERATOR, 0] * graph
        assert memory["score"].graphs >= kept[FAKE_SCORE, 0] * graph

    def test_a_deeper_window_costs_the_generator_alone(self):
        shallow, deep = (rank_memory(SMALL, PoolSplit(1, 1, 1, 24, depth)) for depth in (1, 3))
        assert deep[GENERATOR].graphs == 3 * shallow[GENERATOR].graphs
        assert deep[FAKE_SCORE] == shallow[FAKE_SCORE]
        assert deep[TEACHER] == shallow[TEACHER]

    def test_adapters_of_all_roles_share_one_base_and_keep_state_of_their_own_alone(self):
        work = Workload.of(load_recipe("wan21-1.3b", ADAPTED), "1.3b")
        # A and B of eight square projections and the two of feed-forward, in 30 layers.
        trained = 30 * 64 * (16 * 1536 + 2 * (1536 + 8960))
        parameters = work.shape.num_parameters
        for ranks in (1, 2):
            (memory,) = map_memory(work, fused_map(replace(work, batch_size=ranks), ranks)).values()
            assert memory.base == 2 * parameters
            assert memory.state == (12 + 16) * trained / ranks
        alone = teacher_memory(work, 2, 1)
        assert (alone.base, alone.state) == (0, 2 * parameters / 2)
        assert update_s(work, Hardware(), GENERATOR, 1) < 0.1 * update_s(
            SMALL, Hardware(), GENERATOR, 1
        )

    @pytest.mark.parametrize(
        ("recipe", "model", "memory_gb", "checkpointing"),
        [("wan21-1.3b", "1.3b", 24, "true"), ("wan21-14b", "14b", 80, "offload")],
    )
    def test_all_roles_with_adapters_fit_one_gpu_at_the_released_clip_size(
        self, recipe, model, memory_gb, checkpointing
    ):
        learners = [
            f"{role}.compute.checkpointing={checkpointing}" for role in (GENERATOR, FAKE_SCORE)
        ]
        in_turn = "teacher.batched_guidance=false"
        config = load_recipe(recipe, [*ADAPTED, *learners, in_turn])
        hardware = Hardware(memory_gb=memory_gb)
        work = Workload.of(config, model)
        assert work.latent_shape == LATENTS
        assert map_fits(work, hardware, fused_map(work, 1))
        whole = Workload.of(load_recipe(recipe, [*learners, in_turn]), model)
        assert not map_fits(whole, hardware, fused_map(whole, 1))


class TestSearch:
    @pytest.mark.parametrize(
        "split",
        [
            PoolSplit(2, 3, 4, 3, 2),
            PoolSplit(4, 1, 2, 2, 1),
            PoolSplit(2, 2, 4, 3, 2, teacher_ranks=2),
        ],
    )
    def test_a_group_taken_for_one_fast_process_takes_as_long_as_its_ranks(self, split):
        work = replace(SMALL, batch_size=24)
        times = modelled(work, FREE)
        forward_s = times.seconds[TEACHER, "denoise"] / 2

        def seconds(call):
            if call.micro_batch is None:
                return 0.0
            return units_by_stage(work)[call.role, call.stage] * forward_s * call.num_samples

        calls = order_calls(
            work.program,
            split.teams,
            split.micro_batches,
            split.depth,
            samples_per_micro_batch=24 // split.micro_batches,
            iterations=range(2),
        )
        whole = simulate(calls, Costs(seconds), split.teams)
        quick = replace(FREE, memory_bandwidth=1e30, gather_bandwidth=1e30)
        found = predict(work, times, quick, split)
        assert found.iteration_s == pytest.approx(whole.iteration_s, rel=1e-6)

    @pytest.mark.slow
    def test_it_finds_what_trying_everything_finds(self):
        work, hardware = replace(SMALL, batch_size=12), Hardware()
        times = modelled(work, hardware)
        tried = [
            predict(work, times, hardware, PoolSplit(g, t, f, m, d)).iteration_s
            for g, t, f in product(range(1, 7), repeat=3)
            for m, d in product((2, 3, 4, 6), (2, 3))
            if g + t + f <= 8 and not (12 // m) % g and not (12 // m) % f
        ]
        best = find_best(work, times, hardware, 8)
        assert best is not None
        assert best.iteration_s <= 1.01 * min(tried)
        assert best.split.num_gpus <= 8

    @pytest.mark.slow
    @pytest.mark.parametrize(("num_gpus", "batch"), [(8, 32), (64, 256), (256, 1024)])
    def test_two_pools_with_a_copied_teacher_cost_little_beside_all_roles_together(
        self, num_gpus, batch
    ):
        """At eight micro-batches, of which the first rollout leaves a pool idle."""
        work = replace(SMALL, batch_size=batch)
        times = modelled(work, Hardware())
        plan = make_plan(work, times, Hardware(), num_gpus)
        found = {layout.name: layout for layout in plan.layouts}
        mapped, fused = found["map"], found["fused"]
        assert mapped.iteration_s <= 1.07 * fused.iteration_s
        assert found["pools"].iteration_s > 1.3 * mapped.iteration_s
        assert mapped.settings["topology.roles.teacher"] == ["learn", "score"]

    def test_ranks_that_do_not_divide_the_batch_are_planned(self):
        work = replace(SMALL, batch_size=16)
        plan = make_plan(work, modelled(work, Hardware()), Hardware(), 7)
        fused = next(one for one in plan.layouts if one.name == "fused")
        # Three rounds: six ranks are as fast as seven.
        assert fused.num_gpus == 6
        assert fused.settings["batch.micro_batches"] == 3

    @pytest.mark.parametrize("num_gpus", [8, 9, 100])
    def test_gpus_without_a_sample_leave_the_map_that_fewer_gpus_have(self, num_gpus):
        work = replace(SMALL, batch_size=4)
        times = modelled(work, Hardware())
        few, many = (map_layout(work, times, Hardware(), number) for number in (7, num_gpus))
        assert few is not None
        assert many is not None
        # A rank for each sample of both learners: more GPUs have nothing to do.
        assert max(few.num_gpus, many.num_gpus) <= 8
        assert many.iteration_s <= few.iteration_s

    @pytest.mark.slow
    def test_a_large_batch_is_cut_into_as_many_parts_as_memory_asks_for(self):
        work, tight = replace(SMALL, batch_size=66), Hardware(memory_gb=50)
        found = map_layout(work, modelled(work, tight), tight, 2)
        assert found is not None
        assert found.fits
        assert found.settings["batch.micro_batches"] == 66
        # Where a rank holds several samples no more parts are made than the search always tries.
        roomy = map_layout(work, modelled(work, Hardware()), Hardware(memory_gb=160), 2)
        assert roomy is not None
        assert roomy.settings["batch.micro_batches"] <= 32
        assert roomy.iteration_s < 1.02 * found.iteration_s

    @pytest.mark.slow
    def test_more_memory_never_makes_a_plan_slower(self):
        times = modelled(SMALL, Hardware())
        seconds = [
            make_plan(SMALL, times, Hardware(memory_gb=gb), 16).best.iteration_s
            for gb in (40, 80, 160)
        ]
        assert seconds == sorted(seconds, reverse=True)

    @pytest.mark.slow
    def test_a_slower_teacher_gets_more_copies(self):
        seconds = dict(modelled(SMALL, Hardware()).seconds)
        few = find_best(SMALL, StageTimes(seconds, ""), Hardware(), 16)
        seconds[TEACHER, "denoise"] *= 6
        many = find_best(SMALL, StageTimes(seconds, ""), Hardware(), 16)
        assert few is not None
        assert many is not None
        assert many.split.teacher > few.split.teacher

    def test_weights_that_are_handed_over_cost_their_way(self):
        mixing = replace(SMALL, kind=IterationKind(1, mixes_weights=True))
        # So fast that the next samples do not hide it.
        split, hardware = PoolSplit(2, 1, 2, 4, 2), Hardware(flops=1e17, wire_bandwidth=1e9)
        times = modelled(mixing, hardware)
        with_it, without = (
            predict(work, times, hardware, split).iteration_s
            for work in (mixing, replace(SMALL, kind=IterationKind(1)))
        )
        sent_s = 4 * SMALL.shape.num_parameters / 1e9
        assert 0.9 * sent_s < with_it - without < 1.1 * sent_s

    def test_weights_that_are_handed_over_within_a_pool_cost_the_way_to_its_other_ranks(self):
        mixing = replace(SMALL, kind=IterationKind(1, mixes_weights=True), batch_size=4)
        hardware = Hardware(flops=1e17, wire_bandwidth=1e9)

        def seconds(num_gpus: int, mixes: bool) -> float:
            work = replace(mixing, kind=replace(mixing.kind, mixes_weights=mixes))
            one = replace(fused_map(work, num_gpus), depth=1)
            found = fastest_map(work, modelled(work, hardware), hardware, [one])
            assert found is not None
            return found.iteration_s

        sent_s = 4 * SMALL.shape.num_parameters / 1e9
        assert seconds(1, True) - seconds(1, False) < 0.01 * sent_s
        assert 0.99 * sent_s < seconds(2, True) - seconds(2, False) < 1.01 * sent_s
        # So the roles stay on one GPU where computing is as fast as here.
        found = fused_layout(mixing, modelled(mixing, hardware), hardware, 2)
        assert found.num_gpus == 1
        assert found.iteration_s == pytest.approx(seconds(1, True))

    @pytest.mark.slow
    def test_another_batch_size_is_offered_where_it_uses_the_gpus_better(self):
        work, hardware = replace(SMALL, batch_size=16), Hardware()
        times = modelled(work, hardware)
        suited = replace(work, batch_size=find_batch(work, times, hardware, 8))
        own, other = (find_best(one, times, hardware, 8) for one in (work, suited))
        assert own is not None
        assert other is not None
        assert suited.batch_size / other.iteration_s > 16 / own.iteration_s

    @pytest.mark.slow
    def test_the_prediction_is_never_below_the_work_over_the_gpus(self):
        times = modelled(SMALL, Hardware())
        for num_gpus in (8, 24, 64):
            plan = make_plan(SMALL, times, Hardware(), num_gpus)
            assert {layout.name for layout in plan.layouts} == {"map", "pools", "fused"}
            whole = 24 * sum(times.seconds.values())
            for layout in plan.layouts:
                assert layout.iteration_s >= whole / layout.num_gpus
                assert layout.num_gpus <= num_gpus
                assert all(0 < pool.busy <= 1 for pool in layout.pools.values())


class TestRefusals:
    @pytest.mark.slow
    def test_what_cannot_fit_is_refused_with_changes_that_would_do(self):
        small = Hardware(memory_gb=80)
        large = replace(LARGE, batch_size=16)
        times = modelled(large, small)
        with pytest.raises(ConfigError) as refused:
            make_plan(large, times, small, 8)
        words = str(refused.value)
        assert "in no layout does every role fit. At its least, a rank of" in words
        # What it says is so.
        (number,) = map(int, re.findall(r"with (\d+) GPUs;", words))
        assert make_plan(large, times, small, number).best.fits
        with pytest.raises(ConfigError):
            make_plan(large, times, small, number - 1)
        gigabytes = float(words.rpartition("GPUs of ")[2].partition(" GB")[0])
        assert make_plan(large, times, Hardware(memory_gb=gigabytes), 8).best.fits

    @pytest.mark.slow
    def test_more_gpus_are_counted_with_the_settings_that_save_memory_too(self):
        small = Hardware(memory_gb=24)
        with pytest.raises(ConfigError) as refused:
            make_plan(SMALL, modelled(SMALL, small), small, 1)
        words = str(refused.value)
        number, *settings = re.findall(r"with (\d+) GPUs and (\S+)", words)[0]
        found = fitting_savings(SMALL, small, int(number))
        assert found is not None
        assert f"{settings[0]} " in " ".join(found[1])
        assert fitting_savings(SMALL, small, int(number) - 1) is None
        plain = int(re.findall(r"with (\d+) GPUs;", words)[0])
        assert run_fits(SMALL, small, plain)
        assert int(number) < plain

    def test_main_memory_that_lacks_is_named_and_not_that_of_the_gpus(self):
        poor = Hardware(host_memory_gb=1)
        with pytest.raises(ConfigError, match=r"takes [\d.]+ GB of main memory") as refused:
            make_plan(SMALL, modelled(SMALL, poor), poor, 8)
        needed = float(re.findall(r"takes ([\d.]+) GB", str(refused.value))[0])
        assert 1 < needed < 10
        assert run_fits(SMALL, replace(poor, host_memory_gb=needed + 0.1), 8)
        assert not run_fits(SMALL, replace(poor, host_memory_gb=needed - 0.1), 8)

    @pytest.mark.slow
    def test_settings_that_save_memory_are_proposed_as_few_as_will_do(self):
        large, tight = replace(LARGE, batch_size=8), Hardware()
        with pytest.raises(ConfigError, match=r"It would fit with generator\.") as refused:
            make_plan(large, modelled(large, tight), tight, 8)
        found = fitting_savings(large, tight, 8)
        assert found is not None
        saved, settings = found
        assert " ".join(settings) in str(refused.value)
        plan = make_plan(saved, modelled(saved, tight), tight, 8)
        assert plan.best.fits
        assert any(pool.memory.host > 0 for pool in plan.best.pools.values())
        # Each of them is needed.
        for saving in savings(large):
            if set(saving.settings) <= set(settings):
                without = [one for one in savings(large) if one is not saving]
                fewer = large
                for other in without:
                    if set(other.settings) <= set(settings):
                        fewer = other.apply(fewer)
                assert not run_fits(fewer, tight, 8)

    def test_no_setting_is_proposed_where_all_fits_or_main_memory_is_short(self):
        assert fitting_savings(SMALL, Hardware(), 8) == (SMALL, ())
        large = replace(LARGE, batch_size=8)
        assert fitting_savings(large, Hardware(host_memory_gb=10), 8) is None

    def test_fourteen_billion_parameters_fit_32_gpus_of_80_gb_without_offloading(self):
        work = Workload.of(load_recipe("wan21-14b"), "14b")
        assert fitting_savings(work, Hardware(), 32) == (work, ())

    @pytest.mark.slow
    def test_one_gpu_holds_all_roles_together_and_two_may_be_two_pools(self):
        times = modelled(SMALL, Hardware())
        assert [one.name for one in make_plan(SMALL, times, Hardware(), 1).layouts] == ["fused"]
        two = make_plan(SMALL, times, Hardware(), 2)
        assert {one.name for one in two.layouts} == {"fused", "map"}

    @pytest.mark.slow
    def test_activations_that_do_not_fit_ask_for_checkpointing(self):
        kept = replace(SMALL, checkpointing=frozenset())
        with pytest.raises(ConfigError, match=r"generator\.compute\.checkpointing=true"):
            make_plan(kept, modelled(kept, Hardware()), Hardware(), 16)


class TestMeasured:
    def test_a_run_tells_seconds_of_a_sample(self, tmp_path):
        run = start_run(tmp_path / "run")
        lines = [
            json.dumps(_RECORD | {"seconds": {"total": 1.0, **dict.fromkeys(names, 0.32)}})
            for names in [
                (
                    "generator.rollout",
                    "teacher.denoise",
                    "fake_score.signal",
                    "fake_score.track",
                    "generator.learn",
                )
            ]
            * 3
        ]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        work = Workload.of(load_recipe("tiny"))
        times = measured(run, work)
        assert set(times.seconds.values()) == {0.32 / 16}
        assert times.ulysses == ()
        settings = ["topology.mode=pools", "topology.teacher.ranks=2", "teacher.compute.ulysses=2"]
        settings += ["sweep.settings={}", "sweep.grid={}"]
        (run / "config.yaml").write_text(load_recipe("tiny", settings).to_yaml())
        assert measured(run, work).ulysses == ((TEACHER, 2),)
        assert "3 iterations" in times.source

    def test_a_run_that_walks_back_once_says_nothing_of_two_walks_but_not_the_other_way(
        self, tmp_path
    ):
        again = "fake_score.compute.checkpointing=true"
        run = start_run(tmp_path / "run", overrides=(again,))
        works = [
            Workload.of(load_recipe("tiny", [again, f"fake_score.walk={walk}"]))
            for walk in ("apart", "joint")
        ]
        spent = {".".join(name): 16 * units for name, units in units_by_stage(works[0]).items()}
        line = json.dumps(_RECORD | {"seconds": {"total": 1.0, **spent}})
        (run / "metrics.jsonl").write_text(line + "\n")
        assert measured(run, works[1]).seconds == pytest.approx(units_by_stage(works[1]))
        settings = [again, "fake_score.walk=joint", "sweep.settings={}", "sweep.grid={}"]
        (run / "config.yaml").write_text(load_recipe("tiny", settings).to_yaml())
        with pytest.raises(ConfigError, match=r"no time of fake_score\.track"):
            measured(run, works[0])

    def test_measured_times_of_one_walk_are_rescaled_from_two_and_back(self):
        hardware, joint = Hardware(), SMALL.walking(joint=True)
        apart_s, joint_s = (modelled(work, hardware) for work in (SMALL, joint))
        there, back = (
            rescaled(apart_s, SMALL, joint, hardware),
            rescaled(joint_s, joint, SMALL, hardware),
        )
        assert there.seconds == pytest.approx(joint_s.seconds)
        assert back.seconds == pytest.approx(apart_s.seconds)

    def test_a_runs_diversity_loss_is_part_of_its_roles_stages(self, tmp_path):
        overrides = ("generator.diversity.weight=0.1", "generator.diversity.anchor_step=3")
        run = start_run(tmp_path / "run", overrides=overrides)
        seconds = {
            "total": 20.0,
            "generator.start": 0.16,
            "generator.rollout": 1.6,
            "teacher.denoise": 3.2,
            "teacher.anchor": 9.6,
            "fake_score.signal": 1.6,
            "fake_score.track": 1.6,
            "generator.learn": 3.2,
            "generator.diversify": 4.8,
        }
        (run / "metrics.jsonl").write_text(json.dumps(_RECORD | {"seconds": seconds}) + "\n")
        times = measured(run, Workload.of(load_recipe("tiny", overrides))).seconds
        assert times[GENERATOR, "rollout"] == pytest.approx(1.76 / 16)
        assert times[TEACHER, "denoise"] == pytest.approx(12.8 / 16)
        assert times[GENERATOR, "learn"] == pytest.approx(8.0 / 16)
        # Without the loss: its passes are taken off again.
        plain = measured(run, Workload.of(load_recipe("tiny"))).seconds
        assert plain[TEACHER, "denoise"] == pytest.approx(3.2 / 16)
        assert plain[GENERATOR, "learn"] == pytest.approx(8.0 / 16 * 2 / 5, rel=1e-3)

    def test_fresh_tracking_is_planned_from_a_benchmark_and_sid_is_sent_to_a_run(self, tmp_path):
        stages = {
            ".".join(name): {"seconds_per_sample": passes * 0.5, "passes": passes}
            for name, passes in units_by_stage(SMALL).items()
        }
        own = {"num_layers": 30, "width": 1536, "ffn_width": 8960, "patch_size": [1, 2, 2]}
        run = {"shape": own, "latent_shape": list(LATENTS), "text_length": 512, "stages": stages}
        file = tmp_path / "gpu.json"
        file.write_text(json.dumps({"machine": {"device": "a test"}, "runs": [run]}))
        fresh = replace(SMALL, kind=IterationKind(5))
        times = measured(file, fresh)
        assert times.seconds[GENERATOR, "sample"] == times.seconds[GENERATOR, "rollout"]
        assert times.seconds[FAKE_SCORE, "track"] == pytest.approx(4 * 0.5, rel=1e-4)
        assert "generator.sample taken for generator.rollout" in times.source
        with pytest.raises(ConfigError, match=r"teacher\.pullback") as refused:
            measured(file, replace(SMALL, kind=IterationKind(5, GradientPath.BOTH_SCORES)))
        assert "plan without --measured" in str(refused.value)

    def test_a_benchmark_is_scaled_by_operations(self, tmp_path):
        own = {"num_layers": 30, "width": 1536, "ffn_width": 8960, "patch_size": [1, 2, 2]}
        stages = {
            ".".join(name): {"seconds_per_sample": passes * 0.5, "passes": passes}
            for name, passes in units_by_stage(SMALL).items()
        }
        slow = {name: {**stage, "seconds_per_sample": 99.0} for name, stage in stages.items()}
        shared = {"shape": own, "latent_shape": list(LATENTS), "text_length": 512}
        document = {
            "machine": {"device": "a test"},
            "runs": [{**shared, "stages": slow}, {**shared, "stages": stages}],
        }
        file = tmp_path / "gpu.json"
        file.write_text(json.dumps(document))
        assert measured(file, SMALL).seconds[TEACHER, "denoise"] == pytest.approx(1.0)
        scale = LARGE.forward_flops / SMALL.forward_flops
        larger = measured(file, LARGE)
        assert larger.seconds[TEACHER, "denoise"] == pytest.approx(scale)
        assert "scaled" in larger.source

    @pytest.mark.parametrize("as_now", [True, False])
    def test_a_benchmark_of_before_counts_the_signal_by_its_operations_too(self, tmp_path, as_now):
        own = {"num_layers": 30, "width": 1536, "ffn_width": 8960, "patch_size": [1, 2, 2]}
        stages = {
            ".".join(name): {"seconds_per_sample": passes * 0.5, "passes": passes}
            for name, passes in units_by_stage(SMALL).items()
        }
        assert stages["fake_score.signal"]["passes"] > 3.6
        if not as_now:
            stages["fake_score.signal"]["passes"] = 3.0
        run = {"shape": own, "latent_shape": list(LATENTS), "text_length": 512, "stages": stages}
        file = tmp_path / "gpu.json"
        file.write_text(json.dumps({"machine": {"device": "a test"}, "runs": [run]}))
        times = measured(file, SMALL)
        assert times.seconds[FAKE_SCORE, "signal"] == pytest.approx(
            stages["fake_score.signal"]["seconds_per_sample"], rel=1e-3
        )
        assert "scaled" not in times.source

    def test_a_run_and_a_benchmark_at_an_address_are_read_there(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        run = start_run(tmp_path / "run")
        stages = ("generator.rollout", "teacher.denoise", "fake_score.signal")
        seconds = dict.fromkeys((*stages, "fake_score.track", "generator.learn", "total"), 0.32)
        (run / "metrics.jsonl").write_text(json.dumps(_RECORD | {"seconds": seconds}) + "\n")
        files = fsspec.filesystem("memory")
        files.store.clear()
        files.put(str(run), "/runs/x", recursive=True)
        work = Workload.of(load_recipe("tiny"))
        there = Path("memory://runs/x")
        assert measured(there, work).seconds == measured(run, work).seconds
        assert "of memory://runs/x" in measured(there, work).source
        with pytest.raises(StorageError, match="memory://runs/y"):
            measured(Path("memory://runs/y"), work)

    def test_what_is_no_measurement_is_refused(self, tmp_path):
        for path in (tmp_path, tmp_path / "missing.json"):
            with pytest.raises(ConfigError, match="taking stage times"):
                measured(path, SMALL)

    def test_a_stage_that_was_not_measured_is_named(self, tmp_path):
        run = start_run(tmp_path / "run")
        work = Workload.of(load_recipe("tiny"))
        with pytest.raises(ConfigError, match=r"teacher\.denoise"):
            measured(run, work)


class TestCommand:
    @pytest.mark.slow
    def test_json_holds_settings_times_and_memory(self):
        result = sgmd("plan", "wan21-1.3b", "--model", "1.3b", "--gpus", 8, "--json")
        told = json.loads(result.stdout)
        assert told["gpus_beside"] == {"validator": 1}
        best = told["layouts"][told["layout"]]
        assert best["gpus"] + 1 == told["gpus_used"] <= told["gpus"] == 8
        assert best["settings"] == told["settings"]
        assert told["iteration_s"] == min(one["iteration_s"] for one in told["layouts"].values())
        memory = best["pools"]["learn"]["memory_gb"]
        assert set(memory) >= {"state", "graphs", "total"}

    @pytest.mark.slow
    @pytest.mark.parametrize("weight", [1.0, 0.0], ids=["rcm", "scm"])
    def test_a_consistency_term_is_planned_with_its_own_stages(self, weight):
        # Seconds are those of a sample, whatever the batch.
        options = ("--gpus", 4, "--json", "batch={size: 4, micro_batches: 2}")
        result = sgmd("plan", "tiny-rcm", *options, f"objective.matching_weight={weight}")
        assert result.exit_code == 0, result.stderr
        seconds = json.loads(result.stdout)["stage_seconds_per_sample"]
        assert seconds["generator.noise_data"] == 0
        assert seconds["generator.learn_consistency"] > seconds["teacher.denoise_data"] > 0
        assert ("generator.learn" in seconds) == (weight > 0)

    @pytest.mark.slow
    def test_a_discriminator_is_planned_on_either_of_two_pools_and_with_all_roles(self, tmp_path):
        mine = tmp_path / "mine.yaml"
        options = ("--model", "1.3b", "--gpus", 4, "validation.every=0", "--write", mine)
        result = sgmd("plan", "wan21-1.3b", *options, "--json", "objective.method=adm")
        assert result.exit_code == 0, result.stderr
        told = json.loads(result.stdout)
        assert set(told["layouts"]) <= {"map", "fused"}
        assert told["stage_seconds_per_sample"].keys() >= {"discriminator.compare_steps"}
        config = load_recipe(str(mine))
        for name, layout in told["layouts"].items():
            assert "discriminator" in {
                role for pool in layout["pools"].values() for role in pool["roles"]
            }
            planned = load_recipe("wan21-1.3b", ["objective.method=adm"])
            assert planned.with_settings(layout["settings"]).topology.mode == name
        assert config.topology.mode == told["layout"]

    @pytest.mark.slow
    def test_every_layout_has_settings_that_the_recipe_takes(self):
        told = json.loads(
            sgmd("plan", "wan21-1.3b", "--model", "1.3b", "--gpus", 9, "--json").stdout
        )
        assert set(told["layouts"]) == {"map", "pools", "fused"}
        for name, layout in told["layouts"].items():
            config = load_recipe("wan21-1.3b").with_settings(layout["settings"])
            assert config.topology.mode == name
            of_roles = sum(pool.num_ranks for pool in pools_of(config)[:-3])
            assert of_roles == layout["gpus"] <= 8
        words = sgmd("plan", "wan21-1.3b", "--model", "1.3b", "--gpus", 9).output
        assert "settings: topology.mode=" in words

    @pytest.mark.slow
    def test_the_best_layout_can_be_written_as_a_recipe_that_says_the_same(self, tmp_path):
        mine = tmp_path / "plans" / "mine.yaml"
        options = ("--model", "1.3b", "--gpus", 8, "--write", mine, "--json")
        told = json.loads(sgmd("plan", "wan21-1.3b", *options).stdout)
        config = load_recipe(str(mine))
        assert config.topology.mode == told["layout"] == "map"
        pools = told["layouts"]["map"]["pools"]
        assert {name: pool.ranks for name, pool in config.topology.pools.items()} == {
            name: pool["gpus"] for name, pool in pools.items()
        }
        assert config.batch.micro_batches == told["settings"]["batch.micro_batches"]
        # What the recipe says of its pools besides stays.
        assert config.topology.pools["learn"].cpus == 4
        again = sgmd("plan", "wan21-1.3b", *options)
        assert again.exit_code == 2
        assert "is there already" in again.stderr

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "overrides",
        [
            (
                "topology.mode=pools",
                "topology.generator.ranks=2",
                "topology.teacher.replicas=3",
                "batch.micro_batches=4",
            ),
            (
                "topology.pools={a: {gpus: 1, labels: {rack: r1}}, b: {gpus: 1}}",
                "topology.roles={generator: a, fake_score: b, teacher: b}",
            ),
            ("batch.micro_batches=4", "batch.exit_draws=4"),
            ("topology.max_staleness_iterations=1",),
            ("topology.mode=pools", "topology.transport=nixl"),
        ],
    )
    @pytest.mark.parametrize("gpus", [2, 8])
    def test_recipes_of_every_layout_can_be_written_anew(self, tmp_path, overrides, gpus):
        mine = tmp_path / "mine.yaml"
        options = ("--model", "1.3b", "--gpus", gpus, "validation.every=0", "--write", mine)
        result = sgmd("plan", "wan21-1.3b", *options, "--json", *overrides)
        assert result.exit_code == 0, result.stderr
        config = load_recipe(str(mine))
        assert config.topology.mode == json.loads(result.stdout)["layout"]
        if "rack" in overrides[0] and config.topology.mode == "map":
            assert config.topology.pools["learn"].labels == {"rack": "r1"}

    @pytest.mark.slow
    def test_another_batch_size_is_taken_only_where_it_makes_more_samples(self):
        options = ("--model", "1.3b", "--gpus", 8, "validation.every=0", "--json")
        own, any_size = (
            json.loads(sgmd("plan", "wan21-1.3b", *options, *extra).stdout)
            for extra in ((), ("--any-batch",))
        )
        assert any_size["samples_per_s"] >= own["samples_per_s"]

    @pytest.mark.slow
    @pytest.mark.parametrize("gpus", [1, 2])
    def test_few_gpus_are_planned_whatever_the_recipe_sets(self, gpus):
        options = ("--model", "1.3b", "validation.every=0", "--json")
        told = json.loads(sgmd("plan", "wan21-1.3b", "--gpus", gpus, *options).stdout)
        assert told["gpus_used"] == gpus
        config = load_recipe("wan21-1.3b").with_settings(told["settings"])
        assert sum(pool.ranks for pool in config.topology.role_pools.values()) == gpus

    def test_a_validator_that_takes_the_only_gpu_is_named(self):
        result = sgmd("plan", "wan21-1.3b", "--model", "1.3b", "--gpus", 1)
        assert result.exit_code == 2
        assert "planning for 1 GPU: no GPU left for the roles beside validator 1" in " ".join(
            result.stderr.split()
        )
        assert (
            "Set validation.every=0, and `sgmd evaluate RUN` after the run; or give --gpus 2"
            in (result.stderr)
        )

    @pytest.mark.slow
    def test_one_gpu_that_does_not_hold_all_roles_is_refused_with_its_bytes(self):
        options = ("--model", "14b", "validation.every=0")
        result = sgmd("plan", "wan21-1.3b", "--gpus", 1, *options)
        assert result.exit_code == 2
        assert "a rank of all roles needs" in result.stderr

    @pytest.mark.slow
    def test_a_reader_gets_a_table_and_the_settings(self):
        result = sgmd("plan", "wan21-1.3b", "--model", "14b", "--gpus", 64)
        assert result.exit_code == 0
        for words in ("fake score", "GB a GPU", "batch.micro_batches=", "gathered"):
            assert words in result.output

    @pytest.mark.slow
    def test_every_layout_has_its_line_and_the_best_one_its_traffic(self):
        asked = ["plan", "tiny", "batch={size: 4, micro_batches: 2}", "validation.every=0"]
        adversarial = "objective.method=adm"
        expected = {
            (1,): {"map: takes 2 GPUs at least", "pools: takes 3 GPUs at least"},
            (2,): {"pools: takes 3 GPUs at least"},
            (3,): set(),
            (3, adversarial): {"pools: not planned for a method with a discriminator"},
        }
        for (gpus, *more), reasons in expected.items():
            words = sgmd(*asked, "--gpus", gpus, *more).output
            lines = {line.strip() for line in words.splitlines()}
            assert {line for line in lines if ": takes" in line or "not planned" in line} == reasons
            planned = 3 - len(reasons)
            assert " ".join(words.split()).count("GB of weights gathered") == planned

    @pytest.mark.slow
    def test_the_cost_of_a_measured_lag_is_said(self):
        options = ("--model", "1.3b", "--gpus", 64, "--json")
        told = json.loads(sgmd("plan", "wan21-1.3b", *options, "lag.every=100").stdout)
        # 2 copies x 16 updates and 4 that settle, x (2.5 + 1 + 2); 4 batches x 4 x (2.5 + 1).
        assert any("takes 254 passes over a batch each time" in line for line in told["advice"])
        assert "lag.every" not in str(json.loads(sgmd("plan", "wan21-1.3b", *options).stdout))

    @pytest.mark.slow
    def test_memory_settings_are_taken_on_request_and_written(self, tmp_path):
        options = ["wan21-1.3b", "--model", "14b", "--gpus", "8", "topology.validator.gpus=0"]
        short = sgmd("plan", *options)
        assert short.exit_code == 2
        written = tmp_path / "mine.yaml"
        found = sgmd("plan", *options, "--fit", "--json", "--write", written)
        settings = json.loads(found.stdout)["memory_settings"]
        assert settings
        values = load_recipe(str(written)).model_dump(mode="json")
        for one in settings:
            key, _, value = one.partition("=")
            place = values
            for part in key.split("."):
                place = place[part]
            assert str(place).lower() == value

    @pytest.mark.slow
    def test_a_plan_that_cannot_be_is_a_wrong_request(self):
        result = sgmd("plan", "wan21-1.3b", "--model", "14b", "--gpus", 8)
        assert result.exit_code == 2
        assert "It would fit with" in result.stderr

    @pytest.mark.slow
    def test_adapters_are_named_where_they_alone_fit(self):
        options = ["wan21-1.3b", "--model", "1.3b", "--gpus", 2, "--gpu-memory", 24]
        short = sgmd("plan", *options)
        assert short.exit_code == 2
        (words,) = [line for line in short.stderr.splitlines() if line.startswith("Adapters")]
        settings = shlex.split(words.split(", with ")[1])
        assert settings[0] == "generator.lora={rank: 64}"
        assert sgmd("plan", *options, *settings).exit_code == 0
        # A run that has them already is told of none.
        less = [*options[:-1], 6, *settings]
        assert "Adapters" not in sgmd("plan", *less).stderr

    def test_a_teacher_that_is_not_here_is_known_by_its_name_on_the_hub(self):
        for folder in ("models/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"):
            config = load_recipe("wan21-1.3b", [f"teacher.model={folder}"])
            work = Workload.of(config, "1.3b")
            assert work.shape == RELEASED_SHAPES["1.3b"]
            assert work.shape_of(TEACHER) == work.shape_of(FAKE_SCORE) == RELEASED_SHAPES["14b"]
        config = load_recipe("wan21-1.3b", ["teacher.model=models/mine"])
        with pytest.raises(ConfigError, match="models/mine: no such folder"):
            Workload.of(config, "1.3b")

    def test_a_missing_folder_names_the_option_that_does_without(self):
        result = sgmd("plan", "wan21-1.3b")
        assert result.exit_code == 2
        assert "--model a14b or 1.3b or 5b or 14b or ltx-2b" in result.stderr


@pytest.mark.slow
def test_the_page_on_memory_says_what_the_planner_finds():
    page = (Path(__file__).parents[3] / "docs" / "memory.md").read_text(encoding="utf-8")
    of_14b = page.partition("### 14b")[2].partition("###")[0]
    lines = [line for line in of_14b.splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) == 5 * 3
    # A third of them, to be quick; `python docs/make_memory.py --check` compares all.
    for gpus, memory, layout, seconds, _, _, settings, _ in rows[2::3]:
        batch = 4 * int(gpus)
        sized = [f"batch.size={batch}", f"batch.micro_batches={batch}"]
        work = Workload.of(load_recipe("wan21-14b", ["topology.mode=fused", *sized]), "14b")
        hardware = Hardware(memory_gb=float(memory))
        found = fastest_fit(work, partial(modelled, hardware=hardware), hardware, int(gpus))
        assert (found is None) == (layout == "does not fit"), (gpus, memory)
        if found:
            named = settings.split() if found.settings else []
            assert [f"`{one}`" for one in found.settings] == named
            times = modelled(found.work, hardware)
            best = make_plan(found.work, times, hardware, int(gpus)).best
            assert (best.name, f"{best.iteration_s:.0f}") == (layout, seconds)


@pytest.mark.slow
def test_the_walk_back_is_chosen_and_told_by_what_the_layouts_take():
    asked = ["plan", "wan21-1.3b", "--model", "1.3b", "--gpus", 8, "validation.every=0", "--json"]
    told, fitted = (json.loads(sgmd(*asked, *more).output) for more in ([], ["--fit"]))
    assert told["layout"] == fitted["layout"] == "fused"
    (line,) = [line for line in told["advice"] if "walk" in line]
    assert line.startswith("with fake_score.walk=joint an iteration takes")
    assert fitted["memory_settings"] == ["fake_score.walk=joint"]
    assert fitted["iteration_s"] < 0.94 * told["iteration_s"]
    assert not any("walk" in line for line in fitted["advice"])
    # Where two pools alone fit, at two micro-batches, the generator would wait for the walk.
    work = Workload.of(load_recipe("wan21-1.3b", ["batch={size: 4, micro_batches: 2}"]), "1.3b")
    tight = Hardware(memory_gb=24)
    found = fastest_fit(work, partial(modelled, hardware=tight), tight, 2)
    assert found is not None
    assert not found.work.kind.joint
    once = found.work.walking(joint=True)
    layouts = [best_layouts(one, modelled(one, tight), tight, 2)[0] for one in (found.work, once)]
    assert [layout.name for layout in layouts] == ["map", "map"]
    assert layouts[0].iteration_s < layouts[1].iteration_s
