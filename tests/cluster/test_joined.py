"""What several ranks returned arrives as one value, and a part of it as a part."""

from collections.abc import Mapping

import pytest

from cluster.errors import TransferError
from cluster.joined import JoinedFuture, concatenate, join
from cluster.local import LocalWorkerGroup
from cluster.worker_group import Future, WorkerGroup
from tests.cluster.toys import WAIT_S, Toy

Groups = Mapping[str, WorkerGroup[Toy]]


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def groups(request: pytest.FixtureRequest) -> Groups:
    if request.param == "ray":
        return request.getfixturevalue("ray_groups")
    return {
        "first": LocalWorkerGroup("first", [Toy(100), Toy(100)]),
        "second": LocalWorkerGroup("second", [Toy(100)]),
    }


def future(name: str) -> Future[str]:
    return Future(name, 0, "make")


THIRDS = [(future("a"), (0, 2)), (future("b"), (2, 4)), (future("c"), (4, 6))]


def test_a_piece_that_fits_is_handed_on_as_it_is():
    assert join(THIRDS, (2, 4)) is THIRDS[1][0]


@pytest.mark.parametrize(
    ("wanted", "names"), [((0, 6), "abc"), ((0, 3), "ab"), ((3, 4), "b"), ((3, 6), "bc")]
)
def test_only_the_pieces_that_are_needed_are_named(wanted: tuple[int, int], names: str):
    found = join(THIRDS, wanted)
    assert isinstance(found, JoinedFuture)
    assert "".join(piece.group for piece in found.pieces) == names


@pytest.mark.parametrize("wanted", [(0, 7), (7, 9)])
def test_samples_that_nobody_made_are_refused(wanted: tuple[int, int]):
    with pytest.raises(TransferError, match="pieces about"):
        join(THIRDS, wanted)


def test_a_gap_is_refused():
    with pytest.raises(TransferError, match="follow one another"):
        join([THIRDS[0], THIRDS[2]], (0, 6))


def test_what_is_no_record_about_samples_is_refused():
    with pytest.raises(TransferError, match="a int"):
        concatenate([1, 2], [(0, 1), (1, 2)], (0, 2))  # type: ignore[type-var]


def test_pieces_of_two_ranks_arrive_joined_and_a_part_of_them_cut(groups: Groups):
    first, second = groups["first"], groups["second"]
    spelled = first.map(Toy.spell, ["abc", "def"])
    pieces = list(zip(spelled, [(0, 3), (3, 6)], strict=True))
    read = [
        second.call_rank(0, Toy.read, join(pieces, wanted), 7)
        for wanted in ((0, 6), (1, 5), (4, 5), (0, 3))
    ]
    assert second.fetch(read, WAIT_S, "reading") == ["abcdef7", "bcde7", "e7", "abc7"]


def test_a_failed_piece_fails_the_call_with_its_own_error(groups: Groups):
    first, second = groups["first"], groups["second"]
    good, bad = first.call_rank(0, Toy.spell, "abc"), first.call_rank(1, Toy.spell, "")
    read = second.call_rank(0, Toy.read, join([(good, (0, 3)), (bad, (3, 6))], (0, 6)), 7)
    with pytest.raises(ValueError, match="nothing to spell"):
        second.fetch([read], WAIT_S, "reading")
