"""One value made of what several ranks returned, or a part of what one returned.

    generator rank 0   samples 0 .. 4  --.
    generator rank 1   samples 4 .. 8  --+-->  judge rank 0   samples 0 .. 8
                                         '-->  judge rank 1   samples 2 .. 4, and so on

Groups of different sizes share a batch out differently. The caller only names the pieces; they
travel as they are, and are cut and joined in the process that needs them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar, runtime_checkable

from cluster.errors import TransferError
from cluster.worker_group import Future, R_co

Span = tuple[int, int]
"""First sample, and one past the last."""


@runtime_checkable
class Divisible(Protocol):
    """A record about the samples of a batch."""

    def cut(self, start: int, stop: int) -> Self:
        """The same record about some of its samples, counted from its own first one."""
        ...

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """One record about the samples of all parts, in their order."""
        ...


D = TypeVar("D", bound=Divisible)


@dataclass(frozen=True, slots=True, eq=False)
class JoinedFuture(Future[R_co]):
    """Futures on the pieces of one value; `group`, `rank` and `method` are those of the first.

    Attributes:
        pieces: Futures on records, whose samples follow one another.
        spans: The samples that each is about.
        wanted: The samples that the value is about.
    """

    pieces: tuple[Future[R_co], ...]
    spans: tuple[Span, ...]
    wanted: Span


def join(pieces: Sequence[tuple[Future[R_co], Span]], wanted: Span) -> Future[R_co]:
    """A future on the value about the wanted samples.

    Args:
        pieces: Futures and the samples that each is about, in the order of the samples.
        wanted: Samples that the value is about; the pieces cover them.

    Raises:
        TransferError: They do not.
    """
    first, last = wanted
    used = [(piece, span) for piece, span in pieces if span[0] < last and span[1] > first]
    edges = [first, *(stop for _, (_, stop) in used[:-1])]
    starts = [span[0] for _, span in used]
    covered = used and used[0][1][0] <= first and used[-1][1][1] >= last
    if not covered or starts[1:] != edges[1:]:
        raise TransferError(
            f"putting samples {first} to {last} together",
            f"pieces about {[span for _, span in pieces]}",
            "pieces that follow one another and cover all of them",
        )
    if [span for _, span in used] == [wanted]:
        return used[0][0]
    piece = used[0][0]
    return JoinedFuture(
        piece.group,
        piece.rank,
        piece.method,
        tuple(future for future, _ in used),
        tuple(span for _, span in used),
        wanted,
    )


def concatenate(values: Sequence[D], spans: Sequence[Span], wanted: Span) -> D:
    """The value that `join` futures, from the values of its pieces.

    Raises:
        TransferError: A value is not a record about samples.
    """
    for value in values:
        if not isinstance(value, Divisible):
            raise TransferError(
                "handing a part of a value to a rank",
                f"a {type(value).__name__}",
                "a record about samples, which can be cut and joined",
            )
    parts = [
        value.cut(max(start, wanted[0]) - start, min(stop, wanted[1]) - start)
        for value, (start, stop) in zip(values, spans, strict=True)
    ]
    return parts[0] if len(parts) == 1 else type(parts[0]).joined(parts)
