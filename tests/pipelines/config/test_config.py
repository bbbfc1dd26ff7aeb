"""Recipes and overrides: what is read, what is refused, and in which words."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config.methods import METHODS, method_name
from pipelines.config.overrides import apply_overrides, nearest_key, parse_override
from pipelines.config.recipe import DistillConfig, check_sweep, json_schema, load_recipe
from pipelines.config.recipe_files import find_recipe, load, recipe_sections, shipped_recipes
from pipelines.config.settings_check import known_keys
from pipelines.config.unread import warn_of_foreign_sections
from pipelines.config.yaml_text import read_yaml
from pipelines.study.plan import plan_study
from sgmd_core.errors import ConfigError
from tests.helpers.logs import record_warnings

NAMES = [recipe.name for recipe in shipped_recipes()]
DISTILL_NAMES = [
    name for name in NAMES if name not in ("pretrain-tiny", "pretrain-open", "gaussians")
]


FRESH = "fake_score.tracking=fresh"
SHUFFLED = ("fake_score.gap=shuffled",)


def refusal(*overrides: str, recipe: str = "tiny") -> str:
    """The words in which a recipe with these overrides is refused."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(load_recipe("tiny").to_yaml())
    return path


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("2e-5", 2e-5),
            ("1e3", 1000.0),
            (".5", 0.5),
            ("-3", -3),
            ("010", 10),
            ("off", "off"),
            ("no", "no"),
            ("1:30", "1:30"),
            ("2026-01-01", "2026-01-01"),
            ("true", True),
            ("null", None),
            ("'1'", "1"),
            ("[1, 2e-1]", [1, 0.2]),
            ("{a: 1}", {"a": 1}),
        ],
    )
    def test_scalars_mean_what_people_expect(self, text, value):
        assert read_yaml(text) == value
        assert type(read_yaml(text)) is type(value)

    def test_a_key_given_twice_is_refused(self):
        with pytest.raises(yaml.YAMLError, match="'lr' is given twice"):
            read_yaml("lr: 1\nlr: 2")


class TestOverrides:
    def test_an_override_is_a_dotted_key_and_a_yaml_value(self):
        override = parse_override("objective.lambda_nr=5e-2")
        assert override.key == ("objective", "lambda_nr")
        assert override.value == 0.05

    def test_a_value_may_hold_an_equals_sign(self):
        assert parse_override("data.train=s3://a/b?c=d").value == "s3://a/b?c=d"

    @pytest.mark.parametrize("text", ["seed", "=1", "a..b=1", ".a=1", "a=[1, 2"])
    def test_what_is_no_override_is_refused_with_an_example(self, text):
        with pytest.raises(ConfigError, match=r"For example objective\.lambda_nr=0\.05"):
            parse_override(text)

    def test_a_comment_that_would_cut_a_value_off_is_refused(self):
        for text in ("name=a #1", "name=#1", "a.b=[1, 2] # two", "a.b=[1, 2 # two\n]"):
            with pytest.raises(ConfigError, match=r"a comment of YAML.*#"):
                parse_override(text)
        for text in ("a.b=[a #1, b]", "a.b={c: d #1}", "a.b=[#1]"):
            with pytest.raises(ConfigError, match=r"Put a value with a # in quotes"):
                parse_override(text)
        assert parse_override('a.b=["a #1", b#2]').value == ["a #1", "b#2"]
        assert parse_override('name="a #1"').value == "a #1"
        assert parse_override("data.train=s3://b/p#1").value == "s3://b/p#1"
        assert parse_override("name=").value is None

    def test_later_overrides_win_and_the_settings_stay_as_they_are(self):
        before = {"a": {"b": 1, "c": 2}}
        after = apply_overrides(before, [parse_override("a.b=3"), parse_override("a.b=4")])
        assert after == {"a": {"b": 4, "c": 2}}
        assert before == {"a": {"b": 1, "c": 2}}

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["seed=1", "seed=2"], "seed=1 and seed=2"),
            (["seed=1", "seed=1"], "seed=1 and seed=1"),
            (["batch.size=8", "batch={size: 16}"], 'batch.size=8 and batch={"size": 16}'),
            (["batch={size: 16}", "batch.size=8"], 'batch={"size": 16} and batch.size=8'),
            (["batch.micro_batches=2", "batch={size: 16}"], "batch.micro_batches=2 and batch="),
            (["topology.window=2", "topology.depth=3"], "topology.window=2 and topology.depth=3"),
        ],
    )
    def test_a_setting_that_is_given_twice_is_refused_with_both_values(self, overrides, words):
        for command in (["distill", "tiny"], ["submit", "tiny"], ["distill", "--resume", "RUN"]):
            found = CliRunner().invoke(app, [*command, *overrides])
            assert isinstance(found.exception, SystemExit)
            assert found.exit_code == 2
            assert words in " ".join(found.stderr.split())
            assert "Expected each setting once" in " ".join(found.stderr.split())

    @pytest.mark.parametrize("where", ["sweep.settings", "study.settings", "study.variants"])
    def test_a_setting_that_trials_or_variants_are_given_twice_is_refused(self, where):
        twice = "topology.mode: local, topology: {mode: fused}"
        table = f"{{one: {{{twice}}}}}" if where == "study.variants" else f"{{{twice}}}"
        with pytest.raises(ConfigError, match="each setting once"):
            plan_study(load_recipe("tiny", [f"{where}={table}"]))

    def test_a_section_and_a_setting_that_it_leaves_open_are_both_taken(self):
        batch = load_recipe("tiny", ["batch={size: 16}", "batch.micro_batches=4"]).batch
        assert (batch.size, batch.micro_batches) == (16, 4)

    def test_a_value_cannot_be_entered_like_a_section(self):
        assert "seed is the value 0" in refusal("seed.x=1")

    @pytest.mark.parametrize(
        "key", ["generator.compute.ring", "teacher.compute.ring_degree", "compute.ring"]
    )
    def test_ring_attention_is_said_not_to_be_offered_with_what_is(self, key):
        found = refusal(f"{key}=2")
        assert f"{key} is not a setting: ring attention is not offered" in found
        assert "compute.ulysses of a role" in found
        assert "ring attention" not in refusal("generator.compute.rung=2")

    @pytest.mark.parametrize(
        ("unknown", "nearest"),
        [
            ("objective.lambda_n", "objective.lambda_nr"),
            ("lambda_rc", "objective.lambda_rc"),
            ("generator.lr", "generator.optimizer.lr"),
            ("fake_score.lr", "fake_score.optimizer.lr"),
            ("fakescore.tracking", "fake_score.tracking"),
            ("itertions", "iterations"),
            ("objective.LAMBDA_NR", "objective.lambda_nr"),
            ("Iterations", "iterations"),
            ("batch_size", "batch.size"),
            ("zzzzzz", None),
        ],
    )
    def test_an_unknown_key_finds_the_one_that_was_meant(self, unknown, nearest):
        assert nearest_key(unknown, known_keys(DistillConfig)) == nearest


class TestRecipes:
    @pytest.mark.parametrize("name", DISTILL_NAMES)
    def test_shipped_recipes_are_valid_and_complete(self, name):
        config = load_recipe(name)
        written = read_yaml((Path(shipped_path(name))).read_text())
        if "base" in written:
            # A section of its own, as another method needs, has all of that method's settings.
            own = written.get("objective")
            assert own is None or set(own) == set(dataclasses.asdict(config.objective))
            written = recipe_sections(shipped_path(name), DistillConfig)
        missing = [key for key in set_keys(config.model_dump()) if not is_written(key, written)]
        assert [key for key in missing if not key.startswith(("sweep", "study"))] == []
        assert config.name == name

    @pytest.mark.parametrize("name", NAMES)
    def test_every_recipe_opens_with_what_it_is(self, name):
        summary = next(recipe.summary for recipe in shipped_recipes() if recipe.name == name)
        assert len(summary) > 20

    @pytest.mark.parametrize("name", DISTILL_NAMES)
    def test_a_resolved_recipe_reads_back_as_itself(self, name, tmp_path):
        config = load_recipe(name, ["generator.optimizer.lr=2e-5"])
        path = tmp_path / "config.yaml"
        path.write_text(config.to_yaml())
        assert load_recipe(str(path)) == config

    def test_a_config_travels_by_pickle(self):
        config = load_recipe("tiny")
        assert pickle.loads(pickle.dumps(config)) == config

    def test_sections_are_the_components_own_records(self):
        config = load_recipe("tiny", ["generator.optimizer.betas=[0.5, 0.9]"])
        assert config.generator.optimizer.betas == (0.5, 0.9)
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.objective.__setattr__("lambda_nr", 1.0)

    def test_a_whole_number_is_taken_for_a_number(self):
        assert load_recipe("tiny", ["schedule.shift=3"]).schedule.shift == 3.0

    def test_wan_takes_the_released_trainers_figures(self):
        config = load_recipe("wan21-1.3b")
        assert config.generator.optimizer.lr == 2e-6
        assert config.fake_score.optimizer.lr == 4e-7
        assert config.generator.optimizer.betas == (0.0, 0.999)
        assert config.teacher.guidance_scale == 3.0
        assert config.schedule.shift == 5.0
        assert config.objective.form == "released"

    def test_the_model_folder_is_looked_for_here_and_then_in_the_source_tree(
        self, tmp_path, monkeypatch
    ):
        config = load_recipe("tiny", ["model.folder=assets/tiny-wan"])
        monkeypatch.chdir(tmp_path)
        assert config.model_folder.is_absolute()
        assert config.model_folder.is_dir()
        (tmp_path / "assets" / "tiny-wan").mkdir(parents=True)
        assert config.model_folder == Path("assets/tiny-wan")

    def test_a_recipe_is_found_by_its_old_name_with_a_warning(self, monkeypatch):
        warnings = record_warnings("pipelines.config.recipe_files", monkeypatch)
        assert load_recipe("wan-1.3b") == load_recipe("wan21-1.3b")
        assert warnings == ["the recipe wan-1.3b is now called wan21-1.3b: write that"]

    def test_a_setting_of_pools_that_the_mode_does_not_read_is_told_once(self, monkeypatch):
        warnings = record_warnings("pipelines.config.recipe", monkeypatch)
        load_recipe("tiny", ["topology.mode=fused", "topology.fused.cpus=1", "batch.size=8"])
        assert warnings == []
        load_recipe("tiny", ["topology.mode=fused", "topology.pools.learn.cpus=1"])
        assert warnings == ["topology.mode fused does not read topology.pools.learn.cpus"]

    @pytest.mark.parametrize(
        ("given", "on", "told"),
        [
            ("lag.updates=8", "lag.every=5", "lag.every 0 leaves lag.updates out"),
            ("checkpoint.score=colour", "", "validation.every 0 leaves checkpoint.score out"),
            ("tracker.project=x", "tracker.wandb=offline", "tracker.wandb off leaves"),
            ("generator.diversity.anchor_step=3", "generator.diversity.weight=0.1", "weight 0.0"),
            ("generator.optimizer.final_lr_ratio=0.1", "", "generator.optimizer.decay constant"),
            ("guards.spike_window=9", "guards.spike_factor=9", "guards.spike_factor null leaves"),
            ("topology.feed.cpus=2", "topology.mode=map", "topology.mode local leaves"),
            ("discriminator.width=64", "", "objective.method sgmd does not read discriminator"),
            ("checkpoint.keep_best=0", "", ""),
            ("batch.size=8", "", ""),
        ],
    )
    def test_a_setting_that_another_one_leaves_out_is_told(self, given, on, told, monkeypatch):
        warnings = record_warnings("pipelines.config.recipe", monkeypatch)
        off = ["topology.mode=local"]
        off += ["validation.every=0"] if given.startswith("checkpoint") else []
        load_recipe("tiny", [*off, given])
        assert [told in text for text in warnings] == [True] * bool(told), warnings
        if on:
            warnings.clear()
            load_recipe("tiny", [on, given])
            assert warnings == []

    @pytest.mark.parametrize(
        ("given", "elsewhere", "of_no_use"),
        [
            ("lag.updates=8", "sweep.settings={lag.every: 5}", "sweep.settings={lag.batches: 5}"),
            ("lag.updates=8", "study.settings={lag.every: 5}", "study.settings={batch.size: 8}"),
            (
                "discriminator.width=64",
                "study.variants={a: {objective.method: adm, fake_score.tracking: fresh}}",
                # Its term of a discriminator is off unless it is set.
                "study.variants={a: {objective.method: dmd2, fake_score.tracking: fresh}}",
            ),
            ("checkpoint.score=frechet", "sweep.validate_every=2", "study.seeds=[1]"),
            ("checkpoint.score=frechet", "sweep.iterations=9", "study.measurements=2"),
        ],
    )
    def test_what_a_trial_or_a_variant_reads_is_not_told(
        self, given, elsewhere, of_no_use, monkeypatch
    ):
        warnings = record_warnings("pipelines.config.recipe", monkeypatch)
        off = ["study.variants={a: {}}", "validation.every=0", given]
        load_recipe("tiny", [*off, of_no_use])
        assert len(warnings) == 1
        load_recipe("tiny", [*off, elsewhere])
        assert len(warnings) == 1, warnings

    def test_a_recipe_with_a_base_holds_what_it_has_otherwise(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text(
            "base: tiny\nname: mine\nobjective: {method: dmd}\nstudy: {variants: {one: {}}}\n"
        )
        config, base = load_recipe(str(path)), load_recipe("tiny")
        assert config == base.with_settings(
            {"name": "mine", "objective.method": "dmd", "study.variants": {"one": {}}}
        )
        above = tmp_path / "above.yaml"
        above.write_text("base: mine.yaml\ngenerator: {optimizer: {lr: 2.0e-5}}\n")
        assert load_recipe(str(above), ["batch.size=8"]) == config.with_settings(
            {"generator.optimizer.lr": 2e-5, "batch.size": 8}
        )

    def test_a_base_that_is_nowhere_is_told_with_the_recipe_that_names_it(self, tmp_path):
        path = tmp_path / "mine.yaml"
        path.write_text("base: other.yaml\n")
        with pytest.raises(ConfigError, match=f"neither beside {path} nor seen from"):
            load_recipe(str(path))

    @pytest.mark.parametrize(
        ("name", "words"),
        [("tinny", "the nearest one is tiny"), ("tiny.yaml", "called tiny, without the suffix")],
    )
    def test_a_recipe_that_ships_is_found_by_its_name_alone(
        self, tmp_path, monkeypatch, name, words
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match=words):
            load_recipe(name)

    @pytest.mark.parametrize("base", ["7", "mine.yaml"])
    def test_a_base_that_is_none_is_refused(self, tmp_path, base):
        path = tmp_path / "mine.yaml"
        path.write_text(f"base: {base}\n")
        with pytest.raises(ConfigError, match="base is"):
            load_recipe(str(path))

    def test_an_unknown_recipe_names_those_that_ship(self):
        text = refusal(recipe="tinny")
        assert "tiny" in text
        assert "wan21-1.3b" in text

    @pytest.mark.slow
    def test_a_run_stands_for_the_settings_in_its_folder(self, tmp_path, monkeypatch):
        run = tmp_path / "runs" / "mine"
        run.mkdir(parents=True)
        with pytest.raises(ConfigError, match=r"no config.yaml in this folder"):
            load_recipe(str(run))
        (run / "config.yaml").write_text(load_recipe("tiny", ["seed=7"]).to_yaml())
        monkeypatch.chdir(tmp_path / "runs")
        for name in (str(run), f"{run}/", "mine", "./mine", str(run / "config.yaml")):
            assert load_recipe(name, ["iterations=3"]).seed == 7
        # A recipe that ships comes before a folder that is called the same.
        (tmp_path / "runs" / "tiny").mkdir()
        assert load_recipe("tiny").seed != 7
        assert str(find_recipe("s3://bucket/runs/mine")).endswith("/runs/mine/config.yaml")
        assert str(find_recipe("s3://bucket/mine.yaml")).endswith("/mine.yaml")

    def test_a_missing_file_says_how_to_get_one(self):
        assert "sgmd recipes copy" in refusal(recipe="no/such.yaml")

    def test_text_that_is_no_yaml_names_file_and_line(self, tmp_path):
        path = tmp_path / "broken.yaml"
        path.write_text("name: a\nbatch: [1, 2\n")
        text = refusal(recipe=str(path))
        assert str(path) in text
        assert "line" in text

    def test_a_file_without_sections_is_refused(self, tmp_path):
        path = tmp_path / "list.yaml"
        path.write_text("- 1\n- 2\n")
        assert "sections and keys" in refusal(recipe=str(path))


class TestRefusals:
    def test_a_default_that_takes_the_place_of_a_wrong_value_is_not_wrong_itself(self):
        settings = ["decay=cosine", "decay_iterations=100", "warmup_iterations=200"]
        with pytest.raises(ConfigError) as refused:
            load_recipe("tiny", [f"generator.optimizer.{one}" for one in settings])
        assert "decay_iterations is 100, expected more than the 200" in str(refused.value)
        assert "settings are wrong" not in str(refused.value)

    def test_an_unknown_key_names_the_nearest_one_and_the_file(self, recipe_file):
        text = refusal("objective.lambda_nrr=1", recipe=str(recipe_file))
        assert "objective.lambda_nrr is not a setting" in text
        assert "the nearest one is objective.lambda_nr" in text
        assert str(recipe_file) in text

    def test_an_unknown_key_in_the_file_is_refused_too(self, recipe_file):
        recipe_file.write_text(recipe_file.read_text() + "\ncheckpnt: {every: 1}\n")
        text = refusal(recipe=str(recipe_file))
        assert "checkpnt is not a setting; the nearest one is checkpoint" in text

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("batch.size=many", 'batch.size is "many", expected a whole number'),
            ("batch.size=2.5", "batch.size is 2.5, expected a whole number"),
            ("video.width='32'", 'video.width is "32", expected a whole number'),
            ("objective.lambda_nr='0.1'", 'objective.lambda_nr is "0.1", expected a number'),
            ("objective.lambda_nr=true", "objective.lambda_nr is true, expected a number"),
            ("generator.optimizer.lr=fast", 'generator.optimizer.lr is "fast", expected a number'),
            ("schedule.shift=.inf", "expected a finite number"),
            ("name=3", "name is 3, expected text"),
            ("name=a/b", 'name is "a/b", expected letters'),
            ("video=3", "video is 3, expected a section"),
            ("model=~", "model is null, expected a section"),
            (
                "generator.compute.checkpointing=yes",
                "compute.checkpointing is \"yes\", expected true or false, or 'selective' or",
            ),
            ("model.negative_prompt=", 'is null, expected text; an empty one is written ""'),
            ("topology.pools={}", "topology.pools is {}, expected at least 1 value"),
            ("topology.mode=ray", "expected 'map', 'pools', 'fused' or 'local'"),
            ("iterations=0", "iterations is 0, expected greater than or equal to 1"),
            ("objective.lambda_nr=-1", "objective: lambda_nr is -1.0"),
            ("generator.optimizer.lr=-1", "generator.optimizer: optimizer.lr is -1.0"),
            ("topology.generator={cpus: 0}", "cpus and gpus are both 0"),
            ("topology.teacher.strategy=tight", "topology.teacher.strategy is"),
            ("topology.text.resources={h100: 0}", "expected greater than 0"),
        ],
    )
    def test_a_wrong_value_is_named_with_what_was_expected(self, override, words):
        assert words in refusal(override)

    def test_a_missing_key_is_named(self, recipe_file):
        settings = yaml.safe_load(recipe_file.read_text())
        del settings["model"]["folder"], settings["batch"]
        recipe_file.write_text(yaml.safe_dump(settings))
        text = refusal(recipe=str(recipe_file))
        assert "model.folder is missing" in text
        assert "batch is missing" in text

    def test_all_that_is_wrong_is_said_at_once(self):
        text = refusal("batch.size=many", "objective.lambda_n=1", "generator.optimizer.lr=-1")
        assert "3 settings are wrong" in text
        assert "batch.size" in text
        assert "objective.lambda_nr" in text
        assert "optimizer.lr" in text

    def test_a_wrong_value_hides_no_other_value_of_its_section_and_no_contradiction(self):
        text = refusal(
            "seed=-1",
            "generator.num_steps=0",
            "generator.ema_decay=2",
            "generator.optimizer.lr=-1",
            "batch.micro_batches=16",
            "batch.exit_draws=3",
            "schedule.shift=0",
            "schedule.score_sigma_min=3",
            "objective.method=none",
        )
        assert "8 settings are wrong" in text
        for words in (
            "seed is -1",
            "generator.num_steps is 0",
            "generator.ema_decay is 2.0",
            "optimizer.lr is -1.0",
            "does not divide batch.micro_batches 16",
            "shift is 0.0",
            "score_sigma_min is 3.0",
            'objective.method is "none"',
        ):
            assert text.count(words) == 1

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["batch.micro_batches=33"], "is more than the samples of a batch"),
            (["topology.mode=pools", "topology.teacher.replicas=17"], "some would never work"),
            (
                ["topology.mode=pools", "topology.generator.ranks=9"],
                "topology.generator.ranks is 9: some ranks would never have one",
            ),
            (["topology.pools.learn.ranks=9"], "topology.pools.learn.ranks is 9"),
            (["topology.generator.ranks=2"], "which only topology.mode pools reads"),
            (["topology.roles.teacher=[learn, other]"], "names the pool 'other', and topology"),
            (["topology.roles.fake_score=learn", "topology.roles.teacher=learn"], "no role there"),
            (["topology.pools={text: {ranks: 1}}"], "a pool called text"),
            (["topology.stage_seconds={rollout: 2}"], "keys are like generator.rollout"),
            (
                ["topology.mode=fused", "topology.fused.ranks=16"],
                "topology.fused.ranks is 16: some ranks would never",
            ),
            (
                ["topology.mode=local", "topology.fake_score.ranks=2"],
                "topology.fake_score.ranks is 2, but topology.mode local is one process",
            ),
            (
                [
                    "topology.pools={a: {ranks: 1}}",
                    "topology.roles={generator: a, fake_score: a, teacher: a}",
                    "topology.max_staleness_iterations=1",
                ],
                "in topology.mode map they take turns",
            ),
            (
                ["topology.mode=fused", "topology.max_staleness_iterations=1"],
                "in topology.mode fused they take turns",
            ),
            (["topology.mode=local", "topology.address=auto"], "topology.mode local uses no Ray"),
            (
                [
                    "topology.mode=fused",
                    "topology.fused.ranks=2",
                    "teacher.compute={precision: bf16, weights: fp8}",
                ],
                "set teacher.sharded=false",
            ),
            (["data.validation=''"], "data.validation names no captions"),
            (
                ["topology.mode=local", "fake_score.compute.ulysses=2"],
                "fake_score.compute.ulysses 2 wants that many ranks, but topology.mode local is",
            ),
            (
                [
                    "topology.mode=fused",
                    "topology.fused.ranks=3",
                    "generator.compute.ulysses=2",
                ],
                "generator.compute.ulysses 2 does not divide the 3 ranks",
            ),
            (
                [
                    "topology.mode=fused",
                    "topology.fused.ranks=4",
                    "batch={size: 2, micro_batches: 2}",
                    "generator.compute.ulysses=4",
                    "fake_score.compute.ulysses=2",
                ],
                "some ranks would never have one of their own",
            ),
            (
                [
                    "topology.mode=fused",
                    "topology.fused.ranks=2",
                    "objective={method: rcm}",
                    "generator.compute.ulysses=2",
                ],
                "generator.compute.ulysses 2 has no derivative in forward mode, which rcm takes",
            ),
            (["generator.compute.attention=flashy"], "'native', 'flash'"),
            (
                ["generator.compute={precision: bf16, attention: flash}"],
                "generator.compute.attention flash runs on GPUs, and topology.pools.learn.gpus is",
            ),
            (
                [
                    "topology.mode=local",
                    "objective={method: sid}",
                    "teacher.compute={precision: bf16, attention: sage}",
                ],
                "sage has no gradients, and sid takes one through the teacher's input",
            ),
            (
                [
                    "topology.mode=local",
                    "objective={method: rcm}",
                    "generator.compute.attention=_native_flash",
                ],
                "_native_flash has no derivative in forward mode, which rcm takes",
            ),
        ],
    )
    def test_contradictions_are_met_before_anything_starts(self, overrides, words):
        assert words in refusal(*overrides)

    def test_a_replica_whose_ranks_work_together_needs_one_sample(self):
        settings = ["topology.mode=pools", "topology.teacher={ranks: 2}"]
        settings += ["batch={size: 1, micro_batches: 1}", "sweep.grid={}"]
        together = [*settings, "teacher.compute.ulysses=2"]
        assert load_recipe("wan21-1.3b", together).topology.teacher.ranks == 2
        assert "some ranks would never have one" in refusal(*settings, recipe="wan21-1.3b")
        more = "topology.teacher={ranks: 4, replicas: 9}"
        text = refusal(*settings, "teacher.compute.ulysses=2", more, recipe="wan21-1.3b")
        assert "(1, 2 groups of 2 ranks that work together in each), so some would" in text

    def test_a_sweep_over_a_key_that_does_not_exist_is_met_before_it_starts(self):
        text = refusal("sweep.grid={objective.lambda_n: [1]}")
        assert "checking the sweep" in text
        assert "objective.lambda_nr" in text

    def test_a_sweep_over_a_value_that_does_not_fit_is_met_before_it_starts(self):
        assert "some would be empty" in refusal("sweep.grid={batch.size: [16, 1]}")

    def test_a_recipe_of_another_command_is_refused_by_its_sections(self, tmp_path):
        path = tmp_path / "other.yaml"
        path.write_text("name: a\nworld: {train: x}\n")
        with pytest.raises(ConfigError, match=r"the sections world.*sgmd pretrain"):
            load(DistillConfig, str(path))


class TestMethods:
    @pytest.mark.parametrize("method", [method_name(method) for method in METHODS])
    def test_a_method_is_chosen_by_its_name_and_brings_its_own_settings(self, method, tmp_path):
        overrides = [f"objective.method={method}", "fake_score.tracking=fresh"]
        if method == "rcm":
            overrides += ["schedule.renoise=true", "generator.optimizer.max_grad_norm=1.0e+6"]
        config = load_recipe("tiny", overrides)
        assert config.objective.method == method
        path = tmp_path / "config.yaml"
        path.write_text(config.to_yaml())
        assert load_recipe(str(path)) == config

    @pytest.mark.slow
    def test_a_recipe_without_a_method_is_sgmds(self, recipe_file):
        settings = yaml.safe_load(recipe_file.read_text())
        del settings["objective"]["method"], settings["objective"]["fake_updates"]
        settings["objective"]["lambda_nr"] = 0.3
        recipe_file.write_text(yaml.safe_dump(settings))
        for overrides in ([], ["objective.method=sgmd"]):
            objective = load_recipe(str(recipe_file), overrides).objective
            assert (objective.method, objective.lambda_nr) == ("sgmd", 0.3)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_settings_beside_a_method_are_those_of_the_new_one_in_any_order(self, reverse):
        overrides = ["objective.method=tsg_sim", "objective.form=paper"]
        overrides = overrides[::-1] if reverse else overrides
        objective = load_recipe("tiny", overrides).objective
        assert (objective.method, objective.form) == ("tsg_sim", "paper")

    def test_a_method_can_be_swept_over_and_changed_by_key(self):
        config = load_recipe(
            "tiny", ["fake_score.tracking=fresh", "sweep.grid={objective.method: [sgmd, dmd2]}"]
        )
        assert config.with_settings({"objective.method": "sid"}).objective.square_weight == 1.0

    def test_a_grid_over_another_methods_settings_stands_in_the_way_of_sweeps_alone(self):
        config = load_recipe("tiny", ["objective.method=dmd"])
        assert "objective.lambda_nr" in config.sweep.grid
        with pytest.raises(ConfigError, match="not a setting of dmd"):
            check_sweep(config, config.sweep.grid, "sweeping")

    def test_an_unknown_method_names_those_that_there_are(self):
        text = refusal("objective.method=dmd3")
        assert 'objective.method is "dmd3", expected one of' in text
        assert "'tsg_fisher'" in text

    def test_a_setting_of_another_method_is_said_to_be_one(self):
        text = refusal("objective.method=tsg_sim", "objective.lambda_nr=0.1")
        assert "objective.lambda_nr is not a setting of tsg_sim" in text

    def test_a_key_with_dots_in_a_file_is_told_its_section(self, tmp_path):
        recipe = tmp_path / "mine.yaml"
        recipe.write_text("generator.optimizer.lr: 1.0e-5\n")
        with pytest.raises(ConfigError, match=r"write lr into generator\.optimizer"):
            load_recipe(str(recipe))

    def test_an_output_below_the_home_is_not_a_folder_called_tilde(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert load_recipe("tiny", ["output=~/runs"]).run_folder == tmp_path / "runs" / "tiny"
        assert load_recipe("tiny", ["output=~nobody-here/x"]).output == "~nobody-here/x"

    def test_a_wrong_value_is_named_without_the_level_that_no_recipe_has(self):
        assert "objective: fake_updates is 0" in refusal("objective.fake_updates=0")
        assert "objective is 3, expected a section" in refusal("objective=3")

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["objective.method=dmd2"], "set fake_score.tracking=fresh"),
            (["fake_score.ida_decay=0.97"], "set fake_score.tracking=fresh"),
            (
                ["fake_score.ida_decay=0.97", "fake_score.tracking=fresh"],
                "leave it at 1 for objective.method sgmd",
            ),
            (
                [*SHUFFLED, "objective={method: sid, fake_updates: 1}"],
                "a gradient through the teacher would teach it besides",
            ),
            (
                [*SHUFFLED, "objective={method: dmd2, adversary: {}}", FRESH],
                "a discriminator would teach it besides",
            ),
            ([*SHUFFLED, "objective={method: cdm}", FRESH], "score queries beside those"),
            ([*SHUFFLED, "objective={method: rcm}", FRESH], "and data would teach it besides"),
            ([*SHUFFLED, "generator.diversity.weight=0.05"], "and generator.diversity would"),
            ([*SHUFFLED, "batch.size=14", "batch.micro_batches=2"], "to a multiple of 4"),
            ([*SHUFFLED, "batch.size=4", "topology.pools.score.ranks=2"], "to a multiple of"),
        ],
    )
    def test_what_a_method_cannot_do_is_met_before_anything_starts(self, overrides, words):
        assert words in refusal(*overrides)

    @pytest.mark.parametrize(
        ("overrides", "updates"),
        [
            ([], 0),
            (["fake_score.tracking=fresh"], 1),
            (["fake_score.tracking=fresh", "objective.method=dmd2"], 5),
            (["fake_score.tracking=fresh", "objective.fake_updates=3"], 3),
        ],
    )
    def test_updates_on_new_samples_follow_from_method_and_tracking(self, overrides, updates):
        assert load_recipe("tiny", overrides).fresh_updates == updates


class TestDigest:
    @pytest.mark.parametrize(
        "override",
        [
            "iterations=3",
            "name=other",
            "topology.depth=1",
            "checkpoint.every=7",
            "output=x",
            "batch.micro_batches=4",
            "data.s3.max_attempts=9",
            "data.read_ahead.readers=3",
            "data.train=elsewhere",
        ],
    )
    def test_settings_that_leave_the_numbers_alone_leave_the_digest_alone(self, override):
        assert load_recipe("tiny", [override]).digest == load_recipe("tiny").digest

    @pytest.mark.parametrize(
        "override",
        ["seed=1", "objective.lambda_nr=0.2", "data.shuffle.shards=2"],
    )
    def test_settings_that_change_the_numbers_change_the_digest(self, override):
        assert load_recipe("tiny", [override]).digest != load_recipe("tiny").digest


class TestDerived:
    def test_settings_can_be_changed_by_dotted_key_and_are_checked_again(self):
        config = load_recipe("tiny")
        assert config.with_settings({"objective.lambda_rc": 0.5}).objective.lambda_rc == 0.5
        assert config.objective.lambda_rc is None
        with pytest.raises(ConfigError, match="would be empty"):
            config.with_settings({"batch.size": 1})

    def test_a_run_can_be_found_again_where_it_was_moved_to(self, tmp_path):
        config = load_recipe("tiny").in_folder(tmp_path / "moved")
        assert config.run_folder == tmp_path / "moved"

    def test_a_run_can_be_handed_to_a_process_that_works_elsewhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = load_recipe("tiny", ["data.validation=s3://bucket/held_out", "output=/runs"])
        moved = config.with_absolute_paths()
        assert moved.data.train == str(tmp_path / "data" / "shapes" / "train")
        assert moved.data.validation == "s3://bucket/held_out"
        assert moved.output == "/runs"
        assert Path(moved.model.folder).is_absolute()
        assert moved.with_absolute_paths() == moved

    @pytest.mark.slow
    def test_the_schema_describes_every_section(self):
        schema = json_schema()
        json.dumps(schema)
        assert set(schema["properties"]) == set(DistillConfig.model_fields)
        assert schema["additionalProperties"] is False
        settings = schema["$defs"]["ValidationSettings"]["properties"]
        assert all(one["description"] for one in settings.values())


def shipped_path(name: str) -> Path:
    return next(recipe.path for recipe in shipped_recipes() if recipe.name == name)


def set_keys(settings: dict, prefix: str = "") -> list[str]:
    keys = [prefix + name for name in settings]
    for name, value in settings.items():
        value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        if isinstance(value, dict):
            keys += set_keys(value, f"{prefix}{name}.")
    return keys


def is_written(dotted: str, settings: dict) -> bool:
    value = settings
    for part in dotted.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


@pytest.mark.parametrize(
    "setting", ["generator.diversity.weight=0.05", "teacher.guidance_scale=1.0"]
)
def test_steps_that_renoise_are_refused_where_they_lead_elsewhere(setting):
    load_recipe("tiny", ["schedule.renoise=true"])
    with pytest.raises(ConfigError, match=r"schedule\.renoise"):
        load_recipe("tiny", ["schedule.renoise=true", setting])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["topology.mode=local"], "topology.mode is local"),
        ([], "topology.mode is map"),
        (["topology.mode=pools"], r"topology\.generator\.gpus is 0"),
        (["topology.wire_dtype=bf16"], "sends tensors as they are"),
    ],
)
def test_nixl_is_refused_where_it_cannot_work(settings, words):
    with pytest.raises(ConfigError, match=words):
        load_recipe("tiny", ["topology.transport=nixl", *settings])


def test_nixl_may_be_asked_for_where_every_role_has_a_gpu():
    settings = ["topology.transport=nixl", "topology.mode=pools"]
    assert load_recipe("wan21-1.3b", settings).topology.transport == "nixl"


@pytest.mark.slow
def test_a_recipe_without_a_mode_that_sizes_the_roles_own_pools_means_these(recipe_file: Path):
    def mode_of(topology: str) -> str:
        settings = yaml.safe_load(recipe_file.read_text())
        other = recipe_file.with_name("other.yaml")
        other.write_text(yaml.safe_dump({**settings, "topology": yaml.safe_load(topology)}))
        return load_recipe(str(other)).topology.mode

    assert mode_of("{}") == "map"
    assert mode_of("{teacher: {replicas: 2}}") == "pools"
    assert mode_of("{generator: {cpus: 2}}") == "pools"
    assert mode_of("{mode: fused, teacher: {cpus: 2}}") == "fused"
    assert mode_of("{roles: {teacher: learn}}") == "map"


# The released 1.3B training by the keys of our recipe: its YAML, or else the defaults of its code.
RELEASED = {
    "iterations": 1000,
    "video.num_frames": 81,
    "video.height": 480,
    "video.width": 832,
    "video.fps": 16,
    "model.text_length": 512,
    "batch.exit_draws": 1,
    "schedule.shift": 5.0,
    "schedule.score_shift": None,
    "schedule.score_sigma_min": 0.02,
    "schedule.score_sigma_max": 0.98,
    "objective.method": "sgmd",
    "objective.form": "released",
    "objective.lambda_nr": 0.1,
    "objective.lambda_rc": None,
    "objective.normalizer_eps": 1e-8,
    "objective.sigma_floor": 1e-8,
    "objective.fake_updates": 1,
    "generator.num_steps": 4,
    "generator.ema_decay": 0.0,
    "generator.diversity": {"weight": 0.05, "teacher_steps": 30, "anchor_step": 5},
    "generator.optimizer": {
        "lr": 2e-6,
        "betas": [0.0, 0.999],
        "weight_decay": 0.01,
        "eps": 1e-8,
        "max_grad_norm": 10.0,
        "warmup_iterations": 0,
        "decay": "constant",
        "decay_iterations": 0,
        "final_lr_ratio": 0.0,
        "log_block_norms": False,
        "moments": "device",
        "moment_bits": 32,
    },
    "fake_score.tracking": "fresh",
    "fake_score.ida_decay": 1.0,
    "fake_score.optimizer": {
        "lr": 4e-7,
        "betas": [0.0, 0.999],
        "weight_decay": 0.01,
        "eps": 1e-8,
        "max_grad_norm": 10.0,
        "warmup_iterations": 0,
        "decay": "constant",
        "decay_iterations": 0,
        "final_lr_ratio": 0.0,
        "log_block_norms": False,
        "moments": "device",
        "moment_bits": 32,
    },
    "generator.compute.precision": "bf16",
    "generator.compute.checkpointing": True,
    "fake_score.compute.precision": "bf16",
    "fake_score.compute.checkpointing": True,
    "teacher.compute.precision": "bf16",
    "teacher.guidance_scale": 3.0,
    "checkpoint.every": 100,
    "checkpoint.keep": 10,
}


def value_of(settings: dict[str, object], key: str) -> object:
    for part in key.split("."):
        settings = settings[part]  # type: ignore[assignment]
    return settings


def test_the_released_recipe_has_every_value_of_the_released_training():
    settings = load_recipe("wan21-1.3b-released").model_dump(mode="json")
    assert {key: value_of(settings, key) for key in RELEASED} == RELEASED


BOTH_POOLS = {"topology.pools.learn.ranks", "topology.pools.score.ranks"}
# What each size has of its own, beside the names and the sizes of pools.
OWN = {
    "wan21-14b": {"iterations": 5000, "batch.size": 64, "batch.micro_batches": 4},
    "wan22-a14b": {
        "iterations": 4000,
        "batch.size": 64,
        "batch.micro_batches": 2,
        "schedule.shift": 7.0,
        "generator.optimizer.max_grad_norm": 1.0,
        "fake_score.optimizer.max_grad_norm": 1.0,
        "teacher.guidance_scale": 4.0,
    },
    "wan22-5b": {
        "iterations": 5000,
        "video.num_frames": 121,
        "video.height": 704,
        "video.width": 1280,
        "video.fps": 24,
        "batch.size": 32,
        "batch.micro_batches": 4,
    },
}


def differing_from_the_small_one(name: str) -> dict[str, object]:
    found, base = (flat(load_recipe(each).model_dump(mode="json")) for each in (name, "wan21-1.3b"))
    return {key: found[key] for key in found if found[key] != base.get(key)}


@pytest.mark.parametrize("name", OWN)
def test_a_recipe_of_another_size_differs_where_the_size_asks_for_it(name):
    differing = differing_from_the_small_one(name)
    assert {key for key in differing if key.endswith(".ranks")} == BOTH_POOLS
    named = {"name", "model.folder", *BOTH_POOLS}
    assert {key: differing[key] for key in differing if key not in named} == OWN[name]


def test_the_recipe_with_adapters_differs_where_they_ask_for_it():
    lora = {"rank": 64, "alpha": 64.0, "targets": []}
    assert differing_from_the_small_one("wan21-1.3b-lora") == {
        "name": "wan21-1.3b-lora",
        "generator.optimizer.lr": 2e-5,
        "fake_score.optimizer.lr": 4e-6,
        "fake_score.walk": "joint",
        **{f"{role}.compute.weights": "bf16" for role in ("generator", "fake_score")},
        **{f"{role}.lora.{key}": lora[key] for role in ("generator", "fake_score") for key in lora},
        "topology.mode": "fused",
    }


def test_the_recipe_of_another_family_differs_where_the_model_asks_for_it():
    assert differing_from_the_small_one("ltx-2b") == {
        "name": "ltx-2b",
        "model.folder": "models/LTX-Video",
        "model.text_length": 128,
        "model.negative_prompt": "worst quality, inconsistent motion, blurry, jittery, distorted",
        "video.num_frames": 97,
        "video.height": 512,
        "video.width": 704,
        "video.fps": 25,
        "schedule.shift": 9.0,
    }


def flat(settings: dict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in settings.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def test_our_recipe_differs_from_the_released_one_where_it_says_so():
    ours, released = (
        load_recipe(name).model_dump(mode="json") for name in ("wan21-1.3b", "wan21-1.3b-released")
    )
    differing = {key for key in RELEASED if value_of(ours, key) != value_of(released, key)}
    assert differing == {
        "batch.exit_draws",
        "generator.ema_decay",
        "generator.diversity",
        "fake_score.tracking",
        "checkpoint.keep",
    }


def test_trials_in_one_process_leave_the_cluster_that_the_recipe_names() -> None:
    config = load_recipe("tiny", ["topology.address=127.0.0.1:6379"])
    assert config.sweep.settings["topology.mode"] == "local"
    trial = config.with_settings(config.sweep.settings)
    assert trial.topology.address is None
    assert config.topology.address == "127.0.0.1:6379"
    with pytest.raises(ConfigError, match="names a Ray cluster"):
        load_recipe("tiny", ["topology.address=127.0.0.1:6379", "topology.mode=local"])


def test_settings_of_another_command_are_told(caplog):
    given = ["sweep.points=3", "study.seeds=[0]", "iterations=2"]
    for command, told in (
        ("distill", ["sweep.points", "study.seeds"]),
        ("sweep", ["study.seeds"]),
        ("study", ["sweep.points"]),
    ):
        caplog.clear()
        warn_of_foreign_sections(command, given)
        assert [record.args[1] for record in caplog.records] == told


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["objective.method=dmd"], "dmd sends no gradient through the fake score"),
        (["objective.method=sid"], "sid sends one through the teacher"),
        (["objective.method=adm"], "adm has its loss computed by a discriminator"),
        ([FRESH], "fake_score.tracking"),
        (["fake_score.compute.checkpointing=false"], "fake_score.compute.checkpointing"),
    ],
)
def test_what_one_walk_for_both_gradients_does_not_go_with_is_refused_by_name(settings, words):
    joint = ("fake_score.walk=joint", "fake_score.compute.checkpointing=true")
    ranks = ("topology.mode=fused", "topology.fused.ranks=2", "batch.size=8")
    assert load_recipe("tiny", [*joint, *ranks]).fake_score.walk == "joint"
    assert words in refusal(*joint, *settings)
