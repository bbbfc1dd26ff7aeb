"""Settings checked against the model of a command: all that is wrong with them, in words.

    a nested dict  ->  a frozen pydantic model, or one error that names every wrong setting

A key that does not exist names the nearest one that does.
"""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.redaction import has_user, without_secrets
from pipelines.config.methods import unknown_method
from pipelines.config.overrides import nearest_key
from pipelines.config.yaml_text import shortened
from sgmd_core.errors import ConfigError

_MOST_SECONDS = 1e8
_MOST_COUNT = 2**53
_MOST_FLOAT = 3.4e38  # of float32
_EXTREMES = {"seed": 2**63 - 1}

# Named by diffusers beside `ulysses_degree`, so that users look for it here.
_RING = re.compile(r"ring(_|$)")
_NO_RING = (
    "ring attention is not offered, as diffusers has it for kernels of GPUs alone and nothing here "
    "could show that it is right; compute.ulysses of a role shares each sample "
    "between ranks (docs/memory.md)"
)

C = TypeVar("C", bound=BaseModel)

# How pydantic names the kinds of value among which a setting chooses.
_KIND = re.compile(r"(bool|int|float|str|none|constrained-\w+)$|[a-z-]+\[.*\]$", re.DOTALL)
_EXPECTS = ", expected "

# What YAML writes, in the words of somebody who writes it.
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_long": "a shorter text",
    "string_pattern_mismatch": "letters, digits, `.`, `_` and `-`, a letter or digit first",
    "list_type": "a list",
    "tuple_type": "a list",
    "dataclass_type": "a section with settings of its own",
    "model_type": "a section with settings of its own",
    "dict_type": "a section with settings of its own",
    "union_tag_not_found": "a section with settings of its own",
}


def validate(kind: type[C], settings: Mapping[str, Any], attempted: str) -> C:
    """Checks a nested dict and makes the settings of it.

    Types are strict: text is never taken for a number, nor a fraction for a count.

    Raises:
        ConfigError: Says all that is wrong.
    """
    problems = [*_unusable_numbers(settings), *_users_in_addresses(settings)]
    checked = _made(kind, settings)
    if not problems and not isinstance(checked, ValidationError):
        return checked
    too_large = {line.partition(" is ")[0] for line in problems}
    problems += [
        line for line in _all_problems(kind, settings) if line.partition(" is ")[0] not in too_large
    ]
    problems = _as_alternatives(dict.fromkeys(problems))
    if len(problems) == 1:
        found = problems[0]
    else:
        found = f"{len(problems)} settings are wrong:\n  - " + "\n  - ".join(problems)
    remedy = "\n`sgmd recipes show NAME` prints a recipe in which every key is explained"
    raise ConfigError(attempted, found, remedy=remedy)


def _as_alternatives(lines: Iterable[str]) -> list[str]:
    """One line for a setting that may have values of several kinds, with all that are expected."""
    expected: dict[str, list[str]] = {}
    for line in lines:
        found, separator, wanted = line.partition(_EXPECTS)
        expected.setdefault(found, []).extend([wanted] if separator else [])
    return [
        found + _EXPECTS * bool(wanted) + ", or ".join(wanted) for found, wanted in expected.items()
    ]


def _users_in_addresses(settings: Any, key: str = "") -> Iterator[str]:  # noqa: ANN401  (unchecked)
    """Settings with a user or a key in an address: settings are written to files and logs."""
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            yield from _users_in_addresses(value, f"{key}.{name}" if key else str(name))
    elif isinstance(settings, list):
        for value in settings:
            yield from _users_in_addresses(value, key)
    elif isinstance(settings, str) and has_user(settings):
        yield (
            f"{key} is {shortened(without_secrets(settings))}, an address with a user or a key in "
            "it: settings are not the place for secrets, which come from the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )


def _made(kind: type[C], settings: Mapping[str, Any]) -> C | ValidationError:
    try:
        # By way of JSON, whose strict mode takes a list for a tuple and an object for a record.
        return kind.model_validate_json(json.dumps(settings), strict=True)
    except ValidationError as error:
        return error


def _all_problems(kind: type[BaseModel], settings: Mapping[str, Any]) -> Iterator[str]:
    """Everything that is wrong with settings.

    A section with a wrong value is not compared with the others, and a record that checks itself
    stops at its first wrong value. So the settings are checked again without the wrong ones, until
    nothing new is found.
    """
    known, methods = known_keys(kind), _methods(kind, "")
    dropped: set[str] = set()
    while isinstance(error := _made(kind, settings), ValidationError):
        wrong: set[str] = set()
        for detail in error.errors():
            key, _ = _written_key([str(part) for part in detail["loc"]], methods)
            is_own = detail["type"] == "value_error"
            # Of a setting that was left out, only its absence can be said.
            if not is_own and any(f"{each}.".startswith(f"{key}.") for each in dropped):
                # It has no default, so its section cannot be made without it.
                wrong.add(key.rpartition(".")[0])
                continue
            lines = _problems(detail, known, methods)
            # What a record says of a setting that was left out is said of its default.
            if not (is_own and _wrong_key(key, lines[0], known) in dropped):
                yield from (line for line in lines if not any(each in line for each in dropped))
            wrong.add(_wrong_key(key, lines[0], known) if is_own else key)
        wrong -= {"", *dropped}
        if not wrong:
            return
        dropped |= wrong
        settings = _without(settings, wrong)


def _wrong_key(section: str, line: str, known: Sequence[str]) -> str:
    """The setting that a record has refused, by the first word of what it says."""
    words = line.removeprefix(f"{section}: ").split(maxsplit=1)
    key = f"{section}.{words[0].rpartition('.')[2]}" if section and words else ""
    return key if key in known else section


def _without(
    settings: Mapping[str, Any], keys: Collection[str], prefix: str = ""
) -> dict[str, Any]:
    """The settings without some of them; of a list with a wrong element, without the list."""
    return {
        name: _without(value, keys, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if not any(
            key == f"{prefix}{name}"
            or (key.startswith(f"{prefix}{name}.") and not isinstance(value, Mapping))
            for key in keys
        )
    }


def _unusable_numbers(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Numbers that no setting can have: not finite, or beyond what counts and clocks hold."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _unusable_numbers(value, f"{key}.")
        for place, number in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(number, Mapping) and isinstance(value, list):
                yield from _unusable_numbers(number, f"{key}.{place}.")
            if not isinstance(number, int | float) or isinstance(number, bool):
                continue
            most = _MOST_COUNT if isinstance(number, int) else _MOST_FLOAT
            most = _MOST_SECONDS if key.endswith("_s") else _EXTREMES.get(key, most)
            if not math.isfinite(number):
                yield f"{key} is {json.dumps(number)}, expected a finite number"
            elif abs(number) > most:
                yield f"{key} is {number:g}, expected at most {most:g}"


def known_keys(kind: type) -> list[str]:
    """Dotted keys of all settings of a model, sections and those of every method included."""
    return list(_known(kind))


# Every recipe that is read asks for them.
@cache
def _known(kind: type) -> tuple[str, ...]:
    return (*dict.fromkeys(_keys(kind, "")),)


def _keys(kind: type, prefix: str) -> Iterator[str]:
    for name, annotation in _annotations(kind).items():
        yield prefix + name
        for inner in _records_in(annotation):
            yield from _keys(inner, f"{prefix}{name}.")


def _methods(kind: type, prefix: str) -> dict[str, set[str]]:
    """The names among which a section's `method` chooses, by the section's dotted key."""
    found: dict[str, set[str]] = {}
    for name, annotation in _annotations(kind).items():
        records = _records_in(annotation)
        tags = {tag for record in records for tag in get_args(_annotations(record).get("method"))}
        if len(tags) > 1:
            found[prefix + name] = tags
        for record in records:
            found |= _methods(record, f"{prefix}{name}.")
    return found


@cache
def _annotations(kind: type) -> Mapping[str, Any]:
    if issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _records_in(annotation: Any) -> list[type]:  # noqa: ANN401  (any type expression)
    """The sections that an annotation names: alone, as `Section | None`, or one a method."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _records_in(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [record for option in get_args(annotation) for record in _records_in(option)]
    is_record = isinstance(annotation, type) and (
        issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)
    )
    return [annotation] if is_record else []


def _written_key(parts: Sequence[str], methods: Mapping[str, set[str]]) -> tuple[str, str]:
    """The dotted key as a recipe has it, and the method whose section it is in, if any.

    pydantic names the method as a level of its own, which no recipe has, and so each kind of value
    that a setting may have besides others.
    """
    key, method = "", ""
    for part in parts:
        if part in methods.get(key, ()):
            method = part
        elif _KIND.match(part):
            continue
        else:
            key = f"{key}.{part}" if key else part
    return key, method


def _problems(
    detail: ErrorDetails, known: Sequence[str], methods: Mapping[str, set[str]]
) -> list[str]:
    key, method = _written_key([str(part) for part in detail["loc"]], methods)
    match detail["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument" if key in known and method:
            return [f"{key} is not a setting of {method}"]
        case "extra_forbidden" | "unexpected_keyword_argument" if key in known:
            section, _, name = key.rpartition(".")
            return [f"{key} has dots, as on the command line; write {name} into {section}"]
        case "union_tag_invalid":
            found = str(detail.get("ctx", {})["tag"])
            return [f"{key}.method is {json.dumps(found)}, {unknown_method(found)}"]
        case "extra_forbidden" | "unexpected_keyword_argument" if asked := _ring_key(
            key, detail["input"]
        ):
            return [f"{asked} is not a setting: {_NO_RING}"]
        case "extra_forbidden" | "unexpected_keyword_argument":
            nearest = nearest_key(key, known)
            hint = f"; the nearest one is {nearest}" if nearest else ""
            return [f"{key} is not a setting{hint}"]
        case "missing":
            return [f"{key} is missing"]
        case "json_invalid":
            return [f"text that is not Unicode ({detail['msg']})"]
        case "value_error":
            return _own_check(key, detail.get("ctx", {})["error"])
        case kind:
            found = shortened(json.dumps(detail["input"], ensure_ascii=False))
            said = detail["msg"].removeprefix("Input should be ")
            wanted = _EXPECTED.get(kind, said)
            if kind == "too_short":
                wanted = f"at least {detail.get('ctx', {}).get('min_length')} value"
            elif kind == "string_type" and detail["input"] is None:
                wanted = 'text; an empty one is written ""'
            return [f"{key} is {found}{_EXPECTS}{wanted}"]


def _ring_key(key: str, value: object) -> str | None:
    """The key that asks for ring attention, in the section of a role or in one without a role."""
    if key == "compute" and isinstance(value, Mapping):
        return next((f"{key}.{name}" for name in value if _RING.match(str(name))), None)
    section, _, name = key.rpartition(".")
    return key if section.endswith("compute") and _RING.match(name) else None


def _own_check(key: str, error: ValueError) -> list[str]:
    """Words of a record that has checked itself, under the section it stands in."""
    if isinstance(error, ConfigError):
        return [f"{key}: {error.found}" + (f", expected {error.expected}" * bool(error.expected))]
    lines = str(error).splitlines()
    return [f"{key}: {line}" if key else line for line in lines]
