"""Recipe keys, and the classes and arguments that they become: one word a thing."""

import ast
import re
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from pipelines.config.recipe import DistillConfig

ROOT = Path(__file__).parents[3]
PACKAGES = ("sgmd_core", "workers", "cluster", "pipelines")

SECTIONS = {
    "data.also": "an adverb: the records are further captions, beside those of `data.train`",
    "sweep.space": "the search space, of which a record is one dimension",
    "objective.meanflow": "one word in the paper's name, two in its class",
    "objective.adversary": "the term of an adversary is an adversarial one",
    **{
        f"topology.{name}": "the processes of a role or a service, a pool as any other"
        for name in (
            *("generator", "fake_score", "discriminator"),
            *("fused", "text", "feed", "validator"),
        )
    },
}
"""Sections whose class has another name, and why."""

ANY_SETTING = "takes any setting, or any number"
ANY_PLACE = "takes any place"
ANY_FIGURE = "takes any figure; the score is the one that ranks"
ARGUMENTS = {
    ("require_setting", "found"): ANY_SETTING,
    ("require_divisible", "number"): ANY_SETTING,
    ("split_evenly", "number"): ANY_SETTING,
    ("count_in_words", "number"): ANY_SETTING,
    ("_Limit", "limit"): ANY_SETTING,
    ("Source", "url"): ANY_PLACE,
    ("first_captions", "url"): ANY_PLACE,
    ("require_lasting_folder", "folder"): ANY_PLACE,
    ("require_output_folder", "folder"): ANY_PLACE,
    ("_latest", "figure"): ANY_FIGURE,
    ("value_at", "figure"): ANY_FIGURE,
    ("title", "name"): ANY_FIGURE,
    ("_Asha", "metric"): "Ray Tune's name",
    ("_Median", "metric"): "Ray Tune's name",
    ("RunLog", "run"): "the name of the run",
    ("RayMetrics", "run"): "the name of the run",
    ("_RayOpener", "borrower"): "the name of the run that borrows roles from a service",
    ("Source", "names"): "names of the columns",
    ("sections_of", "size"): "shards of a section",
    ("_point_at", "share"): "a share of the budget",
    ("KeptClips", "patience_s"): "waits for a store, as long as a run does",
    ("replace_lost", "patience_s"): "waits for an answer to a call",
    ("rebuild", "timeout_s"): "waits for a machine",
}
"""Arguments that have nothing of the name of the key that they are given, and why."""


def words(name: str) -> set[str]:
    """Words of a name in snake or camel case, in the singular."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_").split("_")
    return {re.sub(r"(?:es|is|s|e)$", "", part) for part in parts} - {"setting", ""}


def records_in(hint: object) -> Iterator[type]:
    """Records that a type names, also in containers and unions."""
    if isinstance(hint, type) and (issubclass(hint, BaseModel) or is_dataclass(hint)):
        yield hint
    for inner in typing.get_args(hint):
        yield from records_in(inner)


def hints_of(record: type) -> dict[str, object]:
    """Keys of a section and their types."""
    if issubclass(record, BaseModel):
        return {name: field.annotation for name, field in record.model_fields.items()}
    hints = typing.get_type_hints(record)
    return {field.name: hints[field.name] for field in fields(record) if field.init}


def keys_of(record: type, above: tuple[str, ...] = ()) -> Iterator[tuple[str, type, list[type]]]:
    """Every dotted key below a section, the section, and the records that it can be."""
    for name, hint in hints_of(record).items():
        inner = list(dict.fromkeys(records_in(hint)))
        yield ".".join((*above, name)), record, inner
        for one in inner:
            yield from keys_of(one, (*above, name))


KEYS = [*keys_of(DistillConfig)]


def test_a_section_is_called_as_its_class_is():
    assert len(KEYS) > 400
    odd = {
        key
        for key, _, inner in KEYS
        for one in inner
        if not words(key.rpartition(".")[2]) & words(one.__name__)
    }
    assert odd == {*SECTIONS}


@cache
def trees() -> dict[Path, ast.Module]:
    """Every source file, parsed once."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def signatures(tree: ast.Module) -> dict[str, list[str]]:
    """Parameters of a module's functions and classes, in order."""
    found: dict[str, list[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = [each.arg for each in node.args.args + node.args.kwonlyargs]
        elif isinstance(node, ast.ClassDef):
            own = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
            if "__init__" in own:
                given = own["__init__"].args
                found[node.name] = [each.arg for each in given.args[1:] + given.kwonlyargs]
            else:
                lines = [each for each in node.body if isinstance(each, ast.AnnAssign)]
                found[node.name] = [ast.unparse(each.target) for each in lines]
    return found


@cache
def public_signatures() -> dict[str, list[str]]:
    """Those of public functions and classes, whose names are unique."""
    every = [signatures(tree) for tree in trees().values()]
    return {name: own for each in every for name, own in each.items() if name[0] != "_"}


def arguments_of(call: ast.Call, known: dict[str, list[str]]) -> Iterator[tuple[str, ast.expr]]:
    """Parameters of a function or class of ours, and what each is given."""
    if isinstance(call.func, ast.Name) and call.func.id in known:
        named = known[call.func.id]
        if not any(isinstance(each, ast.Starred) for each in call.args):
            yield from zip(named, call.args, strict=False)
        yield from ((each.arg, each.value) for each in call.keywords if each.arg)


def key_in(value: ast.expr, typed: dict[str, str]) -> tuple[str, str, str] | None:
    """The section, its class and the key that an expression such as `config.batch.size` reads.

    Args:
        value: The expression.
        typed: Types of the function's parameters.
    """
    parts = ast.unparse(value).split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return None
    above, name = parts[-2].lstrip("_"), parts[-1]
    for key, record, _ in KEYS:
        *_, section, own = ["", *key.split(".")]
        by_type = len(parts) == 2 and typed.get(parts[0]) == record.__name__
        if own == name and (by_type or section == above):
            return section, record.__name__, name
    return None


def foreign_words() -> Iterator[tuple[str, str, str]]:
    """Callee, argument and key, wherever the two have no word in common."""
    sections = {key.rpartition(".")[2] for key, _, inner in KEYS if inner}
    for tree in trees().values():
        known = public_signatures() | signatures(tree)
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            typed = {
                each.arg: ast.unparse(each.annotation).strip("\"'").partition(" |")[0]
                for each in function.args.args + function.args.kwonlyargs
                if each.annotation is not None
            }
            for call in ast.walk(function):
                if not isinstance(call, ast.Call):
                    continue
                for argument, value in arguments_of(call, known):
                    key = key_in(value, typed)
                    whole = argument == "settings" and key is not None and key[2] in sections
                    if key is None or argument == key[2] or whole:
                        continue
                    if not words("_".join(key)) & words(argument):
                        assert isinstance(call.func, ast.Name)
                        yield call.func.id, argument, f"{key[0]}.{key[2]}"


@pytest.mark.slow
def test_an_argument_is_called_as_the_key_that_it_is_given():
    found = {(callee, argument): key for callee, argument, key in foreign_words()}
    assert {place: key for place, key in found.items() if place not in ARGUMENTS} == {}
    assert ARGUMENTS.keys() - found.keys() == set()
