"""YAML text of people: the core schema of YAML 1.2, within bounds.

A recipe or a setting may come from anywhere, so its size is checked on the stream of parser events
before a value is built: characters, depth, and the values that aliases expand to. Tags other than
those of the core schema are refused.
"""

import math
import re
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import lru_cache
from typing import Any

import yaml

MAX_CHARACTERS = 2**20
MAX_DEPTH = 32
MAX_VALUES = 50_000
MAX_INTEGER = 2**63 - 1
_CORE = "tag:yaml.org,2002:"


class _CoreSchemaLoader(yaml.SafeLoader):
    """YAML 1.2's core schema: `2e-5` is a number, `off` and `no` are words, keys come once.

    PyYAML follows YAML 1.1, which reads `2e-5` as text, `off` as false and `1:30` as 90, and
    silently keeps the last of two equal keys.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _problem("a value that is not a section", node)
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value == "<<":
                words = "merge keys (<<) are not of YAML 1.2: repeat the keys, or a whole section"
                raise _problem(f"{words} by an alias", key_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _CORE + "str":
                raise _problem(f"the key {_shown(key_node)} is not text", key_node)
            if key_node.value in seen:
                raise _problem(f"the key {key_node.value!r} is given twice", key_node)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:  # noqa: ANN401  (whatever the text holds)
    """Reads YAML text by the core schema of YAML 1.2.

    Raises:
        yaml.YAMLError: The text is not YAML, is too large or deep, has a key that is not text or
            is given twice, or a tag that the core schema lacks.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"{len(text)} characters, at most {MAX_CHARACTERS} are read")
    return deepcopy(_read(text))


# What PyYAML's two parsers read differently: libyaml also takes tabs, for one.
_ODD = re.compile(
    r"[^\n -~\u00a1-\u2027\u202f-\ud7ff\ue000-\ufefe\uff00-\ufffd]|[!?]|[|>]\S*#|^%", re.MULTILINE
)


# Sweeps, studies and tests read the same recipes again and again.
@lru_cache(maxsize=32)
def _read(text: str) -> Any:  # noqa: ANN401  (whatever the text holds)
    if not _ODD.search(text):
        # What it refuses is read once more, for the words and places of PyYAML's own parser.
        with suppress(yaml.YAMLError):
            return _read_by(_QUICK_LOADER, text)
    return _read_by(_CoreSchemaLoader, text)


def _read_by(loader: type[_CoreSchemaLoader], text: str) -> Any:  # noqa: ANN401  (as above)
    _check_bounds(text, loader)
    return yaml.load(text, Loader=loader)


def yaml_problem(error: yaml.YAMLError) -> str:
    """The problem and its place in one line."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        words = error.problem or error.context or "not YAML"
        return f"line {mark.line + 1}, column {mark.column + 1}: {words}" if mark else words
    return str(error).partition("\n")[0]


def shortened(text: str, most: int = 200) -> str:
    """Text for an error message, cut in the middle where it is long."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def _check_bounds(text: str, loader: type[_CoreSchemaLoader]) -> None:
    """Counts depth and values on parser events, which need no recursion and no memory."""
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, 1))
            if len(opened) > MAX_DEPTH:
                raise _problem(f"more than {MAX_DEPTH} sections or lists in each other", event)
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = opened.pop()
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise _problem(f"the anchor {event.anchor!r} contains itself", event)
            anchor, size = None, sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if opened:
            parent, count = opened[-1]
            opened[-1] = (parent, count + size)
            if count + size > MAX_VALUES:
                raise _problem(f"more than {MAX_VALUES} values, aliases written out", event)


def _problem(words: str, place: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, words, place.start_mark)


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.value else "null"
    return "that is a list" if isinstance(node, yaml.SequenceNode) else "that is a section"


def _whole_number(text: str) -> int:
    """Decimal; the constructor of YAML 1.1 would read a leading zero as octal."""
    if not text.lstrip("+-").isdecimal():
        raise ValueError(f"{text!r} is not a whole number")
    # Beyond 4300 digits Python refuses, and 64 bits hold every count.
    if len(text) > 25 or abs(int(text)) > MAX_INTEGER:
        raise ValueError("a whole number of more than 64 bits")
    return int(text)


def _number(text: str) -> float:
    lower = text.lower()
    if lower.lstrip("+-") == ".inf":
        return -math.inf if lower.startswith("-") else math.inf
    try:
        return math.nan if lower == ".nan" else float(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number") from error


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _scalar(convert: Callable[[str], object]) -> Callable[[_CoreSchemaLoader, yaml.Node], object]:
    def construct(_: _CoreSchemaLoader, node: yaml.Node) -> object:
        if not isinstance(node, yaml.ScalarNode):
            raise _problem(f"the tag {node.tag.removeprefix(_CORE)} of a list or section", node)
        try:
            return convert(node.value)
        except ValueError as error:
            raise _problem(str(error), node) from error

    return construct


def _refused(_: _CoreSchemaLoader, node: yaml.Node) -> object:
    tag = node.tag.replace(_CORE, "!!")
    raise _problem(f"the tag {tag}, which is not read: only text, numbers, lists, sections", node)


_SCALARS: tuple[tuple[str, str, str | list[str], Callable[[str], object]], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF", _truth),
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""], lambda _: None),
    ("int", r"[-+]?[0-9]+", "-+0123456789", _whole_number),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
        _number,
    ),
)
# PyYAML picks the resolver by the first character of a scalar.
_CoreSchemaLoader.yaml_implicit_resolvers = {}
_CoreSchemaLoader.yaml_constructors = {
    f"{_CORE}{kind}": yaml.SafeLoader.yaml_constructors[f"{_CORE}{kind}"]
    for kind in ("str", "seq", "map")
}
for _tag, _pattern, _first, _convert in _SCALARS:
    _CoreSchemaLoader.add_implicit_resolver(
        _CORE + _tag, re.compile(rf"^(?:{_pattern})$"), list(_first)
    )
    _CoreSchemaLoader.add_constructor(_CORE + _tag, _scalar(_convert))
# None stands for every tag without a constructor of its own; the stubs do not know it.
_CoreSchemaLoader.add_constructor(None, _refused)  # pyright: ignore[reportArgumentType]


def _quick_loader() -> type[_CoreSchemaLoader]:
    """The same schema on the parser of libyaml, if there is one: it takes less time."""
    if not yaml.__with_libyaml__:
        return _CoreSchemaLoader

    class ByLibyaml(yaml.CSafeLoader, _CoreSchemaLoader):
        pass

    return ByLibyaml


_QUICK_LOADER = _quick_loader()
