"""Bounds how far each call may run ahead of the updates of earlier iterations.

A call is stale by n iterations if updates of the n-th iteration before its own need not have ended
when it runs: nothing that it waits for, directly or through others, has waited for them. Three
things make a call wait: the calls before it on its process, the results that it is handed, and what
the controller waited for before making it. In the exact schedule nothing is stale.

A stale call does not compute anything else than an exact one: what runs ahead needs none of the
roles that are late. What it gives up is that an iteration is known to be whole before the next one
begins. If the late update then fails, the other roles have already changed, and the run goes back
to its last checkpoint.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from cluster.schedule.program import Program, Team, Update
from cluster.schedule.schedule import STEP, Call


def staleness(
    calls: Sequence[Call], program: Program, teams: Mapping[str, Team] | None = None
) -> list[int]:
    """Iterations whose updates may still be under way when each call runs.

    Args:
        calls: Whole iterations of a schedule, in order.
        program: What it was made from.
        teams: Processes by role, where roles share them; None: each role has its own.

    Returns:
        One number a call. An update is over when one rank's part is: ranks step together.
    """
    first = min((call.iteration for call in calls), default=0)
    each = Counter(role for part in program if isinstance(part, Update) for role in part.roles)
    # Updates by role that are known to be over: after each call, and to the controller.
    after: list[Mapping[str, int]] = []
    last_on = dict[tuple[str, int], int]()
    reported: Mapping[str, int] = {}
    found: list[int] = []
    for place, call in enumerate(calls):
        own = (teams or {}).get(call.role, Team())
        process = own.process(call.role, call.rank) if own.homes else (call.role, call.rank)
        reported = _newest([reported, *(after[waited] for waited in call.waits_for)])
        earlier = [*call.inputs, *([last_on[process]] if process in last_on else [])]
        known = _newest([reported, *(after[other] for other in earlier)])
        whole = min((known.get(role, 0) // number for role, number in each.items()), default=0)
        found.append(max(0, call.iteration - first - whole) if each else 0)
        if call.stage == STEP:
            before = after[last_on[process]] if process in last_on else {}
            number = before.get(call.role, 0) + 1
            known = {**known, call.role: max(known.get(call.role, 0), number)}
        after.append(known)
        last_on[process] = place
    return found


def _newest(parts: Sequence[Mapping[str, int]]) -> Mapping[str, int]:
    if len(parts) == 1:
        return parts[0]
    return {
        role: max(part.get(role, 0) for part in parts) for role in {r for p in parts for r in p}
    }
