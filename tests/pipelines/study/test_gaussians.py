"""The study in closed-form worlds: stacked runs are single runs, figures, resume, refusals."""

import json
from dataclasses import replace
from math import nan
from pathlib import Path

import fsspec
import pytest
import torch
from pydantic import ValidationError

from cluster.storage import read_json
from pipelines.config.gaussian_study import (
    GaussianStudyConfig,
    GaussianVariant,
    is_gaussian_study,
)
from pipelines.config.methods import METHODS, method_name
from pipelines.config.recipe import load_recipe
from pipelines.config.recipe_files import load
from pipelines.study.gaussians.distilling import (
    GaussianDistillation,
    Member,
    measured_on_the_way,
    mixture_of,
)
from pipelines.study.gaussians.measuring import ENERGY, FIGURES, Truth
from pipelines.study.gaussians.networks import MemberAdam
from pipelines.study.gaussians.plan import StudyCell, num_iterations, units_per_iteration
from pipelines.study.gaussians.results import CellResult, MeasuredPoint
from pipelines.study.gaussians.run import dry_run_gaussian_study, gaussian_study
from pipelines.study.gaussians.tables import GaussianResults, gaussian_rows
from sgmd_core.errors import ConfigError
from sgmd_core.metrics.paired import paired_differences
from sgmd_core.objectives.adversarial import hinge_discriminator_loss

SMALL = [
    "batch_size=16",
    "num_samples=64",
    "num_seeds=3",
    "measurements=2",
    "search.generator_rates=[1e-3, 1e-2]",
    "search.fake_rates=[3e-3]",
    "search.num_seeds=2",
    "networks.width=8",
]


def recipe(*overrides: str) -> GaussianStudyConfig:
    return load(GaussianStudyConfig, "gaussians", [*SMALL, *overrides])


def samples_of(
    config: GaussianStudyConfig, variant: GaussianVariant, members: list[Member], iterations: int
) -> torch.Tensor:
    distillation = GaussianDistillation(config, config.worlds["ring-4-steps"], variant, members)
    ((_, samples),) = measured_on_the_way(distillation, iterations, 1, 32)
    return samples


@pytest.mark.slow
def test_a_shuffled_gap_stays_within_its_member_and_moves_the_samples():
    config, members = recipe(), [Member(3, 1e-2, 3e-3), Member(4, 1e-2, 1e-2)]
    own, shuffled = (
        GaussianVariant.model_validate({"objective": {"method": "sgmd"}, "gap": gap})
        for gap in ("own", "shuffled")
    )
    together = samples_of(config, shuffled, members, 6)
    assert (together - samples_of(config, own, members, 6)).abs().amax(dim=(1, 2)).min() > 1e-3
    for place, member in enumerate(members):
        (alone,) = samples_of(config, shuffled, [member], 6)
        assert (together[place] - alone).abs().max() < 2e-5


def test_a_shuffled_gap_is_refused_where_it_would_be_half_shuffled():
    with pytest.raises(ValidationError, match="a gradient through the teacher"):
        GaussianVariant.model_validate(
            {"objective": {"method": "sid"}, "gap": "shuffled", "tracking": "fresh"}
        )
    with pytest.raises(ConfigError, match="batch_size 15 is odd"):
        recipe("batch_size=15")


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"method": "cdm"}, "off_trajectory=0"),
        ({"method": "adm", "adversary": {"r1_weight": 20}}, "draws no perturbations"),
        ({"method": "tmd", "stage": "meanflow", "meanflow": {"guidance": 3}}, "no captions"),
    ],
)
def test_what_the_study_would_leave_out_of_a_method_is_refused(objective: dict, words: str):
    with pytest.raises(ValidationError, match=words):
        GaussianVariant.model_validate({"objective": objective, "tracking": "fresh"})


def test_settings_of_the_schedule_that_the_study_does_not_draw_by_are_refused():
    with pytest.raises(ConfigError, match=r"schedule\.score_window"):
        recipe("schedule.score_window=both")


OWN_SETTINGS = {
    "cdm": {"off_trajectory": 0},
    "phased_dmd": {"high_iterations": 3},
    "gan": {"method": "dmd2", "adversary": {"weight": 1.0}},
    "scm": {"method": "rcm", "matching_weight": 0.0},
    "meanflow": {"method": "tmd", "stage": "meanflow"},
}


@pytest.mark.parametrize(
    ("method", "tracking"),
    [
        *(
            (method_name(method), tracking)
            for method in METHODS
            for tracking in ("shared", "fresh")
        ),
        ("gan", "fresh"),
        ("scm", "fresh"),
        ("meanflow", "fresh"),
    ],
)
@pytest.mark.slow
def test_a_member_of_a_stack_is_the_same_as_alone(method: str, tracking: str):
    updates = {"fake_updates": 1 if tracking == "shared" else 2}
    objective = {"method": method, **updates, **OWN_SETTINGS.get(method, {})}
    variant = GaussianVariant.model_validate({"objective": objective, "tracking": tracking})
    config = recipe()
    members = [Member(3, 1e-2, 3e-3), Member(4, 1e-3, 3e-3), Member(4, 1e-2, 1e-2)]
    together = samples_of(config, variant, members, 6)
    untrained = samples_of(config, variant, members, 1)
    assert (together - untrained).abs().amax(dim=(1, 2)).min() > 1e-3
    for place, member in enumerate(members):
        (alone,) = samples_of(config, variant, [member], 6)
        assert (together[place] - alone).abs().max() < 2e-5


def distilled(
    objective: dict, iterations: int, world: str = "ring-4-steps", *overrides: str
) -> GaussianDistillation:
    """One member of a variant with fresh tracking, trained for some iterations."""
    variant = GaussianVariant.model_validate({"objective": objective, "tracking": "fresh"})
    config = recipe(*overrides)
    run = GaussianDistillation(config, config.worlds[world], variant, [Member(0, 3e-3, 1e-2)])
    for iteration in range(iterations):
        run.iterate(iteration)
    return run


@pytest.mark.slow
def test_a_discriminator_sees_nothing_before_the_fake_score_has_moved():
    """Silent heads teach nothing, and at first the two states that they are shown are one."""
    before, after = (distilled({"method": "adm"}, count).samples(64) for count in (0, 1))
    assert torch.equal(before, after)
    moved = distilled({"method": "adm"}, 5).samples(64)
    assert (moved - before).abs().max() > 1e-3
    silent = torch.zeros(4)
    assert hinge_discriminator_loss(silent, silent) == 2


@pytest.mark.slow
def test_each_phase_trains_an_expert_and_the_fake_score_starts_anew_between_them():
    objective = {"method": "phased_dmd", "high_iterations": 3, "fake_updates": 1}
    start, high, again, low = (weights_of(distilled(objective, count)) for count in (0, 3, 4, 5))
    names = [name for name in start if name.startswith("generator.experts")]
    trained = [
        {name for name in names if not torch.equal(first[name], second[name])}
        for first, second in ((start, high), (high, again), (again, low))
    ]
    # Beside a fake score that is the teacher again nothing is to be learned.
    assert all(trained[place] for place in (0, 2))
    assert not trained[1]
    assert all(name.startswith("generator.experts.0") for name in trained[0])
    assert all(name.startswith("generator.experts.1") for name in trained[2])
    # One update after the restart moves no weight by more than Adam's step, from where it began.
    fake = [name for name in start if name.startswith("fake_score")]
    apart, anew = (
        max((found[name] - start[name]).abs().max().item() for name in fake)
        for found in (high, again)
    )
    assert anew <= 1.01e-2 < apart


def weights_of(run: GaussianDistillation) -> dict[str, torch.Tensor]:
    networks = {"generator": run._generator, "fake_score": run._fake_score}
    return {
        f"{role}.{name}": value.detach().clone()
        for role, network in networks.items()
        for name, value in network.named_parameters()
    }


def test_phases_are_refused_in_worlds_without_a_step_at_their_boundary():
    variants = "variants={sgmd: {}, p: {objective: {method: phased_dmd}, tracking: fresh%s}}"
    with pytest.raises(ConfigError, match=r"variants\.p cannot be in the world ring: "):
        recipe(variants % "")
    config = recipe(variants % ", worlds: [ring-4-steps]")
    assert config.worlds_of("p") == ["ring-4-steps"]
    with pytest.raises(ConfigError, match="does not pay for the 1000 iterations"):
        num_iterations(config, StudyCell("ring-4-steps", "p"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "iterations"),
    [
        ({"method": "rcm", "matching_weight": 0.0, "fake_updates": 1}, 300),
        ({"method": "tmd", "stage": "meanflow", "fake_updates": 1}, 600),
    ],
    ids=["scm", "meanflow"],
)
def test_terms_on_data_alone_come_close_to_the_truth(objective: dict, iterations: int):
    sizes = ("batch_size=128", "networks.width=32", "num_samples=1024")
    world = "worlds={single: {dim: 2, modes: 1, spread: 0.5, num_steps: 1}}"
    before, after = (
        Truth(mixture_of(recipe(world).worlds["single"]), 1024).figures(
            distilled(objective, count, "single", *sizes, world).samples(1024)[0], 0
        )
        for count in (0, iterations)
    )
    assert before["spread"] == pytest.approx(2, abs=0.1)
    assert after["spread"] == pytest.approx(1, abs=0.15)
    assert after["energy"] < 0.02 < before["energy"]


@pytest.mark.slow
def test_sgmd_comes_close_to_the_truth_and_its_potential_narrows_the_spread():
    config = recipe("batch_size=64", "networks.width=32", "num_samples=1024")
    world = config.worlds["single"].model_copy(update={"dim": 4})
    truth, members = Truth(mixture_of(world), 1024), [Member(0, 1e-3, 1e-2), Member(1, 1e-3, 1e-2)]
    spread: dict[float, float] = {}
    for weight in (0.0, 0.2):
        variant = GaussianVariant.model_validate({"objective": {"lambda_nr": weight}})
        run = GaussianDistillation(config, world, variant, members)
        ((_, samples),) = measured_on_the_way(run, 400, 1, 1024)
        figures = [truth.figures(own, seed) for seed, own in enumerate(samples)]
        assert max(each["energy"] for each in figures) < 0.02
        spread[weight] = sum(each["spread"] for each in figures) / 2
    assert spread[0.0] == pytest.approx(1.0, abs=0.08)
    assert spread[0.2] < spread[0.0] - 0.07


class TestFigures:
    config = recipe()
    truth = Truth(mixture_of(config.worlds["ring"]), 2000)

    @pytest.mark.slow
    def test_of_the_truth_are_perfect(self):
        (floor,) = self.truth.floor([0])
        assert floor["energy"] == pytest.approx(0, abs=0.01)
        assert floor["on_mode"] == pytest.approx(0.99, abs=0.01)
        assert floor["spread"] == pytest.approx(1, abs=0.03)
        assert floor["lost_modes"] == 0

    def test_of_three_lost_modes_and_half_the_spread(self):
        mixture = self.truth.mixture
        narrow = type(mixture)(mixture.centres[3:], 0.1)
        samples = narrow.sample(2000, torch.Generator().manual_seed(0))
        found = self.truth.figures(samples, 0)
        assert found["lost_modes"] == 3
        assert found["spread"] == pytest.approx(0.5, abs=0.02)
        assert found["on_mode"] > 0.999
        assert found["energy"] > 0.1

    def test_of_samples_that_are_not_finite_are_no_numbers(self):
        samples = torch.full((2000, 2), float("nan"))
        assert all(value != value for value in self.truth.figures(samples, 0).values())


@pytest.mark.slow
@pytest.mark.usefixtures("forked_libraries")
def test_a_study_writes_tables_and_goes_on_where_it_was(tmp_path: Path):
    given = (
        f"output={tmp_path}",
        "worlds={ring: {dim: 2, forwards: 400}}",
        "variants={sgmd: {}, dmd2: {objective: {method: dmd2, fake_updates: 2}, tracking: fresh}}",
    )
    config, told = recipe(*given), list[str]()
    results = gaussian_study(config, told.append, num_processes=2)
    folder = config.folder
    assert {path.name for path in folder.glob("*.svg")} == {"ring-energy.svg", "ring-samples.svg"}
    rows = (folder / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * 3
    assert results.cell("ring", "dmd2").end.iteration == 30
    written = {path: path.read_bytes() for path in folder.glob("cells/*.json")}

    # One cell lost: only that one is made, with the same numbers.
    (folder / "cells" / "ring.dmd2.json").unlink()
    again = list[str]()
    repeated = gaussian_study(config, again.append, num_processes=1)
    assert "1 of them made before" in again[0]
    assert len(again) == 2
    assert repeated.cell("ring", "sgmd") == results.cell("ring", "sgmd")
    assert repeated.cell("ring", "dmd2").points == results.cell("ring", "dmd2").points
    # Other settings: nothing of it is taken.
    more = list[str]()
    gaussian_study(recipe(*given, "batch_size=18"), more.append, num_processes=1)
    assert "0 of them made before" in more[0]
    assert all(path.read_bytes() != content for path, content in written.items())


@pytest.mark.slow
@pytest.mark.usefixtures("forked_libraries")
def test_a_study_at_an_address_is_that_of_a_disk_and_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    given = (
        "worlds={ring: {dim: 2, forwards: 400}}",
        "variants={sgmd: {}, dmd: {objective: {method: dmd}, tracking: fresh}}",
    )
    disk, there = recipe(*given, f"output={tmp_path}"), recipe(*given, "output=memory://studies")
    results = gaussian_study(disk, lambda text: None, num_processes=1)
    gaussian_study(there, lambda text: None, num_processes=1)
    root = "/studies/gaussians-study"
    found = {path.removeprefix(f"{root}/") for path in files.find(root)}
    names = [path.relative_to(disk.folder) for path in disk.folder.rglob("*") if path.is_file()]
    assert found == {name.as_posix() for name in names}

    files.rm_file(f"{root}/cells/ring.sgmd.json")
    told = list[str]()
    again = gaussian_study(there, told.append, num_processes=1)
    assert told[0] == "2 cells, 1 of them made before, in memory://studies/gaussians-study"
    assert len(told) == 2
    for name in ("sgmd", "dmd"):
        assert again.cell("ring", name).points == results.cell("ring", name).points
    assert not Path("memory:").exists()


def test_a_broken_seed_is_counted_and_kept_out_of_means(tmp_path: Path):
    stored = {
        "world": "ring",
        "variant": "sgmd",
        "rates": [1e-3, 1e-3],
        "search": {"0.001/0.001": None},
        "points": [{"iteration": 1, "forwards": 8.0, "figures": {"energy": [0.1, None, 0.3]}}],
        "seconds": 1.0,
        "samples": [],
    }
    cell = CellResult.from_json(stored)
    assert cell.num_broken == 1
    assert json.loads(json.dumps(cell.to_json())) == stored
    pairs = paired_differences(cell.end.figures["energy"], [0.0, 0.0, 0.0])
    assert pairs == [0.1, 0.3]


def test_one_seed_that_breaks_moves_the_mean_and_hardly_the_median():
    figures = {name: [0.3, 0.2, 58.7, 0.4, 0.3] for name in FIGURES}
    cell = CellResult("ring", "sgmd", (1e-3, 1e-3), {}, (MeasuredPoint(1, 8.0, figures),), 1.0)
    broken = replace(cell, points=(MeasuredPoint(1, 8.0, {**figures, ENERGY: [0.3, *[nan] * 4]}),))
    (head, _, row), (_, _, other) = (
        gaussian_rows(GaussianResults(recipe(), (each,), {"ring": figures}), "ring")
        for each in (cell, broken)
    )
    place = head.index("median")
    assert row[place - 1].startswith("11.98")
    assert row[place] == "0.3000"
    assert other[place] == "not finite"


def test_a_jump_of_gradients_makes_a_step_as_long_as_adam_remembers():
    steps = {}
    for beta2 in (0.9, 0.999):
        layer = torch.nn.Linear(1, 1, bias=False)
        layer.weight = torch.nn.Parameter(torch.zeros(1, 1, 1))
        adam = MemberAdam(layer, [1e-2], beta2)
        for gradient in [1.0] * 20 + [1e6]:
            before = layer.weight.item()
            layer.weight.grad = torch.full((1, 1, 1), gradient)
            adam.step()
        steps[beta2] = before - layer.weight.item()
    for beta2, step in steps.items():
        # Its own square is 1 - beta2 of the mean of squares, which is divided by 1 - beta2^21.
        assert step == pytest.approx(1e-2 * ((1 - beta2**21) / (1 - beta2)) ** 0.5, rel=1e-3)
    assert steps[0.999] > 1.5 * steps[0.9]


@pytest.mark.slow
def test_a_sample_wider_than_the_hidden_layers_can_be_learned():
    """Without a path around eight units, 8 of 64 directions could move."""
    config = recipe("batch_size=64", "num_samples=256")
    world = config.worlds["single"].model_copy(update={"dim": 64, "spread": 0.2})
    members = [Member(0, 3e-3, 1e-2)]
    dmd = GaussianVariant.model_validate({"objective": {"method": "dmd"}, "tracking": "fresh"})
    run = GaussianDistillation(config, world, dmd, members)
    ((_, samples),) = measured_on_the_way(run, 300, 1, 256)
    before = 1 / 0.2
    found = Truth(mixture_of(world), 256).figures(samples[0], 0)["spread"]
    assert found < before / 2


@pytest.mark.slow
def test_a_variant_that_breaks_at_every_rate_is_a_row(tmp_path: Path):
    """So far apart that the squares of the teacher's distances are not numbers."""
    config = recipe(
        f"output={tmp_path}",
        "worlds={ring: {dim: 2, radius: 1.0e+30, forwards: 100}}",
        "variants={sgmd: {}}",
    )
    results = gaussian_study(config, lambda text: None, num_processes=1)
    cell = results.cell("ring", "sgmd")
    assert cell.num_broken == 3
    assert cell.rates == (1e-3, 3e-3)
    assert "sgmd (3 broken)" in (config.folder / "results.md").read_text()


def test_every_variant_has_the_same_budget():
    config = recipe("networks.width=64")
    for name, world in config.worlds.items():
        for variant in config.variants:
            if name not in config.worlds_of(variant):
                continue
            count = num_iterations(config, StudyCell(name, variant))
            spent, more = (
                each * units_per_iteration(config.schedule, world, config.variants[variant], each)
                for each in (count, count + 1)
            )
            assert spent <= world.forwards < more


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("baseline=dmd3", "baseline is dmd3, which is not one of the variants"),
        ("worlds={w: {dim: 4, modes: 5}}", "5 modes at right angles in 4 dimensions"),
        ("variants={sgmd: {objective: {fake_updates: 3}}}", "set tracking=fresh"),
        ("worlds={w: {forwards: 9}}", "pays for 1 iterations of 8"),
    ],
)
def test_refusals(override: str, words: str):
    with pytest.raises(ConfigError, match=words):
        dry_run_gaussian_study(recipe(override))


def test_the_recipe_of_another_command_says_which():
    with pytest.raises(ConfigError, match="sgmd study gaussians"):
        load_recipe("gaussians")


@pytest.mark.slow
def test_the_tables_file_can_be_read_back(tmp_path: Path):
    config = recipe(f"output={tmp_path}", "worlds={w: {forwards: 100}}", "variants={sgmd: {}}")
    results = gaussian_study(config, lambda text: None, num_processes=1)
    stored = read_json(str(config.folder / "results.json"))
    assert [CellResult.from_json(cell) for cell in stored["cells"]] == list(results.cells)


def test_a_recipe_on_top_of_this_one_is_one_too(tmp_path: Path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: gaussians\nnum_seeds: 3\n")
    assert is_gaussian_study(str(mine))
    assert not is_gaussian_study("tiny")
    assert load(GaussianStudyConfig, str(mine)).num_seeds == 3
