"""The directions between the packages, and the promises that no import contract can state."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter import cli

ROOT = Path(__file__).parents[1]
PACKAGES = ("sgmd_core", "workers", "cluster", "pipelines")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
RAY_CORE = {"get", "put", "wait", "init", "remote", "kill", "shutdown", "method"}
MAX_FUNCTION_LINES = 60


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_after_importing(package: str, suspects: tuple[str, ...]) -> str:
    """Which suspects a fresh interpreter has loaded after every module of a package."""
    return run_python(
        "import importlib, pkgutil, sys\n"
        f"import {package} as package\n"
        f"for module in pkgutil.walk_packages(package.__path__, '{package}.'):\n"
        "    importlib.import_module(module.name)\n"
        f"print(*[name for name in {suspects!r} if name in sys.modules])"
    )


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_imports_go_down_only(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.lint_imports(config_filename="pyproject.toml", no_cache=True) == 0


def test_the_core_loads_nothing_but_torch():
    suspects = ("ray", "diffusers", "transformers", "pyarrow", "fsspec", "pydantic", "cv2")
    assert loaded_after_importing("sgmd_core", suspects) == ""


@pytest.mark.slow
def test_the_roles_load_no_ray():
    assert loaded_after_importing("workers", ("ray", "cluster.storage", "pipelines")) == ""


@pytest.mark.slow
def test_a_run_in_one_process_needs_no_ray():
    code = "import sys; sys.modules['ray'] = None; import pipelines.distillation.run; print('ok')"
    assert run_python(code) == "ok"


def test_asking_for_help_loads_neither_torch_nor_ray():
    code = (
        "import sys, pipelines.cli\n"
        "print(*[name for name in ('torch', 'ray', 'diffusers') if name in sys.modules])"
    )
    assert run_python(code) == ""


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.parts[len(ROOT.parts)] != "cluster"], ids=relative
)
def test_ray_core_is_spoken_only_in_cluster(path):
    spoken = [
        f"line {node.lineno}: ray.{node.attr}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "ray"
        and node.attr in RAY_CORE
    ]
    assert spoken == []


def test_files_are_written_whole_in_one_place_only():
    renaming = {"fsync", "rename", "renames", "rmtree", "write_bytes", "mkstemp"}
    found = [
        f"{relative(path)}, line {node.lineno}: {node.attr}"
        for path in SOURCES
        if relative(path) != "cluster/files.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in renaming
    ]
    assert found == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_file_holds_one_idea_and_a_function_fits_on_a_screen(path):
    text = path.read_text(encoding="utf-8")
    functions = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    too_long = [
        f"{function.name}: {length} lines"
        for function in functions
        if (length := code_lines(function)) > MAX_FUNCTION_LINES
    ]
    assert too_long == []


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, without signature and docstring."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    last = function.end_lineno or function.lineno
    return last - body[0].lineno + 1 if body else 0


def test_docstrings_begin_with_a_noun_or_a_verb():
    inverted = [
        f"{relative(path)}: {line}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        for line in (ast.get_docstring(node) or "").splitlines()[:1]
        if line.split(" ")[0] in {"What", "Whether", "How", "Where", "Which", "When", "Who", "Why"}
    ]
    assert inverted == []


def test_no_public_name_stands_for_two_things():
    homes: dict[str, list[str]] = {}
    for path in SOURCES:
        # A command of the command line has the name of the function that it calls.
        if path.parent.name == "commands":
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(relative(path))
    assert len(homes) > 500
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}
