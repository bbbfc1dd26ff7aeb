"""How many graphs a schedule keeps in memory at once."""

from collections import defaultdict
from collections.abc import Sequence

from cluster.schedule.program import Pass, Program
from cluster.schedule.schedule import Call


def graphs_kept(calls: Sequence[Call], program: Program) -> dict[tuple[str, int], int]:
    """Most samples whose results a rank keeps in memory at once, by (role, rank)."""
    keepers = {
        (number, stage.name): stage.keeps_until
        for number, part in enumerate(program)
        if isinstance(part, Pass)
        for stage in part.stages
        if stage.keeps_until
    }
    users = {(part, user) for (part, _), user in keepers.items()}
    kept, most = defaultdict[tuple[str, int], int](int), defaultdict[tuple[str, int], int](int)
    for call in calls:
        place, key = (call.role, call.rank), (call.part, call.stage)
        if key in keepers:
            kept[place] += call.num_computed
            most[place] = max(most[place], kept[place])
        if key in users:
            kept[place] -= call.num_computed
    return dict(most)
