"""Seeded damage to bytes and to text, and the time that one damaged input may take.

`SGMD_FUZZ_CASES` sets the number of mutations of each format.
"""

import json
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

NUM_CASES = int(os.environ.get("SGMD_FUZZ_CASES", "20"))
CASE_LIMIT_S = 20.0

_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


class TookTooLongError(AssertionError):
    """A damaged input took longer than `CASE_LIMIT_S`."""


@contextmanager
def time_limit(seconds: float = CASE_LIMIT_S) -> Iterator[None]:
    """Fails the case whose code does not return in time."""

    def expire(_signal: int, _frame: FrameType | None) -> None:
        raise TookTooLongError(f"more than {seconds:g} s")

    earlier = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def mutate_bytes(data: bytes, seed: int) -> bytes:
    """Damages bytes in one to three places; equal seeds give equal damage."""
    chance = random.Random(seed)
    while True:
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 3))):
            chance.choice(_BYTE_EDITS)(damaged, chance)
        if damaged != data:
            return bytes(damaged)


def mutate_text(text: str, seed: int) -> str:
    """Damages text in one to three places, most often its structure."""
    chance = random.Random(seed)
    while True:
        damaged = text
        for _ in range(chance.choice((1, 1, 2, 3))):
            damaged = chance.choice(_TEXT_EDITS)(damaged, chance)
        if damaged != text:
            return damaged


def mutate_json(data: bytes, seed: int) -> bytes:
    """Damages one JSON document or one of several lines: its bytes, or one of its values."""
    chance = random.Random(seed)
    lines = data.splitlines(keepends=True)
    try:
        documents = [json.loads(line) for line in lines]
        which = chance.randrange(len(lines)) if lines else 0
    except ValueError:
        documents, lines, which = [json.loads(data)], [data], 0
    if seed % 3 == 0 or not documents:
        return mutate_bytes(data, seed)
    document = [documents[which]]
    _set_value(document, chance)
    text = json.dumps(document[0]).replace(f'"{_DEEP}"', "[" * 20_000 + "]" * 20_000)
    lines[which] = text.encode() + b"\n" * lines[which].endswith(b"\n")
    return b"".join(lines)


_DEEP = "a list in a list in a list"
_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 7, 0.5, 2**31, 2**63, 10**400, float("nan"), float("inf")),
    *("", "x", "../../etc/passwd", "\0", "\ud800", "9" * 5000, _DEEP),
    *([], {}, [None], [[]], [{}], {"": None}, {"x": {"y": []}}, ["x", 1], [0] * 5, {"x": 1}),
)


def _set_value(document: list[Any], chance: random.Random) -> None:
    """Replaces, deletes or renames one value anywhere in a document."""
    places = list(_places(document))
    # Values near the root decide more, and there are fewer of them.
    deepest = chance.randrange(max(depth for depth, _, _ in places) + 1)
    _, holder, key = chance.choice([place for place in places if place[0] <= deepest])
    edit = chance.randrange(6)
    if edit == 0 and holder is not document:
        del holder[key]
    elif edit == 1 and isinstance(holder, dict):
        holder[chance.choice(("", "x", "\0", "iteration", "../x"))] = holder.pop(key)
    else:
        holder[key] = chance.choice(_VALUES)


def _places(holder: Any, depth: int = 0) -> Iterator[tuple[int, Any, Any]]:
    keys = range(len(holder)) if isinstance(holder, list) else list(holder)
    for key in keys:
        yield depth, holder, key
        if isinstance(holder[key], list | dict):
            yield from _places(holder[key], depth + 1)


def _place(data: bytearray | str, chance: random.Random) -> int:
    return chance.randrange(len(data)) if data else 0


def _span(data: bytearray, chance: random.Random) -> slice:
    """A range of up to a quarter of the data, small ones as often as large ones."""
    start = _place(data, chance)
    return slice(start, start + 2 ** chance.randrange(max(1, len(data) // 4).bit_length()))


def _flip_bit(data: bytearray, chance: random.Random) -> None:
    if data:
        data[_place(data, chance)] ^= 1 << chance.randrange(8)


def _cut_end(data: bytearray, chance: random.Random) -> None:
    del data[_place(data, chance) :]


def _cut_out(data: bytearray, chance: random.Random) -> None:
    del data[_span(data, chance)]


def _repeat(data: bytearray, chance: random.Random) -> None:
    span = _span(data, chance)
    data[span.stop : span.stop] = data[span]


def _splice(data: bytearray, chance: random.Random) -> None:
    data[_span(data, chance)] = data[_span(data, chance)]


def _zero(data: bytearray, chance: random.Random) -> None:
    span = _span(data, chance)
    data[span] = bytes(len(data[span]))


def _set_number(data: bytearray, chance: random.Random) -> None:
    width = chance.choice((1, 2, 4, 8))
    number = chance.choice(_NUMBERS) & (2 ** (8 * width) - 1)
    place = _place(data, chance)
    data[place : place + width] = number.to_bytes(width, chance.choice(("little", "big")))


def _set_digits(data: bytearray, chance: random.Random) -> None:
    """Changes a number that is written out, as in tar headers and JSON."""
    found = list(re.finditer(rb"\d+", data))
    if found:
        where = chance.choice(found)
        length = where.end() - where.start()
        new = b"".join(b"%d" % chance.randrange(10) for _ in range(length))
        data[where.start() : where.end()] = new


_BYTE_EDITS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip_bit,
    _flip_bit,
    _cut_end,
    _cut_out,
    _repeat,
    _splice,
    _zero,
    _set_number,
    _set_digits,
)

_PIECES = (
    *("[", "]", "{", "}", ":", ": ", "- ", "? ", "| ", "> ", "# ", "---\n", "...\n", "%YAML 9.9\n"),
    *("&a ", "*a", "&a [*a]", "<<: *a", "<<: {}\n", "!!binary ", "!!python/object:os.system "),
    *("!!set {a}", "!!timestamp 2001-01-01", "!!float ", "!!int ", "!own ", "'", '"', '"\\ud800"'),
    *("9" * 5000, "1e999", "-1", ".nan", ".inf", "0x" + "f" * 300, "1_000", "1:30", "2001-01-01"),
    *("null", "~", "true", "[" * 500, "{a: " * 300, "\t", "\0", "\r", "\u2028", "\ufeff", "\x85"),
    *("1: 2\n", "[a]: b\n", "'': x\n", "__class__: x\n", "a.b: 1\n", "\U0001f600: 1\n", "?\n"),
)


def _insert_piece(text: str, chance: random.Random) -> str:
    place = _place(text, chance)
    return text[:place] + chance.choice(_PIECES) + text[place:]


def _replace_value(text: str, chance: random.Random) -> str:
    found = list(re.finditer(r"(?<=: )\S[^\n]*", text))
    if not found:
        return text
    where = chance.choice(found)
    return text[: where.start()] + chance.choice(_PIECES) + text[where.end() :]


def _replace_key(text: str, chance: random.Random) -> str:
    found = list(re.finditer(r"\w+(?=:)", text))
    if not found:
        return text
    where = chance.choice(found)
    return text[: where.start()] + chance.choice(_PIECES).strip() + text[where.end() :]


def _shift_line(text: str, chance: random.Random) -> str:
    lines = text.split("\n")
    place = chance.randrange(len(lines))
    lines[place] = " " * chance.randrange(1, 5) + lines[place]
    return "\n".join(lines)


def _damage_characters(text: str, chance: random.Random) -> str:
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    chance.choice(_BYTE_EDITS)(data, chance)
    # Every byte is a character of latin-1; those that are not UTF-8 are tried as they are.
    return data.decode("latin-1")


_TEXT_EDITS = (_insert_piece, _replace_value, _replace_key, _shift_line, _damage_characters)
