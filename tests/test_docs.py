"""The documentation: generated pages are those of the code, and the site has no broken link."""

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml

import sgmd
from pipelines.cli import app
from pipelines.config.digest import MAY_CHANGE
from pipelines.config.recipe import DistillConfig
from pipelines.config.settings_check import known_keys
from pipelines.pretraining.config import PretrainConfig
from tests.helpers.forked_python import forked_python

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_generated_pages_are_those_of_the_code():
    done = run(forked_python(), "docs/make_reference.py", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path):
    done = run(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "python" / "index.html").read_text().count("SgmdObjective")


def test_every_page_has_a_place_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages == set(_leaves(config["nav"]))


def _leaves(nav):
    for entry in nav if isinstance(nav, list) else nav.values():
        if isinstance(entry, str):
            yield entry
        else:
            yield from _leaves(entry)


def test_recipe_keys_that_pages_name_exist():
    keys = [*known_keys(DistillConfig), *known_keys(PretrainConfig)]
    parts = {".".join(key.split(".")[:end]) for key in keys for end in range(1, key.count(".") + 2)}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    named = re.compile(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)+)(?:[=:] ?[^`]*)?`")
    files = (".json", ".jsonl", ".yaml", ".py", ".csv")
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = [
        (page.name, key)
        for page in pages
        for key in named.findall(page.read_text(encoding="utf-8"))
        if key.partition(".")[0] in sections and not key.endswith(files)
    ]
    assert len(found) > 50
    assert [(page, key) for page, key in found if key not in parts] == []


def test_the_page_on_resuming_lists_the_keys_that_may_differ():
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^Keys that may differ: (.*?)\. ", page, re.MULTILINE)
    assert re.findall(r"`([^`]+)`", listed) == list(MAY_CHANGE)


COMMAND = re.compile(r"^(?:\$ )?sgmd ((?:[^\\\n]|\\\n)+)", re.MULTILINE)
"""A command at the beginning of a line, with the lines that it goes on in."""


def test_commands_that_pages_show_have_these_options_and_keys():
    options, parts = _known()
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = [
        (page.name, words)
        for page in pages
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
        for words in COMMAND.findall(block)
    ]
    assert len(shown) > 100
    wrong = [(page, words) for page, words in shown if _is_wrong(words, options, parts)]
    assert wrong == []


@pytest.mark.parametrize("last", ["--nonsense 2", "batch.number=2"])
def test_a_wrong_option_or_key_in_the_second_line_of_a_command_is_found(last):
    right, wrong = COMMAND.findall(
        f"$ sgmd distill tiny \\\n  --resume runs/a batch.size=2\nsgmd distill tiny \\\n  {last}\n"
    )
    assert not _is_wrong(right, *_known())
    assert _is_wrong(wrong, *_known())


@cache
def _known():
    """Options by command, and the keys of recipes with their sections."""
    options = {name: _options(command) for name, command in _all_commands()}
    keys = {*known_keys(DistillConfig), *known_keys(PretrainConfig)}
    parts = {".".join(key.split(".")[:end]) for key in keys for end in range(1, key.count(".") + 2)}
    return options, parts


def _all_commands():
    group = typer.main.get_command(app)
    for name, command in getattr(group, "commands", {}).items():
        inner = getattr(command, "commands", {})
        yield from ((f"{name} {each}", inner[each]) for each in inner)
        if not inner:
            yield name, command


def _options(command):
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


def _is_wrong(words, options, parts):
    given = shlex.split(words.replace("\\\n", " "), comments=True)
    name = " ".join(given[: 2 if given[0] == "recipes" else 1])
    if name.startswith("-"):
        return False
    own = given[: given.index("--")] if "--" in given else given
    # Manifests have details of their own, and so has the recipe `gaussians`.
    is_recipe = not {"--with", "gaussians"} & {*own}
    keys = [word.partition("=")[0] for word in own[1:] if re.match(r"[a-z_.]+=", word)]
    flags = [word.partition("=")[0] for word in own if word.startswith("--")]
    return (
        name not in options
        or not options[name].issuperset(flags)
        or (is_recipe and not parts.issuperset(keys))
    )


PACKAGES = ("cluster", "pipelines", "workers", "sgmd_core", "sgmd", "benchmarks")
FOLDERS = (*PACKAGES, "docs", "tests", "examples", "assets", ".ci")
ELSEWHERE = {
    "MetricsExportPort",
    "brightness_ratio",
    "diffusion_models",
    "euler",
    "flex",
    "ModelSamplingSD3",
    "mxfp8",
    "nvfp4",
    "norm_clip_min",
    "scontrol",
    "srun",
}
"""Names of other programs, and of an example, that pages mention and our sources do not."""


@pytest.mark.slow
def test_files_and_names_that_pages_mention_exist():
    mentioned = [
        (page.name, name)
        for page in _present_pages()
        for name in re.findall(r"`([^`\n]+)`", _without_blocks(page.read_text(encoding="utf-8")))
    ]
    kinds = [_kind_of_missing(name) for _, name in mentioned]
    assert len(mentioned) > 2000
    missing = [(*at, kind) for at, kind in zip(mentioned, kinds, strict=True) if kind]
    assert missing == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pipelines/stages/algorithms.py", "file"),
        ("pipelines/stages/algorithm.py", ""),
        ("benchmarks/*.py", ""),
        ("no_such_file.py", "file"),
        ("cluster.files.write_holes", "name"),
        ("cluster.files.write_whole", ""),
        ("cluster.files.contextmanager", "name"),
        ("cluster.files.Writes", "name"),
        ("sgmd.Measures", "name"),
        ("GeneratorLearners", "name"),
        ("make everything", "target"),
        ("make test-quick", ""),
    ],
)
def test_a_file_or_name_that_does_not_exist_is_found(name, kind):
    assert _kind_of_missing(name) == kind


def _present_pages():
    """Pages on what there is; decisions and the changelog tell of what there was, too."""
    pages = (ROOT / "docs").glob("*.md")
    return [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *pages]


def _without_blocks(text):
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


@cache
def _kind_of_missing(name):
    """Kind of a thing that does not exist; "" for one that does, or that nothing can be said of."""
    if name.partition("/")[0] in FOLDERS and re.fullmatch(r"[\w./*-]+", name):
        is_there = any(ROOT.glob(name)) if "*" in name else (ROOT / name).exists()
        return "" if is_there else "file"
    if re.fullmatch(r"[\w/-]+\.py", name):
        is_there = any(each.endswith(f"/{name}") for each in _files())
        return "" if is_there or name.startswith("my_package/") else "file"
    if found := re.fullmatch(rf"((?:{'|'.join(PACKAGES)})(?:\.\w+)+)(?:\(.*\))?", name):
        return "" if name == "sgmd.json" or _is_there(found[1]) else "name"
    if name.startswith("make "):
        target = re.escape(name.split()[1])
        text = (ROOT / "Makefile").read_text(encoding="utf-8")
        return "" if re.search(rf"^{target}:", text, re.MULTILINE) else "target"
    if re.fullmatch(r"[A-Za-z_]\w*", name):
        return "" if name in _words() | ELSEWHERE else "name"
    return ""


def _is_there(dotted):
    """Tells whether a dotted name is one of a module, or a module itself."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        module = "/".join(parts[:end])
        for file in (f"{module}.py", f"{module}/__init__.py"):
            if file in _files():
                defined = _defined(file)
                return defined.issuperset(parts[end:]) or (
                    parts[0] == "sgmd" and _is_public(parts[1:])
                )
    return False


@cache
def _defined(file):
    """Names that a module defines, its attributes' included; a package's with those it imports."""
    nodes = list(ast.walk(ast.parse(_sources()[file])))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = {node.name for node in nodes if isinstance(node, functions)}
    stored = [node for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store)]
    names |= {node.id for node in stored if isinstance(node, ast.Name)}
    names |= {node.attr for node in stored if isinstance(node, ast.Attribute)}
    if file.endswith("__init__.py"):
        imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        names |= {each.asname or each.name for node in imports for each in node.names}
    return frozenset(names)


def _is_public(parts):
    """Tells whether a name is one of `sgmd`, and the others are its attributes somewhere."""
    return parts[0] in sgmd.__all__ and _words().issuperset(parts)


@cache
def _files():
    return frozenset(
        str(path.relative_to(ROOT))
        for folder in (*PACKAGES, "docs", "tests", "examples", ".ci")
        for path in (ROOT / folder).rglob("*.py")
    )


@cache
def _sources():
    return {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in _files()
        if not name.startswith("tests/") or name.startswith("tests/helpers/") or "conftest" in name
    }


@cache
def _words():
    """Words of the sources, the recipes, the dashboard and the settings of the tools."""
    named = ("pyproject.toml", "Makefile", "docs/grafana.json")
    others = [*(ROOT / "pipelines").rglob("*.yaml"), *(ROOT / name for name in named)]
    texts = [*_sources().values(), *(path.read_text(encoding="utf-8") for path in others)]
    return frozenset(word for text in texts for word in re.findall(r"\w+", text))


NO_LITERALS = ("out of memory", "Missing authentication token", "still reading")
"""Messages of torch and Ray that the page quotes, and one that is composed of parts."""


@pytest.mark.slow
def test_messages_that_the_page_on_troubleshooting_quotes_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    symptoms = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    quotes = [words for cell in symptoms for words in re.findall(r"`([^`]+)`", cell)]
    # Commands and settings are compared above.
    quotes = [words for words in quotes if " " in words and not re.search(r"^sgmd|^ray |=", words)]
    pieces = {piece.strip() for words in quotes for piece in re.split(r"\.\.\.|\d+", words)}
    pieces -= {"", *NO_LITERALS}
    assert len(pieces) > 15
    text = "\n".join(_literals())
    assert sorted(piece for piece in pieces if piece not in text) == []


def test_a_docstring_is_no_message():
    source = 'def a():\n    """Told."""\n    raise ValueError(f"{a} said", "and meant")\n'
    assert [*_literals_in(source)] == ["and meant", " said"]


def _literals():
    for name, text in _sources().items():
        if name.startswith(("cluster/", "pipelines/", "workers/", "sgmd_core/")):
            yield from _literals_in(text)


def _literals_in(source):
    """Texts in a source that are no docstrings."""
    docstrings = set()
    # Breadth first: a statement comes before the constant that it may consist of.
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr):
            docstrings.add(node.value)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node not in docstrings
        ):
            yield node.value
