"""YAML from anywhere: bounds, keys, tags and numbers, each refused in one line with its place."""

import random
from collections import Counter

import pytest
import yaml

from pipelines.config.recipe import DistillConfig, load_recipe
from pipelines.config.recipe_files import SECTIONS_OF, find_recipe, load, shipped_recipes
from pipelines.config.yaml_text import MAX_CHARACTERS, read_yaml, yaml_problem
from pipelines.pretraining.config import PretrainConfig
from sgmd_core.errors import ConfigError
from tests.fuzz.mutations import NUM_CASES, mutate_text

_TENS = [f"{'abcdefghi'[n]}: &{'abcdefghi'[n]} [{', '.join(['*' + 'abcdefghi'[n - 1]] * 10)}]"
         for n in range(1, 9)]  # fmt: skip
REFUSED = {
    "1: 2": "line 1, column 1: the key '1' is not text",
    "null: 2": "the key 'null' is not text",
    "?\n: 2": "the key null is not text",
    "? [a, b]\n: 1": "the key that is a list is not text",
    "? {a: 1}\n: 1": "the key that is a section is not text",
    "a: &a {b: 1}\nc: {<<: *a}": "line 2, column 5: merge keys (<<) are not of YAML 1.2",
    "name: a\nname: b": "line 2, column 1: the key 'name' is given twice",
    "name: !!python/object/apply:os.system [ls]": "the tag !!python/object/apply:os.system",
    "name: !!python/name:os.system ''": "the tag !!python/name:os.system",
    "name: !!set {a}": "the tag !!set",
    "name: !!timestamp 2020-01-01": "the tag !!timestamp",
    "name: !!binary aGk=": "the tag !!binary",
    "name: !mine a": "the tag !mine",
    "seed: !!int abc": "'abc' is not a whole number",
    "seed: !!float abc": "'abc' is not a number",
    "seed: !!bool abc": "'abc' is neither true nor false",
    "seed: !!int [1]": "the tag int of a list or section",
    "name: !!map abc": "a value that is not a section",
    "a: " + "[" * 20000: "more than 32 sections or lists in each other",
    "a: " + "{a: " * 500 + "1" + "}" * 500: "more than 32 sections",
    "\n".join(["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]", *_TENS]): "more than 50000 values",
    "name: &a [*a]": "the anchor 'a' contains itself",
    "name: &a {x: [*a]}": "the anchor 'a' contains itself",
    "a: *nope": "undefined alias 'nope'",
    "seed: 1" + "0" * 6000: "a whole number of more than 64 bits",
    "seed: 10000000000000000000": "a whole number of more than 64 bits",
    "a: 1\n---\nb: 2": "another document",
    "a:\n\tb: 1": "line 2, column 1",
    "a" * (MAX_CHARACTERS + 1): "1048577 characters",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_text_that_no_recipe_needs_is_refused_in_one_line_with_its_place(text):
    with pytest.raises(yaml.YAMLError) as caught:
        read_yaml(text)
    problem = yaml_problem(caught.value)
    assert REFUSED[text] in problem
    assert "\n" not in problem
    assert len(problem) < 200


def test_anchors_within_bounds_are_written_out():
    assert read_yaml("a: &x {b: [1, 2]}\nc: *x\nd: [*x]")["d"] == [{"b": [1, 2]}]


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_an_override_of_such_text_is_a_wrong_setting(text):
    with pytest.raises(ConfigError, match="objective") as caught:
        load_recipe("tiny", [f"objective={text}"])
    assert len(str(caught.value)) < 1000


def test_a_key_of_a_thousand_levels_is_a_wrong_setting():
    with pytest.raises(ConfigError, match="no KEY=VALUE"):
        load_recipe("tiny", [".".join("a" * 3000) + "=1"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bytes(random.Random(0).randbytes(4000)), "bytes that are not UTF-8 text"),
        (b"", "an empty file"),
        (b"\x00" * 50, "unacceptable character"),
        (b"hello", "'hello'"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_name(tmp_path, content, words):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"mine\.yaml") as caught:
        load_recipe(str(path))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed=1e23", "seed is 1e+23, expected at most 9.22337e+18"),
        (
            "generator.optimizer.lr=1e39",
            "generator.optimizer.lr is 1e+39, expected at most 3.4e",
        ),
        ("iterations=1000000000000000000", "iterations is 1e+18, expected at most"),
        ("schedule.shift=.inf", "schedule.shift is Infinity, expected a finite number"),
        ("objective.lambda_nr=.nan", "objective.lambda_nr is NaN, expected a finite number"),
        ("generator.optimizer.betas=[.nan, 0.9]", "betas is NaN, expected a finite number"),
        ("sweep.settings={generator.optimizer.lr: .nan}", "lr is NaN, expected a finite number"),
        ("sweep.grid={objective.lambda_nr: [.nan]}", "expected a finite number"),
        ("topology.call_timeout_s=1e300", "expected at most 1e+08"),
        ("data.s3.read_timeout_s=1e12", "expected at most 1e+08"),
        ("batch.size=1000000000", "batch.size is 1000000000, expected less than or equal to"),
        ("topology.generator.ranks=1000000000", "expected less than or equal to"),
        ("topology.depth=1000000000", "expected less than or equal to"),
    ],
)
def test_numbers_that_nothing_can_hold_are_wrong_settings(setting, words):
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", [setting])
    assert words in str(caught.value)


class TestRecipesOfOtherCommands:
    def test_a_recipe_of_pretrain_given_to_distill_names_its_command(self):
        with pytest.raises(ConfigError, match="sgmd pretrain pretrain-tiny"):
            load_recipe("pretrain-tiny")

    def test_a_recipe_of_distill_given_to_pretrain_names_its_command(self):
        path = str(find_recipe("tiny"))
        with pytest.raises(ConfigError, match=f"sgmd distill {path}"):
            load(PretrainConfig, path)

    def test_the_sections_that_tell_them_apart_are_theirs_alone(self):
        kinds = {"distill": DistillConfig, "pretrain": PretrainConfig}
        for command, kind in kinds.items():
            for other, sections in SECTIONS_OF.items():
                expected = set(sections) if other == command else set()
                assert set(sections) & set(kind.model_fields) == expected


def test_what_was_read_before_is_read_anew():
    text = "a: {b: [1, 2]}\nc: 3\n"
    first = read_yaml(text)
    first["a"]["b"].append(first.pop("c"))
    assert read_yaml(text) == {"a": {"b": [1, 2]}, "c": 3}


@pytest.fixture
def by_libyaml(monkeypatch) -> list[bool]:
    """Fills with the parsers that texts are given to: true where it is libyaml's."""
    asked: list[bool] = []
    parse = yaml.parse

    def watched(text, Loader):
        asked.append(issubclass(Loader, yaml.CSafeLoader))
        return parse(text, Loader=Loader)

    monkeypatch.setattr(yaml, "parse", watched)
    return asked


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
def test_both_parsers_read_every_recipe_alike(by_libyaml):
    recipes = [recipe.path.read_text(encoding="utf-8") for recipe in shipped_recipes()]
    outcomes = []
    for seed in range(len(recipes) + NUM_CASES):
        text = recipes[seed % len(recipes)]
        text = text[: 40 * (seed + 5)] if seed < len(recipes) else mutate_text(text[:1500], seed)
        by_libyaml.clear()
        try:
            # libyaml is given no text with a tab.
            expected = read_yaml(f"{text}\n# \t")
        except yaml.YAMLError as error:
            expected = error
        assert True not in by_libyaml
        if isinstance(expected, yaml.YAMLError):
            with pytest.raises(type(expected)):
                read_yaml(text)
        else:
            assert read_yaml(text) == expected, text
        outcomes.append((True in by_libyaml, isinstance(expected, yaml.YAMLError)))
    counts = Counter(outcomes)
    assert counts[True, False] > len(recipes) / 2
    assert counts[True, True] > 0


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
@pytest.mark.parametrize("text", ["a:\t1", "a: >#\n b", "a: |1#\n b", "[a?]"])
def test_what_libyaml_alone_would_take_is_refused(text):
    assert yaml.load(text, Loader=yaml.CSafeLoader)
    with pytest.raises(yaml.YAMLError):
        read_yaml(text)


def test_a_tag_without_name_and_value_is_null():
    assert read_yaml("a: !") == {"a": None}
