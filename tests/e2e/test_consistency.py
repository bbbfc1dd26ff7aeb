"""Runs with a consistency term: data are asked for, placements and resumption keep the bits."""

from pathlib import Path

import pytest

from pipelines.config.recipe import load_recipe
from pipelines.distillation.run import distill, dry_run
from pipelines.run.folder import RunFolder, read_jsonl
from sgmd_core.errors import ConfigError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.latents import resume_with_latents, write_encoded
from tests.e2e.test_equivalence import history, moments, state
from tests.helpers.moves import assert_moves

RCM = [
    "fake_score.tracking=fresh",
    "objective={method: rcm, fake_updates: 1, consistency: {warmup: 2}}",
    "schedule.renoise=true",
    "generator.optimizer.max_grad_norm=1.0e+6",
    "generator.random_steps={min_steps: 3, max_steps: 3, order: running_minimum}",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, wan_folder: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("latents")
    return [write_encoded(folder / str(seed), wan_folder, seed) for seed in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("weight", ["1.0", "0.0"], ids=["rcm", "scm"])
def test_a_run_learns_from_data_and_a_resumed_one_keeps_its_bits(
    make_recipe: MakeRecipe, data: list[Path], weight: str
) -> None:
    settings = [
        *RCM,
        f"objective.matching_weight={weight}",
        f"data.train={data[0]}",
        "checkpoint.every=2",
        "iterations=4",
    ]
    whole = make_recipe("name=whole", *settings)
    assert dry_run(whole)["data_latents"] is True
    resume_with_latents(make_recipe, settings, data[1])
    lines = read_jsonl(RunFolder(whole.run_folder).metrics)
    assert all({"consistency", "tangent_norm", "tracking"} <= set(each["losses"]) for each in lines)
    matching = [each["losses"].get("generator") for each in lines]
    assert matching[:2] == ([0.0, 0.0] if weight == "1.0" else [None, None])
    assert bool(matching[2]) is (weight == "1.0")


@pytest.mark.ray
@pytest.mark.slow
def test_roles_on_ray_make_the_bits_of_one_process_with_noised_data(
    make_recipe: MakeRecipe, ray_cluster: None, data: list[Path]
) -> None:
    settings = [*RCM, f"data.train={data[0]}", "iterations=3"]
    local = make_recipe("name=local", *settings)
    placed = [make_recipe(f"name={m}", *settings, f"topology.mode={m}") for m in ("pools", "fused")]
    for config in (local, *placed):
        distill(config)
    assert_moves(moments(local, 3), {key: 0 * value for key, value in moments(local, 3).items()})
    for config in placed:
        assert history(config) == history(local)
        assert state(config, 3) == state(local, 3)


class TestChecks:
    def test_captions_alone_are_refused(self, make_recipe: MakeRecipe):
        with pytest.raises(ConfigError, match="without latents"):
            dry_run(make_recipe(*RCM))

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (["schedule.renoise=false"], r"schedule\.renoise=true"),
            (["generator.random_steps.stratified=true"], "one level repeated"),
            (["generator.compute.compile=true"], "forward mode"),
            (["generator.compute.weights=bf16", "generator.lora={rank: 4}"], "too few digits"),
            (["generator.compute.precision=bf16", "topology.pools.learn.ranks=2"], "one rank"),
            (
                [
                    "objective.matching_weight=0.0",
                    "objective.fake_updates=1",
                    "fake_score.tracking=shared",
                ],
                "fake_score.tracking=fresh",
            ),
        ],
    )
    def test_settings_that_have_no_derivative_or_lead_elsewhere_are_refused(self, settings, words):
        load_recipe("tiny-rcm")
        with pytest.raises(ConfigError, match=words):
            load_recipe("tiny-rcm", settings)

    def test_a_norm_that_clips_summed_losses_in_every_update_is_said(self, caplog):
        load_recipe("tiny-rcm")
        assert "clips every update" not in caplog.text
        load_recipe("tiny-rcm", ["generator.optimizer.max_grad_norm=10.0"])
        assert "clips every update" in caplog.text

    def test_one_step_needs_no_noise_and_one_rank_may_compute_in_bfloat16(self):
        config = load_recipe(
            "tiny-rcm",
            [
                "schedule.renoise=false",
                "generator.num_steps=1",
                "generator.compute.precision=bf16",
            ],
        )
        assert (config.schedule.renoise, config.generator.compute.precision) == (False, "bf16")
