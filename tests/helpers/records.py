"""Records of a run with values that a test does not look at."""

from typing import Any

from pipelines.run.records import IterationRecord


def iteration_record(iteration: int = 0, **fields: Any) -> IterationRecord:
    """A record of a second's iteration; nothing is known of it but the given fields."""
    empty: dict[str, Any] = {
        "losses": {},
        "grad_norms": {},
        "seconds": {},
        "seconds_total": 1.0,
        "data_wait_s": 0.0,
        "samples_seen": 0,
        "epoch": 0.0,
        "cursor": {},
        "rejected": 0,
        "exit_steps": (),
    }
    return IterationRecord(iteration, **{**empty, **fields})
