"""The directions between the packages, and the promises that no import contract can state."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sgmd_core", "workers", "cluster", "pipelines")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
RAY_CORE = {"get", "put", "wait", "init", "remote", "kill", "shutdown", "method"}
MAX_FUNCTION_LINES = 60


@cache
def trees() -> dict[Path, ast.Module]:
    """Every source file, parsed once for all tests here."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


KINDS = (
    ast.Module
    | ast.ClassDef
    | ast.FunctionDef
    | ast.AsyncFunctionDef
    | ast.Attribute
    | ast.ImportFrom
)


@cache
def nodes() -> dict[Path, list[ast.AST]]:
    """The nodes of every source file that tests here look at, walked through once."""
    return {
        path: [node for node in ast.walk(tree) if isinstance(node, KINDS)]
        for path, tree in trees().items()
    }


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LAYERS = {
    "sgmd_core": ("ray", "diffusers", "transformers", "pyarrow", "fsspec", "pydantic", "cv2"),
    "workers": ("ray", "cluster.storage", "pipelines"),
}
"""What is not loaded after every module of a package and of those before it."""

LOAD = f"""
import importlib, pkgutil, sys
for name, suspects in {LAYERS!r}.items():
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        importlib.import_module(module.name)
    print(name, "loads:", *[one for one in suspects if one in sys.modules])
sys.modules["ray"] = None
import pipelines.distillation.run
print("a run in one process needs no Ray")
"""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.slow
def test_imports_go_down_only():
    # In a process of its own: it switches off the loggers of the one that it runs in.
    linter = "import sys; from importlinter import cli; sys.exit(cli.lint_imports(no_cache=True))"
    done = subprocess.run(
        [sys.executable, "-c", linter], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_no_module_imports_one_that_imports_it_not_even_inside_a_function_or_for_its_types():
    modules = {
        relative(path).removesuffix(".py").replace("/", "."): tree for path, tree in trees().items()
    }
    graph = {
        module: imported_by(tree) & modules.keys() - {module} for module, tree in modules.items()
    }
    assert sum(map(len, graph.values())) > 2000
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def imported_by(tree: ast.AST) -> set[str]:
    """Modules that a file imports, for type checkers alone or at run time."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        else:
            found |= imported_by(node)
    return found


# One interpreter for all of them: loading torch and the networks takes ten seconds.
@pytest.mark.slow
def test_the_core_loads_nothing_but_torch_the_roles_no_ray_and_a_run_in_one_process_needs_none():
    assert run_python(LOAD).splitlines() == [
        "sgmd_core loads:",
        "workers loads:",
        "a run in one process needs no Ray",
    ]


@pytest.mark.slow
def test_asking_for_help_loads_neither_torch_nor_ray():
    code = (
        "import sys, pipelines.cli\n"
        "print(*[name for name in ('torch', 'ray', 'diffusers') if name in sys.modules])"
    )
    assert run_python(code) == ""


PARTS = """
import sys
def absent(part, *libraries):
    print(part, "loads:", *[one for one in libraries if one in sys.modules])
import pipelines.data.stream.ray_stream
absent("a process that reads", "torch", "ray", "diffusers", "transformers")
import pipelines.data.stream.feed
absent("the feed", "ray", "diffusers", "transformers")
import workers.build
from pipelines.commands.runs import distill_config
from pipelines.planning.workload import Workload
assert Workload.of(distill_config("tiny", [], None)).shape.num_layers
absent("a recipe that is read and planned", "ray", "diffusers", "transformers")
import cluster.ray.host
import pipelines.pretraining.data
absent("the inside of a rank, and a process that reads clips", "diffusers", "transformers")
from workers.settings import ModelSettings
workers.build.build_text_encoder(ModelSettings("assets/tiny-wan", 16), 1)
absent("the text encoder", "diffusers")
"""


# One interpreter for all of them, in this order: each adds to what the ones before have loaded.
@pytest.mark.slow
def test_a_process_loads_the_libraries_of_its_part_alone():
    assert run_python(PARTS).splitlines() == [
        "a process that reads loads:",
        "the feed loads:",
        "a recipe that is read and planned loads:",
        "the inside of a rank, and a process that reads clips loads:",
        "the text encoder loads:",
    ]


@pytest.mark.slow
def test_ray_core_is_spoken_only_in_cluster():
    spoken = [
        f"{relative(path)}, line {node.lineno}: ray.{node.attr}"
        for path, found in nodes().items()
        if not relative(path).startswith("cluster/")
        for node in found
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "ray"
        and node.attr in RAY_CORE
    ]
    assert spoken == []


@pytest.mark.slow
def test_files_are_written_whole_in_one_place_only():
    renaming = {"fsync", "rename", "renames", "rmtree", "write_bytes", "mkstemp"}
    # The fork server's folder holds sockets and a lock, which is named once it is held; so is the
    # folder of a working copy.
    elsewhere = {"cluster/files.py", "cluster/ray/fork_server.py", "pipelines/run/held_folder.py"}
    found = [
        f"{relative(path)}, line {node.lineno}: {node.attr}"
        for path, within in nodes().items()
        if relative(path) not in elsewhere
        for node in within
        if isinstance(node, ast.Attribute) and node.attr in renaming
    ]
    assert found == []


@pytest.mark.slow
def test_a_function_fits_on_a_screen():
    too_long = [
        f"{relative(path)}: {node.name}: {length} lines"
        for path, within in nodes().items()
        for node in within
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := code_lines(node)) > MAX_FUNCTION_LINES
    ]
    assert too_long == []


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, without signature and docstring."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    last = function.end_lineno or function.lineno
    return last - body[0].lineno + 1 if body else 0


def docstrings(within: list[ast.AST]) -> list[str]:
    """Docstrings of a module, its classes and functions, and of attributes and constants."""
    found: list[str] = []
    for node in within:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(ast.get_docstring(node) or "")
        if isinstance(node, ast.Module | ast.ClassDef):
            found += [
                below.value.value
                for named, below in pairwise(node.body)
                if isinstance(named, ast.Assign | ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ]
    return found


def test_docstrings_begin_with_a_noun_or_a_verb():
    inverted = re.compile(
        r"(?:(?:at|by|for|from|in|of|on|to|with) )?"
        r"(?:what|whether|how|where|which|when|who|whom|whose|why)\b",
        re.IGNORECASE,
    )
    found = {relative(path): docstrings(within) for path, within in nodes().items()}
    assert sum(map(len, found.values())) > 5000
    assert {
        path: odd for path, texts in found.items() if (odd := [*filter(inverted.match, texts)])
    } == {}


MAY_TAKE = re.compile(
    r"(?<!\bself)(?<!\bcls)\._[a-z]|^\s*(?:from|import)\b.*\b_[a-z]"
    r"|^\s+_\w+ *(?:[,)#]|as\b|$)",
    re.IGNORECASE | re.MULTILINE,
)
"""Text in which a private name may be taken of something that is not the object or class itself."""


@pytest.mark.parametrize(
    "text",
    [
        "from workers import _one",
        "from workers import (\n    _one,\n)",
        "from workers import (\n    _one as other,\n)",
        "from workers import (\n    other,\n    _one\n)",
        "from workers import (\n    _one  # why\n)",
        "from workers import (\n    _one)",
        "import workers\nworkers._one",
    ],
)
def test_a_file_that_takes_a_private_name_is_parsed(text):
    assert MAY_TAKE.search(text)
    assert not MAY_TAKE.search(text.replace("_one", "one"))


@pytest.mark.slow
def test_nothing_takes_a_private_name_of_another_module():
    others = [ROOT / "docs", ROOT / "tests", ROOT / "benchmarks", ROOT / "examples"]
    paths = [*SOURCES, *(path for folder in others for path in sorted(folder.rglob("*.py")))]
    taken: list[str] = []
    for path in paths:
        within = nodes().get(path)
        if within is None:
            text = path.read_text(encoding="utf-8")
            # Parsing all of them takes longer than all other tests here.
            if not MAY_TAKE.search(text):
                continue
            within = [*ast.walk(ast.parse(text))]
        imported = [
            (node.module or "", name)
            for node in within
            if isinstance(node, ast.ImportFrom)
            for name in node.names
            if (node.module or "").split(".")[0] in ("sgmd", *PACKAGES)
        ]
        modules = {
            name.asname or name.name
            for home, name in imported
            if (ROOT / home.replace(".", "/") / f"{name.name}.py").is_file()
        }
        taken += [
            f"{relative(path)}: {home}.{name.name}"
            for home, name in imported
            if is_private(name.name)
        ]
        taken += [
            f"{relative(path)}: {node.value.id}.{node.attr}"
            for node in within
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules | {"sgmd"}
            and is_private(node.attr)
        ]
    assert taken == []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_public_name_stands_for_two_things():
    homes: dict[str, list[str]] = {}
    for path, tree in trees().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(relative(path))
    assert len(homes) > 500
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}
