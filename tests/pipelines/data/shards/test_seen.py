"""Ids that come again are found, however they are spread over batches and whatever their length."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from pipelines.data.shards.seen import SeenIds


@pytest.mark.parametrize(
    "ids",
    [
        [f"clip-{number:06d}" for number in range(500)],
        [f"clip-{number}" for number in range(500)],
        ["", *("x" * length for length in range(1, 40)), "é", "éé", "e\u0301"],
    ],
    ids=["one length", "several lengths", "no letters to many"],
)
def test_only_what_was_met_before_is_met_again(ids: list[str]) -> None:
    rng = np.random.default_rng(0)
    drawn = [ids[place] for place in rng.integers(0, len(ids), 900)]
    met: set[str] = set()
    expected = []
    for place, name in enumerate(drawn):
        if name in met:
            expected.append(place)
        met.add(name)
    seen = SeenIds()
    borders = [0, 1, 300, 300, 700, 900]
    found = [
        start + place for start, stop in pairwise(borders) for place in seen.add(drawn[start:stop])
    ]
    assert found == expected


def test_an_id_is_the_same_among_ids_of_its_length_and_among_others() -> None:
    seen = SeenIds(["ab", "cd", "ef"])  # of one length
    assert seen.add(["abc", "cd", "x"]) == [1]
    assert seen.add(pa.array(["00", "x", "yy", "ab"], pa.large_string()).slice(2)) == [1]
    assert seen.add(["", ""]) == [1]
    assert seen.add(pa.array(["zz", "", ""], pa.large_string()).slice(1)) == [0, 1]
