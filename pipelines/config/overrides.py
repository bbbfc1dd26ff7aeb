"""Reads settings: YAML as people expect it, and overrides such as `batch.size=8`.

    recipe.yaml  ->  nested dict  +  a.b=c, d.e=[1, 2]  ->  nested dict  ->  pipelines.config.recipe

The same text means the same on the command line, in a sweep and in a submitted job.

A section that names a `method` has the settings of that method. Choosing another one therefore
starts the section again; settings given beside it are those of the new method, in whatever order.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pipelines.config.renamed_keys import current_key, with_current_keys
from pipelines.config.yaml_text import MAX_DEPTH, read_yaml, shortened, yaml_problem
from sgmd_core.errors import ConfigError

_METHOD = "method"
_BEGINS_COMMENT = re.compile(r"(^|[\s\[{,])#")
_IN_QUOTES = "Put a value with a # in quotes inside the shell's: 'name=\"a #1\"'"


@dataclass(frozen=True, slots=True)
class Override:
    """One setting given beside the recipe.

    Attributes:
        key: Dotted path, for example ("objective", "lambda_nr").
        value: What YAML makes of the text after the equals sign.
    """

    key: tuple[str, ...]
    value: Any

    @property
    def dotted(self) -> str:
        """The key as it was typed."""
        return ".".join(self.key)

    @property
    def in_words(self) -> str:
        """Key and value, shortened."""
        return shortened(f"{self.dotted}={json.dumps(self.value, default=str)}")


def parse_override(text: str) -> Override:
    """Reads `a.b=c`; what stands after the equals sign is YAML.

    Raises:
        ConfigError: There is no key, no equals sign, no YAML after it, or a comment of YAML.
    """
    attempted, remedy = (
        f"reading the override {shortened(repr(text))}",
        "For example objective.lambda_nr=0.05",
    )
    dotted, equals, value = text.partition("=")
    key = tuple(dotted.strip().split("."))
    if not equals or not all(key) or len(key) > MAX_DEPTH:
        raise ConfigError(attempted, "no KEY=VALUE", "a dotted key, =, and a value", remedy)
    try:
        read, comment = read_yaml(value), _comment(value)
    except yaml.YAMLError as error:
        found = f"{shortened(repr(value))} after the equals sign ({yaml_problem(error)})"
        remedy = _IN_QUOTES if _BEGINS_COMMENT.search(value) else remedy
        raise ConfigError(attempted, found, "a YAML value", remedy) from error
    if comment:
        found = f"a comment of YAML, which is left out: {shortened(repr(comment))}"
        raise ConfigError(attempted, found, "a value that is used as a whole", _IN_QUOTES)
    return Override(key, read)


def _comment(text: str) -> str:
    """The first comment of YAML, within lists too: nobody means one in a single setting."""
    tokens = [token for token in yaml.scan(text) if not isinstance(token, yaml.StreamEndToken)]
    ends = [token.end_mark.index for token in tokens]
    begins = [token.start_mark.index for token in tokens[1:]] + [len(text)]
    between = (text[end:begin].strip() for end, begin in zip(ends, begins, strict=True))
    return next((gap for gap in between if gap.startswith("#")), "")


def require_single(overrides: Sequence[Override], attempted: str) -> None:
    """Checks that no setting is given twice, alone or in a section.

    Raises:
        ConfigError: Some are; names them with both values.
    """
    found: list[str] = []
    given: list[tuple[Override, tuple[str, ...]]] = []
    for override in overrides:
        key = current_key(override.key, warns=False)
        found += [
            f"{before.in_words} and {override.in_words}"
            for before, earlier in given
            if _loses(earlier, before.value, key)
        ]
        given.append((override, key))
    if found:
        expected = "each setting once"
        raise ConfigError(attempted, "; ".join(found), expected, "Leave out one of the two")


def _loses(earlier: tuple[str, ...], value: Any, later: tuple[str, ...]) -> bool:  # noqa: ANN401 - any YAML
    """Returns True if what is set later takes the place of something set earlier."""
    if earlier[: len(later)] == later:
        return True
    if later[: len(earlier)] != earlier:
        return False
    for name in later[len(earlier) :]:
        if not isinstance(value, Mapping) or name not in value:
            return False
        value = value[name]
    return True


def apply_overrides(settings: Mapping[str, Any], overrides: Iterable[Override]) -> dict[str, Any]:
    """The settings with the overrides put in, later ones last; the argument is left as it is.

    Raises:
        ConfigError: An override reaches into a value as if it were a section.
    """
    result = with_current_keys(settings)
    current = (Override(current_key(each.key), each.value) for each in overrides)
    for override in sorted(current, key=lambda override: override.key[-1] != _METHOD):
        result = _put(result, override, depth=0)
    return result


def _put(section: Mapping[str, Any], override: Override, depth: int) -> dict[str, Any]:
    name, result = override.key[depth], dict(section)
    if depth + 1 == len(override.key):
        if name == _METHOD and section.get(name, override.value) != override.value:
            result = {}
        result[name] = override.value
        return result
    inner = section.get(name)
    if inner is not None and not isinstance(inner, Mapping):
        raise ConfigError(
            f"setting {override.dotted}",
            f"{'.'.join(override.key[: depth + 1])} is the value {inner!r}",
            "a section with settings of its own",
        )
    result[name] = _put(inner or {}, override, depth + 1)
    return result


def nearest_key(unknown: str, known: Sequence[str]) -> str | None:
    """The known dotted key that was probably meant, if any comes close.

    Tried in turn: a setting of the same name in another section, a key that is written almost the
    same, a setting of almost the same name. Case does not count.
    """
    unknown = unknown.lower()
    name = unknown.rpartition(".")[2]
    misplaced = [key for key in known if key.rpartition(".")[2] == name]
    if misplaced:
        return max(misplaced, key=lambda key: difflib.SequenceMatcher(a=unknown, b=key).ratio())
    in_full = difflib.get_close_matches(unknown, known, n=1, cutoff=0.7)
    if in_full:
        return in_full[0]
    by_name = {key.rpartition(".")[2]: key for key in reversed(known)}
    close = difflib.get_close_matches(name, by_name, n=1, cutoff=0.6)
    return by_name[close[0]] if close else None
