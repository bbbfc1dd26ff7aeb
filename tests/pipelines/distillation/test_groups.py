"""Resources and transport that a recipe asks for."""

import pytest
from pydantic import JsonValue

from cluster.schedule.program import Pass
from pipelines.config.recipe import load_recipe
from pipelines.distillation.groups import direct_of, kept_clips_of
from pipelines.distillation.iteration_plan import stage_seconds
from pipelines.distillation.pools import pools_of
from pipelines.run.folder import RunFolder
from pipelines.stages.algorithm import iteration_program
from pipelines.stages.kind import IterationKind
from sgmd_core.errors import ConfigError
from sgmd_core.objectives import ComparedStates, GradientPath


def test_every_role_asks_for_what_its_section_says():
    config = load_recipe(
        "tiny",
        [
            "topology.mode=pools",
            "topology.teacher={replicas: 2, cpus: 1, strategy: strict_spread}",
            "topology.text={gpus: 1, labels: {pool: light}}",
            "topology.validator.resources={h100: 0.5}",
        ],
    )
    pools = {pool.name: pool for pool in pools_of(config)}
    assert list(pools) == ["generator", "teacher", "fake_score", "text", "feed", "validator"]
    assert (pools["teacher"].num_ranks, pools["teacher"].strategy) == (2, "STRICT_SPREAD")
    assert pools["text"].bundle == {"CPU": 0.25, "GPU": 1.0}
    assert pools["text"].labels == {"pool": "light"}
    assert pools["validator"].bundle == {"CPU": 0.25, "h100": 0.5}
    assert pools["generator"].bundle == {"CPU": 0.5}


def test_a_discriminator_has_a_pool_where_the_method_has_one():
    settings = ["topology.mode=pools", "topology.discriminator={ranks: 2, cpus: 1}"]
    settings += ["sweep.settings={}"]
    with_one = load_recipe("tiny", [*settings, "objective.method=adm"])
    pools = {pool.name: pool for pool in pools_of(with_one)}
    assert (pools["discriminator"].num_ranks, pools["discriminator"].bundle) == (2, {"CPU": 1.0})
    without = load_recipe("tiny", settings)
    assert "discriminator" not in {pool.name for pool in pools_of(without)}
    named = load_recipe("tiny-adm", ["topology.roles.discriminator=learn"])
    for config, place in ((load_recipe("tiny-adm"), "score"), (named, "learn")):
        assert config.topology.places_of(config.roles)["discriminator"] == (place,)


@pytest.mark.slow
def test_a_teacher_of_other_weights_has_other_clips(tmp_path):
    def facts(*settings):
        config = load_recipe("tiny", list(settings))
        return kept_clips_of(config, {"vae": "1"}, {}, RunFolder(tmp_path)).facts

    bf16 = [f"{role}.compute.weights=bf16" for role in ("generator", "teacher")]
    lora = ["generator.lora.rank=4", *bf16]
    assert facts(*lora) != facts() == facts("generator.lora.rank=4")
    assert facts(*lora, f"teacher.model={tmp_path}") == facts()
    assert facts("model.negative_prompt=blurred") != facts()
    first, second = (
        kept_clips_of(load_recipe("tiny"), {"vae": "1"}, teacher, RunFolder(tmp_path)).digest
        for teacher in ({}, {"transformer": "2"})
    )
    assert first != second


def test_without_validation_nobody_validates():
    config = load_recipe("tiny", ["validation.every=0"])
    assert "validator" not in {pool.name for pool in pools_of(config)}


def test_a_direct_transport_carries_every_result_that_another_role_takes():
    kinds = [
        IterationKind(path=GradientPath.BOTH_SCORES, diversity=True),
        IterationKind(fresh_updates=1, mixes_weights=True),
        IterationKind(compared=ComparedStates.STEPS),
        IterationKind(compared=ComparedStates.DATA),
        IterationKind(consistency=True),
    ]
    programs = map(iteration_program, kinds)
    passes = [each for program in programs for each in program if isinstance(each, Pass)]
    stages = {stage.name: stage for each in passes for stage in each.stages}
    taken = {
        name
        for each in passes
        for stage in each.stages
        for name in stage.takes
        if stages[name].role != stage.role
    }
    direct = direct_of("nixl")
    assert direct is not None
    assert direct.methods == taken
    assert direct_of("object_store") is None


def test_named_pools_ask_for_what_they_say_whatever_roles_are_there():
    config = load_recipe(
        "tiny",
        [
            "batch.size=24",
            "topology.pools.learn={ranks: 2, cpus: 1, labels: {gpu: big}}",
            "topology.pools.cheap={ranks: 3, cpus: 0.25, resources: {l40: 1}}",
            "topology.roles.teacher=[score, cheap]",
        ],
    )
    pools = {pool.name: pool for pool in pools_of(config)}
    assert list(pools) == ["learn", "score", "cheap", "text", "feed", "validator"]
    assert [pools[name].num_ranks for name in ("learn", "score", "cheap")] == [2, 1, 3]
    assert pools["learn"].labels == {"gpu": "big"}
    assert pools["cheap"].bundle == {"CPU": 0.25, "l40": 1.0}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{generator.rollot: 1}", "no stage called generator.rollot"),
        ("{generator.rollout: 2, teacher.denoise: 2}", "nothing for fake_score.signal"),
    ],
)
def test_measured_seconds_are_those_of_every_stage_or_refused(given: str, words: str):
    with pytest.raises(ConfigError, match=words):
        stage_seconds(load_recipe("tiny", [f"topology.stage_seconds={given}"]))


@pytest.mark.slow
def test_measured_seconds_take_the_place_of_counted_passes():
    counted = stage_seconds(load_recipe("tiny"))
    given: dict[str, JsonValue] = {".".join(name): 2 * units for name, units in counted.items()}
    config = load_recipe("tiny").with_settings({"topology.stage_seconds": given})
    assert stage_seconds(config) == {name: 2 * units for name, units in counted.items()}
