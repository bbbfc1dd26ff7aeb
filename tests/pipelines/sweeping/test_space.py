"""Spaces of settings: what a recipe may say, and the points that come of it."""

import re
from pathlib import Path

import optuna
import pytest

from cluster.storage import write_text
from pipelines.config.recipe import load_recipe
from pipelines.config.sweep import SweepSettings
from pipelines.sweeping.checks import checked_sweep
from pipelines.sweeping.run import dry_run_sweep
from pipelines.sweeping.search import listed_runs, num_runs
from pipelines.sweeping.space import MAX_CORNERS, at_share, corners, draw_point, share_of
from sgmd_core.errors import ConfigError

NR, RC, FORM = "objective.lambda_nr", "objective.lambda_rc", "objective.form"
FORMS = f"{FORM}: {{choice: [released, paper]}}"


def space(text: str, *more: str) -> SweepSettings:
    return load_recipe("tiny", ["sweep.grid={}", f"sweep.space={{{text}}}", *more]).sweep


def refusal(*settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", ["sweep.grid={}", *settings])
    return str(caught.value)


class TestPoints:
    def test_a_key_with_a_condition_is_drawn_where_it_holds_and_nowhere_else(self):
        sweep = space(
            f"{RC}: {{log_uniform: [0.1, 10.0], when: {{{FORM}: released}}}}, {FORMS}",
            "sweep.search=random",
        )
        assert list(sweep.dimensions) == [FORM, RC]
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        points = [draw_point(sweep.dimensions, study.ask()) for _ in range(50)]
        forms = [point[FORM] for point in points]
        assert {"released", "paper"} == set(forms)
        assert all((RC in point) == (point[FORM] == "released") for point in points)
        assert all(0.1 <= point[RC] <= 10 for point in points if RC in point)
        # Spread by the logarithm: half of them below the geometric mean.
        values = [point[RC] for point in points if RC in point]
        assert 0.25 < sum(value < 1 for value in values) / len(values) < 0.75

    def test_a_grid_has_the_conditional_key_in_its_branch_alone(self):
        config = load_recipe(
            "tiny",
            [
                f"sweep.grid={{{FORM}: [released, paper]}}",
                f"sweep.space={{{RC}: {{choice: [0.5, 1.0], when: {{{FORM}: released}}}}}}",
                "sweep.seeds=[3, 4]",
            ],
        )
        runs = listed_runs(config)
        assert [point for point, seed in runs if seed == 3] == [
            {FORM: "released", RC: 0.5},
            {FORM: "released", RC: 1.0},
            {FORM: "paper"},
        ]
        assert num_runs(config) == len(runs) == 6

    def test_random_points_depend_on_the_seed_of_the_recipe_alone(self):
        settings = [
            "sweep.grid={}",
            f"sweep.space={{{NR}: {{uniform: [0.0, 1.0]}}}}",
            "sweep.search=random",
            "sweep.trials=3",
        ]
        first, again = (listed_runs(load_recipe("tiny", settings)) for _ in range(2))
        other = listed_runs(load_recipe("tiny", [*settings, "seed=1"]))
        assert first == again
        assert len({point[NR] for point, _ in (*first, *other)}) == 6

    def test_whole_numbers_stay_whole(self):
        sweep = space("generator.num_steps: {integers: [2, 6]}", "sweep.search=random")
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        drawn = {
            draw_point(sweep.dimensions, study.ask())["generator.num_steps"] for _ in range(60)
        }
        assert drawn == {2, 3, 4, 5, 6}
        assert all(isinstance(value, int) for value in drawn)

    def test_shares_of_a_range_are_undone(self):
        for text in ("uniform: [1.0, 3.0]", "log_uniform: [0.01, 100.0]"):
            (dimension,) = space(f"{NR}: {{{text}}}", "sweep.search=random").dimensions.values()
            for share in (0.0, 0.25, 1.0):
                assert share_of(dimension, at_share(dimension, share)) == pytest.approx(share)


class TestCorners:
    def test_all_combinations_of_ends_and_choices(self):
        sweep = space(
            f"{FORMS}, {NR}: {{uniform: [0.1, 0.2]}}, "
            f"{RC}: {{uniform: [1.0, 2.0], when: {{{FORM}: released}}}}",
            "sweep.search=random",
        )
        found = corners(sweep.dimensions)
        assert len(found) == 2 * 2 + 2
        assert {FORM: "paper", NR: 0.2} in found
        assert {FORM: "released", NR: 0.1, RC: 2.0} in found

    @pytest.mark.slow
    def test_a_large_space_has_every_value_of_every_key(self):
        keys = ["objective.lambda_nr", "objective.lambda_rc", "generator.ema_decay"]
        lists = ", ".join(
            f"{key}: {{choice: {[each / 20 for each in range(1, 20)]}}}" for key in keys
        )
        sweep = space(lists, "sweep.search=random")
        found = corners(sweep.dimensions)
        assert len(found) < MAX_CORNERS < 19**3
        for key in keys:
            assert {point[key] for point in found} == {each / 20 for each in range(1, 20)}


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (f"{NR}: {{uniform: [1.0, 0.0]}}", "expected the smaller end first"),
            (f"{NR}: {{log_uniform: [0.0, 1.0]}}", "expected more than 0"),
            (f"{NR}: {{uniform: [0.1, 1.0], choice: [1]}}", "one of choice, uniform"),
            (f"{NR}: {{choice: [0.1], when: {{{FORM}: paper}}}}", "which is not searched beside"),
            (f"{FORMS}, {NR}: {{choice: [0.1], when: {{{FORM}: both}}}}", "not one of its choices"),
            (f"{NR}: {{uniform: [0.0, 1.0]}}", "a range has no grid"),
            (f"{NR}: {{uniform: [-1.0, 1.0]}}", "lambda_nr"),
        ],
    )
    def test_a_space_that_makes_no_sense(self, settings: str, words: str):
        search = "grid" if "no grid" in words else "random"
        assert words in refusal(f"sweep.space={{{settings}}}", f"sweep.search={search}")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("setting", "words"),
        [
            (f"sweep.grid={{{NR}: [0.1, 0.2, 0.1]}}", f"{NR} has 0.1 more than once"),
            (f"sweep.grid={{{NR}: [1, 1.0]}}", f"{NR} has 1.0 more than once"),
            ("sweep.grid={seed: [1, 2]}", "seeds runs a point with several"),
            ("sweep.grid={iterations: [10, 20]}", "all trials have those of sweep.iterations"),
            ("sweep.grid={validation.every: [0, 20]}", "validated at sweep.validate_every"),
            ("sweep.grid={sweep.iterations: [10, 20]}", "sweep.iterations cannot be searched"),
            ("sweep.settings={iterations: 20}", "iterations cannot be one of sweep.settings"),
            ("sweep.settings={validation.every: 5}", "validated at sweep.validate_every"),
            ("sweep.settings={sweep.iterations: 5}", "a trial does not read it"),
            ("sweep.settings={output: elsewhere}", "in the folder of the sweep"),
        ],
    )
    def test_what_compares_nothing_is_refused_of_a_new_sweep_alone(
        self, setting: str, words: str, shapes_recipe: tuple[str, ...]
    ):
        """Recipes that older sweeps and their trials have kept are read, and go on."""
        config = load_recipe("tiny", [*shapes_recipe, setting])
        with pytest.raises(ConfigError, match=re.escape(words)):
            checked_sweep(config)
        with pytest.raises(ConfigError, match=re.escape(words)):
            dry_run_sweep(config)

    @pytest.mark.slow
    def test_a_sweep_that_began_with_a_value_twice_goes_on(self, shapes_recipe: tuple[str, ...]):
        values = f"sweep.grid={{{NR}: [0.1, 0.1]}}"
        assert checked_sweep(load_recipe("tiny", [*shapes_recipe, values]), is_new=False) == 0

    def test_true_is_another_value_than_one(self):
        assert not list(SweepSettings(grid={"a": [1, True], "b": [[1], [True]]}).unsearchable())
        assert list(SweepSettings(grid={"b": [[1], [1.0]]}).unsearchable())

    def test_a_scheduler_without_validations_on_the_way(self):
        text = refusal("sweep.scheduler.method=asha", f"sweep.space={{{NR}: {{choice: [1.0]}}}}")
        assert "set validate_every below iterations (40)" in text

    def test_a_scheduler_with_several_seeds(self):
        text = refusal("sweep.scheduler.method=asha", "sweep.validate_every=5", "sweep.seeds=[1,2]")
        assert "the mean over seeds needs all of them" in text

    def test_a_population_that_is_none(self):
        text = refusal("sweep.search=pb2", "sweep.trials=2", f"sweep.space={{{FORMS}}}")
        for words in (
            "uniform and log_uniform keys only",
            "expected 4 or more",
            "validate_every",
            "concurrent_trials is 1, expected all 2 trials",
        ):
            assert words in text

    @pytest.mark.slow
    def test_a_corner_that_does_not_fit_is_named(self, shapes_recipe: tuple[str, ...]):
        # Each value fits alone: 16 samples in one part, or 4 samples in 4 parts.
        config = load_recipe(
            "tiny",
            [
                *shapes_recipe,
                "sweep.grid={batch.size: [2, 16], batch.micro_batches: [2, 4]}",
                "sweep.settings={topology.mode: local}",
            ],
        )
        with pytest.raises(ConfigError, match="some would be empty") as caught:
            checked_sweep(config)
        assert "of the trial with batch.size=2, batch.micro_batches=4" in caught.value.__notes__

    @pytest.mark.slow
    def test_a_corner_that_the_networks_cannot_make_is_named(self, shapes_recipe: tuple[str, ...]):
        config = load_recipe("tiny", [*shapes_recipe, "sweep.grid={video.num_frames: [13, 14]}"])
        with pytest.raises(Exception, match="14") as caught:
            checked_sweep(config)
        assert "of the trial with video.num_frames=14" in caught.value.__notes__

    @pytest.mark.slow
    def test_trials_too_short_for_a_part_of_their_method_are_warned_of(
        self, shapes_recipe: tuple[str, ...], caplog: pytest.LogCaptureFixture
    ):
        warmup = "objective.off_trajectory_warmup=60"  # of 100 iterations, and 40 of a trial
        config = load_recipe("tiny-cdm", [*shapes_recipe, warmup])
        assert "off_trajectory_warmup" not in caplog.text
        checked_sweep(config)
        assert "trials of the sweep: iterations 40 end within" in caplog.text

    @pytest.mark.slow
    def test_a_dry_run_refuses_the_folder_that_the_sweep_would(
        self, shapes_recipe: tuple[str, ...], tmp_path: Path
    ):
        config = load_recipe("tiny", ["output=/dev/null/runs"])
        with pytest.raises(ConfigError, match="/dev/null is a device"):
            dry_run_sweep(config)
        config = load_recipe("tiny", [*shapes_recipe, f"output={tmp_path}"])
        with pytest.raises(ConfigError, match=r"no recipe\.yaml there"):
            dry_run_sweep(config, resume=True)
        assert dry_run_sweep(config, resume="auto") == dry_run_sweep(config)
        write_text(str(tmp_path / "tiny-sweep" / "recipe.yaml"), config.to_yaml())
        with pytest.raises(ConfigError, match="another one is there"):
            dry_run_sweep(config)
        assert dry_run_sweep(config, resume=True) == dry_run_sweep(config, resume="auto")
        other = config.with_settings({"sweep.iterations": 7})
        with pytest.raises(ConfigError, match=r"sweep\.iterations"):
            dry_run_sweep(other, resume=True)

    @pytest.mark.slow
    def test_a_dry_run_of_a_sweep_that_goes_on_checks_it_as_an_old_one(
        self, shapes_recipe: tuple[str, ...], tmp_path: Path
    ):
        values = f"sweep.grid={{{NR}: [0.1, 0.1]}}"
        config = load_recipe("tiny", [*shapes_recipe, values, f"output={tmp_path}"])
        write_text(str(tmp_path / "tiny-sweep" / "recipe.yaml"), config.to_yaml())
        assert dry_run_sweep(config, resume=True)["trials"] == 2
