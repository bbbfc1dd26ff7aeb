"""`sgmd experts`: a folder of two experts that samples as its base does, and refusals."""

import json
from pathlib import Path

import fsspec
import pytest
import torch

from pipelines.config.recipe import load_recipe
from pipelines.distillation.method_checks import check_phases
from pipelines.experts import make_experts
from sgmd_core.errors import ConfigError
from sgmd_core.rollout import euler_sample
from sgmd_core.schedule import FlowMatchSchedule
from tests.helpers.tiny_ltx import write_tiny_ltx
from tests.helpers.tiny_wan import LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, write_tiny_wan
from workers.models.experts import ExpertDenoiser
from workers.models.families import family_of
from workers.models.weight_digests import require_same_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_wan(tmp_path_factory.mktemp("base") / "model", ["a"])


@pytest.fixture(scope="module")
def pair(base: Path) -> Path:
    return make_experts(base, base.parent / "pair", 0.825)


@pytest.mark.slow
def test_two_equal_experts_sample_what_the_one_denoiser_samples(base: Path, pair: Path) -> None:
    one, two = (family_of(folder).load_denoiser(folder) for folder in (base, pair))
    assert isinstance(two, ExpertDenoiser)
    assert two.boundary == 0.825
    drawn = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *LATENT_SHAPE, generator=drawn)
    text = torch.randn(2, TEXT_LENGTH, TEXT_DIM, generator=drawn)
    grid = FlowMatchSchedule(shift=3.0).few_step_grid(4)
    assert 0 < sum(level >= 0.825 for level in grid[:-1].tolist()) < 4
    assert torch.equal(*(euler_sample(each, grid, noise, text) for each in (one, two)))
    require_same_weights(pair)


@pytest.mark.slow
def test_a_pair_gets_another_boundary_and_keeps_its_experts(pair: Path, tmp_path: Path) -> None:
    other = make_experts(pair, tmp_path / "other", 0.6, "copy")
    assert json.loads((other / "model_index.json").read_text())["boundary_ratio"] == 0.6
    one, two = (family_of(folder).load_denoiser(folder) for folder in (pair, other))
    states = one.state_dict(), two.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_pair_at_an_address_is_that_of_a_disk(
    base: Path, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = fsspec.filesystem("memory")
    files.store.clear()
    make_experts(base, "memory://models/pair", 0.825)
    found = {path.removeprefix("/models/pair/") for path in files.find("/models/pair")}
    there = [path for path in pair.rglob("*") if path.is_file()]
    assert found == {path.relative_to(pair).as_posix() for path in there}
    for path in there:
        assert files.cat_file(f"/models/pair/{path.relative_to(pair)}") == path.read_bytes()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("boundary", [0.0, 1.0, 875.0])
def test_a_boundary_that_is_no_noise_level_is_refused(base, tmp_path, boundary) -> None:
    with pytest.raises(ConfigError, match=f"--boundary {boundary}"):
        make_experts(base, tmp_path / "pair", boundary)


def test_a_model_of_another_family_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_ltx(tmp_path / "ltx", ["a"])
    with pytest.raises(ConfigError, match="family ltx"):
        make_experts(folder, tmp_path / "pair", 0.5)


PHASED = ["objective.method=phased_dmd", "fake_score.tracking=fresh"]


def test_experts_have_to_change_where_the_phases_do(base: Path, pair: Path, tmp_path) -> None:
    """Steps at 1, 0.9, 0.75 and 0.5: the high phase ends where the third one starts."""
    config = load_recipe("tiny", PHASED)
    check_phases(config, family_of(pair).inspect(pair))
    with pytest.raises(ConfigError, match=r"sgmd experts .* --boundary 0.825"):
        check_phases(config, family_of(base).inspect(base))
    for boundary in (0.75, 0.95):
        other = make_experts(pair, tmp_path / "other", boundary)
        with pytest.raises(ConfigError, match=f"change at {boundary}"):
            check_phases(config, family_of(other).inspect(other))
    check_phases(load_recipe("tiny"), family_of(base).inspect(base))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective.boundary=600"], "which no step starts at"),
        (["generator.num_steps=3"], "which no step starts at"),
        (["generator.random_steps={min_steps: 2, max_steps: 4}"], "random_steps"),
        (["generator.diversity.weight=0.1", "objective.boundary=750"], "the whole high phase"),
        (["schedule.score_window=both"], "score_window"),
        (["schedule.score_law=renoise"], "score_law"),
        (["schedule.renoise=true"], "renoise"),
        (["schedule.score_level_max=900"], r"objective\.first_level and last_level"),
        (["schedule.score_shift=1.0"], "score_shift"),
        (
            [
                "objective={method: phased_dmd, order: alternate, fake_updates: 1}",
                "fake_score.tracking=shared",
            ],
            "other score levels than it matches",
        ),
    ],
)
def test_what_does_not_go_with_phases_is_refused_with_the_recipe(overrides, words) -> None:
    with pytest.raises(ConfigError, match=words):
        load_recipe("tiny", [*PHASED, *overrides])
