"""The public interface: its names, the cost of importing it, and the example."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, get_args

import pytest

import sgmd
from pipelines.config.methods import METHODS, load_method, method_name, methods_table
from sgmd_core.errors import ConfigError
from tests.helpers.forked_python import forked_python

ROOT = Path(__file__).parents[2]


def run_python(*arguments: str, python: str = sys.executable) -> str:
    done = subprocess.run(
        [python, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_public_name_is_there_and_is_listed_by_the_module_that_defines_it():
    assert len(sgmd.__all__) == sum(map(len, sgmd.NAMES_BY_MODULE.values()))
    for module, names in sgmd.NAMES_BY_MODULE.items():
        for name in names:
            value = getattr(sgmd, name)
            assert getattr(value, "__module__", module).partition(".")[0] != "sgmd"
            defined = ast.parse(Path(str(import_module(module).__file__)).read_text()).body
            assert name in names_defined(defined), (module, name)


def names_defined(body: list[ast.stmt]) -> set[str]:
    """Names that statements bind themselves, imports left out."""
    found = {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    targets = [
        target
        for node in body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    names = [each for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
    return found | {each.id for each in names}


@pytest.mark.slow
def test_what_public_functions_take_and_return_is_public_as_well():
    found = {
        kind.__name__
        for name in sgmd.__all__
        if inspect.isfunction(function := getattr(sgmd, name))
        for annotation in annotations_of(function)
        for kind in kinds_in(annotation)
        if kind.__module__.partition(".")[0] in ("sgmd_core", "workers", "cluster", "pipelines")
    }
    assert {"DistillConfig", "RunObserver", "PretrainConfig", "Evaluation", "NoisedBatch"} <= found
    # The command line has checked a recipe before Ray starts.
    assert found - {"CheckedPretrain"} - set(sgmd.__all__) == set()


def annotations_of(function: Any) -> list[object]:
    signature = inspect.signature(function)
    given = [each.annotation for each in signature.parameters.values()]
    return [*given, signature.return_annotation]


def kinds_in(annotation: object) -> Iterator[type]:
    """Classes that an annotation names."""
    if isinstance(annotation, type):
        yield annotation
    for each in annotation if isinstance(annotation, list) else get_args(annotation):
        yield from kinds_in(each)


@pytest.mark.parametrize("path", ["tests/helpers/huber.py", "tests/helpers/toy_family.py"])
def test_what_comes_in_from_outside_needs_public_names_alone(path):
    """An objective and a family, as docs/extending.md has them."""
    tree = ast.parse((ROOT / path).read_text())
    own = ("sgmd", "sgmd_core", "workers", "cluster", "pipelines")
    taken = {
        (node.module, name.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in own
        for name in node.names
    }
    assert len(taken) > 5
    assert {module for module, _ in taken} == {"sgmd"}
    assert {name for _, name in taken} <= set(sgmd.__all__)


def test_every_method_and_every_protocol_that_authors_read_of_is_public():
    shipped = {each.__name__ for each in METHODS if each.__module__.startswith("sgmd_core.")}
    told = set(re.findall(r"`(\w+Objective)`", (ROOT / "docs" / "extending.md").read_text()))
    assert {"LookingObjective", "FlowObjective"} <= told
    assert shipped | told - {"PseudoHuberObjective"} <= set(sgmd.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        sgmd.distil  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.slow
def test_the_mathematics_needs_neither_ray_nor_diffusers():
    code = (
        "import sys, sgmd\n"
        "sgmd.SgmdObjective(), sgmd.FlowMatchSchedule(), sgmd.GaussianVelocity(), sgmd.rollout\n"
        "print(*[name for name in ('ray', 'diffusers', 'pydantic') if name in sys.modules])"
    )
    assert run_python("-c", code).strip() == ""


@pytest.mark.slow
def test_the_example_learns_the_gaussian_in_at_most_thirty_lines():
    path = ROOT / "examples" / "gaussian.py"
    assert len(path.read_text().splitlines()) <= 30
    words = run_python(str(path), python=forked_python()).replace(",", "").split()
    mean, std = float(words[1]), float(words[5])
    assert (mean, std) == (pytest.approx(0.7, abs=0.03), pytest.approx(0.5, abs=0.03))


def test_packages_say_that_they_are_typed():
    for package in ("sgmd", "sgmd_core", "workers", "cluster", "pipelines"):
        assert (ROOT / package / "py.typed").is_file()


def test_the_docs_list_every_method_as_its_objective_describes_it():
    """Where this fails, run `make docs`."""
    assert methods_table() in (ROOT / "docs" / "methods.md").read_text()


class TestMethodsFromOutside:
    def test_an_entry_point_brings_an_objective(self):
        point = EntryPoint("huber", "tests.helpers.huber:PseudoHuberObjective", "sgmd.objectives")
        assert method_name(load_method(point)) == "pseudo_huber"

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ("no_such_package.x:Y", "No module named 'no_such_package'"),
            ("sgmd_core.schedule:FlowMatchSchedule", "without path, about"),
            ("sgmd_core.objectives.dmd:DmdObjective", "a second dmd"),
        ],
    )
    def test_one_that_cannot_be_used_is_refused_by_name(self, value, words):
        with pytest.raises(ConfigError, match=words) as caught:
            load_method(EntryPoint("dmd", value, "sgmd.objectives"))
        assert "uninstall the package" in str(caught.value)

    def test_names_of_methods_are_their_own(self):
        names = [method_name(method) for method in METHODS]
        assert len(set(names)) == len(names)
