"""Runs with a discriminator: data are asked for and checked, placements make the same bits."""

from pathlib import Path

import pytest

from pipelines.distillation.run import distill, dry_run
from pipelines.run.folder import RunFolder, read_jsonl
from sgmd_core.errors import ConfigError, SgmdError
from tests.e2e.conftest import MakeRecipe
from tests.e2e.latents import resume_with_latents, write_encoded
from tests.e2e.test_equivalence import history, moments, state
from tests.helpers import tiny_wan
from tests.helpers.moves import assert_moves

GAN = [
    "fake_score.tracking=fresh",
    "objective={method: dmd2, fake_updates: 2, adversary: {weight: 0.5, loss: softplus}}",
    "discriminator={layers: [2], width: 8, num_strides: 1, optimizer: {lr: 1.0e-2}}",
    "iterations=4",
]
ADM = ["objective.method=adm", "discriminator={layers: [2], width: 8, num_strides: 1}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, wan_folder: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("latents")
    return [write_encoded(folder / str(seed), wan_folder, seed) for seed in range(2)]


@pytest.mark.slow
def test_latents_of_the_data_reach_the_discriminator_and_a_resumed_run_keeps_its_bits(
    make_recipe: MakeRecipe, data: list[Path]
) -> None:
    settings = [*GAN, f"data.train={data[0]}", "checkpoint.every=2"]
    whole = make_recipe("name=whole", *settings)
    planned = dry_run(whole)
    assert (planned["data_latents"], planned["stored_text"]) == (True, False)
    assert planned["processes"]["discriminator"] == 1
    resume_with_latents(make_recipe, settings, data[1])
    # The same ids, captions and sizes; only the latents are others.
    encoded_anew = make_recipe("name=parts", *settings, f"data.train={data[1]}", "iterations=5")
    with pytest.raises(SgmdError, match="has latents of content"):
        distill(encoded_anew, resume=True)
    (first, *_) = read_jsonl(RunFolder(whole.run_folder).metrics)
    assert {"adversarial", "discriminator", "logit_gap"} <= set(first["losses"])
    thirds = [name for name in first["losses"] if name.startswith("logit_gap_")]
    assert 0 < len(thirds) <= 3, "a gap for each third of the noise that has samples"
    assert set(first["grad_norms"]) == {"generator", "fake_score", "discriminator"}
    assert {"discriminator.compare_data", "feed.data"} & set(first["seconds"])


@pytest.mark.ray
@pytest.mark.slow
def test_two_pools_make_the_bits_of_one_process_with_latents_of_the_data(
    make_recipe: MakeRecipe, ray_cluster: None, data: list[Path]
) -> None:
    settings = [*GAN, f"data.train={data[0]}", "iterations=2"]
    local, pools = (
        make_recipe(f"name={name}", *settings, *where)
        for name, where in (
            ("local", []),
            ("map", ["topology.mode=map", "topology.roles.discriminator=learn"]),
        )
    )
    for config in (local, pools):
        distill(config)
    assert_moves(moments(local, 2), {key: 0 * value for key, value in moments(local, 2).items()})
    assert history(pools) == history(local)
    assert state(pools, 2) == state(local, 2)


class TestChecks:
    def test_captions_alone_are_refused_where_data_are_wanted(self, make_recipe: MakeRecipe):
        with pytest.raises(ConfigError, match="without latents") as caught:
            dry_run(make_recipe(*GAN))
        assert "sgmd encode" in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"latent_shape": (4, 3, 4, 8)}, r"latents of shape \(4, 3, 4, 8\)"),
            ({"vae": "0123"}, "another autoencoder"),
        ],
    )
    def test_latents_of_other_clips_or_another_autoencoder_are_refused(
        self, make_recipe: MakeRecipe, tmp_path: Path, wan_folder: Path, changes, words
    ):
        train = write_encoded(tmp_path / "train", wan_folder, 0, **changes)
        with pytest.raises(ConfigError, match=words):
            dry_run(make_recipe(*GAN, f"data.train={train}"))

    def test_a_method_that_needs_no_data_reads_none(
        self, make_recipe: MakeRecipe, data: list[Path]
    ):
        assert dry_run(make_recipe(*ADM, f"data.train={data[0]}"))["data_latents"] is False

    def test_a_layer_that_the_teacher_does_not_have_is_refused(self, make_recipe: MakeRecipe):
        with pytest.raises(ConfigError, match=r"layer 3.*from 1 to 2"):
            dry_run(make_recipe(*ADM, "discriminator.layers=[1, 3]"))

    def test_a_teacher_of_two_experts_has_no_place_for_heads(
        self, make_recipe: MakeRecipe, tmp_path: Path
    ):
        words = ["a", "red", "circle", "moves", "left"]
        folder = tiny_wan.write_tiny_experts(tmp_path / "model", words, boundary=0.8)
        with pytest.raises(ConfigError, match="2 denoisers"):
            dry_run(make_recipe("objective.method=adm", f"model.folder={folder}"))

    def test_a_step_past_the_data_is_refused(self, make_recipe: MakeRecipe):
        with pytest.raises(ConfigError, match=r"objective\.delta 0\.0625.*past the data"):
            make_recipe("objective={method: adm, delta: 0.0625}", "schedule.shift=1.0")
        make_recipe("objective={method: adm, delta: 0.015625}", "schedule.shift=1.0")
