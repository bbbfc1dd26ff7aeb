"""The walk-throughs of docs/extending.md, step by step: what a page shows is what is run here."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml

from pipelines.config.methods import load_method
from pipelines.run.folder import RunFolder, read_jsonl
from sgmd_core.errors import ConfigError, ShapeError
from sgmd_core.objectives import Objective
from sgmd_core.types import detached
from tests.helpers.families import write_package
from tests.helpers.forked_python import forked_python
from tests.helpers.huber import PseudoHuberObjective
from tests.helpers.small_network import (
    SmallNetwork,
    predict,
    random_query,
    with_leaf,
    x0_prediction,
)
from tests.helpers.toy_family import ToyFamily, write_toy
from workers.measures import ENTRY_POINTS, MEASURES, load_measure, measure_source, one_figure
from workers.models.families import families, load_family
from workers.models.family import Denoiser, ModelFamily
from workers.models.shape import DenoiserShape

ROOT = Path(__file__).parents[1]
HELPERS = ROOT / "tests" / "helpers"
PAGE = ROOT / "docs" / "extending.md"


def block(section: str, language: str) -> str:
    """The code of a language under a heading of the page."""
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return code


def run_python(folder: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [forked_python(), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my_package` as the page has it, and its entry points."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "my_package").mkdir()
    (folder / "my_package" / "__init__.py").touch()
    objective = block("A new objective", "python")
    (folder / "my_package" / "pseudo_huber.py").write_text(objective)
    shutil.copy(HELPERS / "toy_family.py", folder / "my_package" / "toy.py")
    (folder / "my_package" / "brightness.py").write_text(block("A new measure", "python"))
    kinds = ("objective", "measure", "model family")
    tables = [block(f"A new {kind}", "toml") for kind in kinds]
    return write_package(folder, "\n".join(_as_ini(table) for table in tables))


def _as_ini(table: str) -> str:
    """A table of pyproject.toml as an installer writes it into entry_points.txt."""
    return re.sub(r'\[project\.entry-points\."(.*)"\]', r"[\1]", table).replace('"', "")


def test_the_objective_of_the_page_is_the_one_that_the_tests_hold():
    assert block("A new objective", "python").strip() == (HELPERS / "huber.py").read_text().strip()


@pytest.mark.slow
def test_a_package_with_an_objective_and_a_family_distils_without_a_change_here(package, tmp_path):
    model = write_toy(tmp_path / "model")
    captions = tmp_path / "captions.txt"
    captions.write_text("a red circle moves left\na blue bar moves up\n" * 4)
    recipe = {
        "name": "mine",
        "iterations": 2,
        "output": str(tmp_path / "runs"),
        "model": {"folder": str(model), "text_length": 6},
        "video": {"num_frames": 5, "height": 16, "width": 16, "fps": 8},
        "data": {"train": str(captions), "validation": str(captions)},
        "batch": {"size": 2},
        "validation": {"every": 0},
        "topology": {"mode": "local"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    settings = ["objective.method=pseudo_huber", "objective.delta=0.5"]
    command = ("-m", "pipelines.cli", "distill", str(tmp_path / "recipe.yaml"), *settings)
    run_python(package, *command)
    run = RunFolder(tmp_path / "runs" / "mine")
    written = yaml.safe_load(run.config.read_text())["objective"]
    assert written["method"] == "pseudo_huber"
    assert written["delta"] == 0.5
    records = read_jsonl(run.metrics)
    assert [record["iteration"] for record in records] == [0, 1]
    assert all(record["losses"]["fisher"] > 0 for record in records)
    assert "ToyPipeline" in (run.generator / "model_index.json").read_text()


def test_the_gradient_of_the_objective_agrees_with_finite_differences():
    objective, fake, teacher = PseudoHuberObjective(delta=0.3), SmallNetwork(1), SmallNetwork(2)
    base = random_query()

    def value_at(x0: torch.Tensor) -> torch.Tensor:
        query = detached(base, x0)
        # The prediction of the teacher is a constant.
        gap = x0_prediction(fake, query) - x0_prediction(teacher, base)
        return (0.3**2 * ((1 + (gap / 0.3) ** 2).sqrt() - 1)).mean()

    query = with_leaf(base)
    velocity_teacher = predict(teacher, base)
    loss = objective.generator_loss(query, predict(fake, query), velocity_teacher)
    (gradient,) = torch.autograd.grad(loss.value, query.x0)
    torch.testing.assert_close(loss.value.detach(), value_at(base.x0).detach())
    direction = torch.randn(
        base.x0.shape, dtype=base.x0.dtype, generator=torch.Generator().manual_seed(5)
    )
    with torch.no_grad():
        ends = [value_at(base.x0 + step * direction) for step in (1e-5, -1e-5)]
    numeric = float((ends[0] - ends[1]) / 2e-5)
    assert abs(numeric) > 1e-3
    assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-6)


MEASURED = """
import torch

from pipelines.config.figures import FIGURES
from pipelines.config.recipe import load_recipe
from pipelines.reporting.names import measures_table
from workers.measures import measure_clip_figures

white = measure_clip_figures(torch.ones(2, 3, 4, 16, 16), fps=8)["brightness"]
black = measure_clip_figures(torch.zeros(2, 3, 4, 16, 16), fps=8)["brightness"]
assert white.tolist() == [1, 1] and black.tolist() == [0, 0]
assert {"brightness", "brightness_ratio"} <= set(FIGURES)
assert "| `brightness` | Mean of all colours of all pixels |" in measures_table()
recipe = load_recipe("tiny", ["checkpoint.score=brightness", "sweep.score=brightness_ratio"])
print(recipe.checkpoint.score, recipe.sweep.score)
"""


@pytest.mark.slow
def test_a_package_with_a_measure_adds_its_figure_without_a_change_here(package):
    assert run_python(package, "-c", MEASURED).split() == ["brightness", "brightness_ratio"]
    assert "brightness" not in {measure.name for measure in MEASURES}


@pytest.mark.parametrize("value", ["no_package:A", "math:pi", "workers.measures:MEASURES"])
def test_an_entry_point_that_is_no_measure_is_named(value):
    with pytest.raises(ConfigError, match=r"the measure odd .* of sgmd\.measures"):
        load_measure(EntryPoint("odd", value, ENTRY_POINTS), MEASURES)


FLOW = next(each for each in MEASURES if each.name == "flow")


def test_a_measure_under_the_name_of_another_is_refused():
    point = EntryPoint("flow", "tests.test_extending:FLOW", ENTRY_POINTS)
    assert load_measure(point, []) == FLOW
    with pytest.raises(ConfigError, match="a second flow"):
        load_measure(point, MEASURES)


RATIO_OF_FLOW = replace(FLOW, name="flow_ratio", has_ratio=False)
SPEED = replace(FLOW, name="speed")
BUILT_IN = replace(FLOW, name="built_in", function=torch.Tensor.mean)
PARTIAL = replace(FLOW, name="partial", function=partial(FLOW.function, *()))


@pytest.mark.parametrize(
    ("name", "taken"), [("RATIO_OF_FLOW", "flow_ratio"), ("SPEED", "speed_ratio")]
)
def test_a_measure_whose_figure_is_the_ratio_of_another_is_refused(name, taken):
    with pytest.raises(ConfigError, match=f"a second {taken}"):
        load_measure(EntryPoint("odd", f"tests.test_extending:{name}", ENTRY_POINTS), MEASURES)


def test_a_measure_whose_function_has_no_source_file_is_refused():
    assert measure_source(PARTIAL.function) == measure_source(FLOW.function)
    point = EntryPoint("odd", "tests.test_extending:BUILT_IN", ENTRY_POINTS)
    with pytest.raises(ConfigError, match="a module with a source file"):
        load_measure(point, MEASURES)


@dataclass(frozen=True)
class Unnamed(PseudoHuberObjective):
    method: str = field(default_factory=str)  # pyright: ignore


@dataclass(frozen=True)
class Unreadable(PseudoHuberObjective):
    method: Literal["unreadable"] = "unreadable"  # pyright: ignore
    table: torch.Tensor | None = None


@dataclass(frozen=True)
class Undefined(PseudoHuberObjective):
    method: Literal["undefined"] = "undefined"  # pyright: ignore
    table: "Unknown | None" = None  # noqa: F821  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Unnamed", "a field method without its name as default"),
        ("Unreadable", "generate pydantic-core schema for .*torch.Tensor"),
        ("Undefined", "name 'Unknown' is not defined"),
    ],
)
def test_an_objective_whose_fields_no_recipe_can_hold_is_refused(name, words):
    point = EntryPoint("odd", f"{__name__}:{name}", "sgmd.objectives")
    with pytest.raises(ConfigError, match=rf"^While loading the method odd .*{words}") as caught:
        load_method(point)
    assert "\n" not in caught.value.found


@dataclass(frozen=True)
class TakesOneVelocity(PseudoHuberObjective):
    method: Literal["one_velocity"] = "one_velocity"  # pyright: ignore

    def generator_loss(self, query, velocity_fake):  # pyright: ignore
        return self.tracking_loss(query, velocity_fake)


def test_an_objective_whose_loss_takes_other_arguments_is_refused():
    usable = EntryPoint("odd", f"{__name__}:PseudoHuberObjective", "sgmd.objectives")
    assert load_method(usable) is PseudoHuberObjective
    point = EntryPoint("odd", f"{__name__}:TakesOneVelocity", "sgmd.objectives")
    words = r"generator_loss\(self, query, velocity_fake\)\. Expected generator_loss as in"
    with pytest.raises(ConfigError, match=words):
        load_method(point)


@pytest.mark.parametrize("value", [0.5, torch.zeros(()), torch.zeros(1, 3), torch.zeros(2)])
def test_a_measure_that_returns_anything_but_one_value_a_clip_is_refused(value):
    assert one_figure("brightness", torch.ones(1)).tolist() == [1.0]
    with pytest.raises(ShapeError, match=r"^While measuring brightness on a clip: .*shape \(1,\)"):
        one_figure("brightness", value)


def test_a_package_that_exits_when_it_is_imported_is_refused(tmp_path, monkeypatch):
    (tmp_path / "package_that_exits.py").write_text("import sys\nsys.exit('no licence')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("odd", "package_that_exits:A", ENTRY_POINTS)
    with pytest.raises(ConfigError, match="SystemExit: no licence"):
        load_measure(point, MEASURES)


class WithoutTraits(ToyFamily):
    traits = None  # pyright: ignore


def test_a_family_without_traits_is_refused():
    point = EntryPoint("odd", f"{__name__}:WithoutTraits", "sgmd.families")
    with pytest.raises(ConfigError, match=r"traits None\. Expected an object of"):
        load_family(point)


LEFT_OUT = """
from pipelines.config.recipe import load_recipe
from sgmd_core.errors import ConfigError
from workers.measures import MEASURES
from workers.models.families import families, load_family

load_recipe("tiny")
print(len(MEASURES), len(families()), len(families()))
for name in ("odd", "another"):
    try:
        load_recipe("tiny", [f"objective.method={name}"])
    except ConfigError as error:
        print(error.found)
"""


def test_extensions_that_cannot_be_used_are_left_out_with_a_warning_each(tmp_path):
    groups = ("sgmd.objectives", "sgmd.measures", "sgmd.families")
    package = write_package(tmp_path, "".join(f"[{each}]\nodd = no_package:A\n" for each in groups))
    done = subprocess.run(
        [forked_python(), "-c", LEFT_OUT],
        cwd=package,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    sizes, odd, another = done.stdout.splitlines()
    assert sizes == f"{len(MEASURES)} {len(families())} {len(families())}"
    assert odd.startswith('objective.method is "odd", which its package cannot provide. While')
    assert "No module named 'no_package'" in odd
    assert another.startswith("objective.method is \"another\", expected one of 'sgmd', ")
    assert "left out, as it cannot be used: odd (ModuleNotFoundError: " in another
    for kind in ("a measure", "an objective", "a model family"):
        assert done.stderr.count(f"{kind} is left out: While loading") == 1
    assert done.stderr.count("Correct or uninstall the package my-package 1.0") == 3


@pytest.mark.parametrize(
    ("section", "kinds"),
    [
        ("A new model family", (ModelFamily, Denoiser, DenoiserShape)),
        ("A new objective", (Objective,)),
    ],
)
def test_the_page_names_every_member_that_an_extension_must_have(section, kinds):
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    members = [name for kind in kinds for name in {**vars(kind), **kind.__annotations__}]
    members = [name for name in members if not name.startswith("_")]
    assert len(members) > 7
    # The traits are the subject of a step of their own.
    text = text.replace("**Traits**", "traits")
    assert [name for name in members if not re.search(rf"\b{name}\b", text)] == []


def test_the_page_says_how_many_files_each_touches():
    rows = re.findall(
        r"^\| (objective|measure of clips|model family) \| (\d)", PAGE.read_text(), re.M
    )
    assert rows == [("objective", "1"), ("measure of clips", "1"), ("model family", "1")]
