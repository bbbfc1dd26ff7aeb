"""Counts what the shape of the code is judged by: files, lines, arrows between folders, names.

    python .ci/census.py [TREE]

A room is a folder or a file directly below `pipelines/` (of `data`, each of its folders); an arrow
leads from one room to another that it imports from, inside functions and for type checkers too.
"""

import ast
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGES = ("sgmd", "sgmd_core", "workers", "cluster", "pipelines")
LONG = 60
LARGE = 400

Graph = dict[str, set[str]]


def files_by_module(root: Path) -> dict[str, Path]:
    """Returns the files of all packages by module name."""
    paths = [path for name in PACKAGES for path in sorted((root / name).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}


def room_of(module: str) -> str | None:
    """Returns the room of a module of `pipelines`; None for others, and for bare packages."""
    parts = module.split(".")
    if parts[0] != "pipelines" or parts[-1] == "__init__":
        return None
    return ".".join(parts[1:3]) if parts[1] == "data" and len(parts) > 3 else parts[1]


def imports_of(tree: ast.Module, known: Mapping[str, object]) -> Iterator[str]:
    """Yields the modules of ours that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found = inner if inner in known else node.module
                if found in known:
                    yield found


def circles_of(graph: Graph) -> list[list[str]]:
    """Returns the groups of nodes that all reach one another."""
    reached = {node: _reached(graph, node) for node in graph}
    groups = {
        tuple(sorted(other for other in reached[node] if node in reached.get(other, ())))
        for node in graph
        if node in reached[node]
    }
    return sorted(map(list, groups))


def _reached(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    left = list(graph[start])
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += graph.get(node, ())
    return found


def census(root: Path) -> dict[str, object]:
    """Returns all counts of a tree."""
    modules = files_by_module(root)
    texts = {module: path.read_text(encoding="utf-8") for module, path in modules.items()}
    trees = {module: ast.parse(text) for module, text in texts.items()}
    rooms: Graph = {room: set() for name in modules if (room := room_of(name))}
    for module, tree in trees.items():
        mine = room_of(module)
        theirs = {room_of(name) for name in imports_of(tree, modules)} - {mine, None}
        if mine is not None:
            rooms[mine] |= {name for name in theirs if name is not None}
    names = [
        node.name
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    ]
    functions = [
        node
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lines = {module: len(text.splitlines()) for module, text in texts.items()}
    return {
        "files": len(modules),
        "lines": sum(lines.values()),
        "rooms": len(rooms),
        "arrows between rooms": sum(map(len, rooms.values())),
        "circles of rooms": circles_of(rooms),
        "public names": len(set(names)),
        "public names that stand twice": sorted({name for name in names if names.count(name) > 1}),
        f"functions over {LONG} lines, signature and docstring included": sum(
            (node.end_lineno or node.lineno) - node.lineno + 1 > LONG for node in functions
        ),
        f"files over {LARGE} lines": sum(number > LARGE for number in lines.values()),
    }


if __name__ == "__main__":
    tree = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    print(json.dumps(census(tree), indent=1))
