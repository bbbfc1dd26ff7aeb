"""Runs with a flow head: two stages, placements and resumption keep the bits, exports sample."""

from pathlib import Path

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.distillation.run import distill, dry_run
from pipelines.planning.stage_work import stage_units
from pipelines.planning.workload import Workload
from pipelines.run.folder import RunFolder, read_jsonl
from pipelines.transition import make_transition
from sgmd_core.errors import ConfigError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.latents import write_encoded
from tests.e2e.test_equivalence import drop_checkpoint, history, moments, state
from tests.helpers.moves import assert_moves
from workers.models.families import family_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, wan_folder: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("latents")
    return [write_encoded(folder / str(seed), wan_folder, seed) for seed in range(2)]


@pytest.fixture(scope="module")
def tmd(tmp_path_factory: pytest.TempPathFactory, wan_folder: Path) -> list[str]:
    """What every run of the method sets."""
    folder = make_transition(wan_folder, tmp_path_factory.mktemp("flow") / "model", 1, 2)
    return [
        f"model.folder={folder}",
        f"teacher.model={wan_folder}",
        "fake_score.tracking=fresh",
        "generator.num_steps=2",
        "generator.ema_decay=0.5",
        "iterations=4",
        "checkpoint.every=2",
    ]


STRIDES = "objective={method: tmd, stage: meanflow, fake_updates: 1, meanflow: {instant_share: 0}}"
MATCHING = "objective={method: tmd, fake_updates: 1}"


@pytest.mark.slow
def test_both_stages_resume_to_the_bit_and_the_second_starts_from_the_first(
    make_recipe: MakeRecipe, data: list[Path], tmd: list[str]
) -> None:
    settings = [*tmd, STRIDES, f"data.train={data[0]}"]
    whole = make_recipe("name=whole", *settings)
    assert dry_run(whole)["data_latents"] is True
    distill(whole)
    other = make_recipe("name=other", *tmd, STRIDES, f"data.train={data[1]}")
    distill(other)
    assert_moves(moments(whole, 4), moments(other, 4))
    lines = read_jsonl(RunFolder(whole.run_folder).metrics)
    assert all({"meanflow", "stride_norm", "tracking"} <= set(each["losses"]) for each in lines)
    assert lines[-1]["losses"]["stride_norm"] > 0
    generator = RunFolder(whole.run_folder).generator
    assert family_of(generator).name == "wan-transition"
    second = [*tmd, f"model.folder={generator}", MATCHING]
    for first, stage in ((whole, settings), (None, second)):
        if first is None:
            first = make_recipe("name=matching", *stage, "validation.every=4")
            distill(first)
            assert len(read_jsonl(RunFolder(first.run_folder).validation)) == 1
            assert "meanflow" not in read_jsonl(RunFolder(first.run_folder).metrics)[-1]["losses"]
        name = f"name=parts-{first.name}"
        distill(make_recipe(name, *stage, "iterations=3"))
        parts = make_recipe(name, *stage)
        drop_checkpoint(parts, 3)
        distill(parts, resume=True)
        assert history(parts) == history(first)
        assert state(parts, 4) == state(first, 4)


@pytest.mark.slow
def test_a_discriminator_teaches_a_generator_with_a_flow_head(
    make_recipe: MakeRecipe, data: list[Path], tmd: list[str]
) -> None:
    gan = "objective={method: tmd, fake_updates: 1, adversary: {weight: 1.0, loss: softplus}}"
    heads = "discriminator={layers: [1, 2], width: 8, num_strides: 1, optimizer: {lr: 1.0e-2}}"
    few = ["iterations=2", f"data.train={data[0]}"]
    plain = make_recipe("name=plain", *tmd, MATCHING, *few)
    judged = make_recipe("name=judged", *tmd, gan, heads, *few)
    for config in (plain, judged):
        distill(config)
    lines = read_jsonl(RunFolder(judged.run_folder).metrics)
    assert all({"adversarial", "discriminator"} <= set(line["losses"]) for line in lines)
    # Heads start silent: the first update is that without them, the second one is not.
    norms = [
        [line["grad_norms"]["generator"] for line in read_jsonl(RunFolder(each.run_folder).metrics)]
        for each in (plain, judged)
    ]
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-5)
    assert norms[0][1] != pytest.approx(norms[1][1], rel=1e-3)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["meanflow", "matching"])
def test_roles_on_ray_make_the_bits_of_one_process(
    make_recipe: MakeRecipe, ray_cluster: None, data: list[Path], tmd: list[str], stage: str
) -> None:
    settings = [*tmd, STRIDES if stage == "meanflow" else MATCHING, f"data.train={data[0]}"]
    local = make_recipe("name=local", *settings)
    others = [make_recipe("name=pools", *settings, "topology.mode=pools")]
    if stage == "matching":
        others.append(make_recipe("name=fused", *settings, "topology.mode=fused"))
    distill(local)
    zero = {key: 0 * value for key, value in moments(local, 4).items()}
    assert_moves(moments(local, 4), zero)
    for config in others:
        distill(config)
        assert history(config) == history(local)
        assert state(config, 4) == state(local, 4)


def test_stages_are_planned_in_passes_of_each_roles_own_network(
    make_recipe: MakeRecipe, tmd: list[str]
):
    matching, strides = (Workload.of(make_recipe(*tmd, stage)) for stage in (MATCHING, STRIDES))
    own, base = (matching.shape_of(role) for role in ("generator", "teacher"))
    flops = [shape.forward_flops(matching.latent_shape, 6) for shape in (own, base)]
    assert flops[0] > 1.3 * flops[1], "two inner steps over one of two layers"
    assert stage_units(matching)["generator", "rollout"] == 1.5
    assert stage_units(matching)["teacher", "denoise"] < 2 / 1.3
    learns = {stage for role, stage in stage_units(strides) if role == "generator"}
    assert learns == {"learn_flow", "sample"}
    assert not {stage for role, stage in stage_units(strides) if role == "teacher"}


class TestChecks:
    def test_a_model_without_a_flow_head_is_refused_with_the_command_that_makes_one(
        self, make_recipe: MakeRecipe
    ):
        with pytest.raises(ConfigError, match="sgmd transition"):
            dry_run(make_recipe(MATCHING, "fake_score.tracking=fresh"))

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (["teacher.model=null"], "wan-transition .teacher.model is null"),
            (["fake_score.start=generator"], "fake_score.start is generator"),
            (["generator.diversity={weight: 0.1, anchor_step: 3}"], "follows the teacher's path"),
            (["objective={method: cdm}"], "off the trajectory"),
            (["generator.compute.compile=true"], "asks for compile.*run once in every inner step"),
            (["generator.lora={rank: 2}"], "asks for lora.*run once in every inner step"),
        ],
    )
    def test_what_does_not_go_with_samples_of_velocities_is_refused(
        self, make_recipe: MakeRecipe, tmd: list[str], settings: list[str], words: str
    ):
        dry_run(make_recipe(*tmd, MATCHING))
        with pytest.raises(ConfigError, match=words):
            dry_run(make_recipe(*tmd, MATCHING, *settings))

    @pytest.mark.parametrize(
        "setting", ["fake_score.lora={rank: 2}", "teacher.compute.compile=true"]
    )
    def test_teacher_and_fake_score_are_computed_as_their_own_model_can_be(
        self, make_recipe: MakeRecipe, tmd: list[str], setting: str
    ):
        checked = dry_run(make_recipe(*tmd, MATCHING, setting))["checked"]
        assert "model" in checked

    def test_captions_alone_teach_no_strides(self, make_recipe: MakeRecipe, tmd: list[str]):
        with pytest.raises(ConfigError, match="without latents"):
            dry_run(make_recipe(*tmd, STRIDES))

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (
                [
                    "objective.stage=meanflow",
                    "objective.fake_updates=1",
                    "fake_score.tracking=shared",
                ],
                "fake_score.tracking=fresh",
            ),
            (["objective.stage=other"], "stage"),
            (["objective.stage=meanflow", "objective.adversary={}"], "adversary"),
            (
                [
                    "objective.stage=meanflow",
                    "generator.compute.precision=bf16",
                    "topology.pools.learn.ranks=2",
                ],
                "one rank",
            ),
        ],
    )
    def test_recipes_that_contradict_themselves_are_refused(self, settings, words):
        load_recipe("tiny-tmd")
        with pytest.raises(ConfigError, match=words):
            load_recipe("tiny-tmd", settings)
