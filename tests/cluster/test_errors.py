"""Cluster errors survive the way between processes and say what to do."""

import pickle

import pytest

from cluster import errors
from sgmd_core.errors import SgmdError

WORDS = ("reading", "nothing", "something", "look again")
EXAMPLES = [
    errors.WorkerDiedError("painters", 1, "painting", "killed by signal 9", "host", 7, ("end",)),
    errors.WorkerFrozenError("painters", 1, "painting", "silent", "host", 7, ("end",), "a/dump"),
    errors.NodeLostError("painters", 1, "painting", "no word", "host", (("painters", 1),)),
    errors.CallTimeoutError("painters", 1, "paint", "painting", 2.5),
    errors.StartTimeoutError("painters", ("ready", "its process has not started"), 2.5),
    errors.StartTimeoutError("painters", ("its process has not started",), 2.5, "It printed: no"),
    *(
        kind(*WORDS)
        for kind in (
            errors.ClusterError,
            errors.RayStartError,
            errors.InsufficientResourcesError,
            errors.RemoteCallError,
            errors.ResultLostError,
            errors.ScheduleError,
            errors.TransferError,
            errors.ControllerTensorError,
            errors.StorageError,
            errors.StoreRefusedError,
            errors.LeaseError,
            errors.LeaseLostError,
            errors.JobError,
        )
    ),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_keeps_type_words_fields_and_notes_through_pickle(error: errors.ClusterError):
    error.add_note("raised far away")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert copy.__notes__ == ["raised far away"]


def test_every_error_of_the_tree_is_covered_and_drawn():
    tree = {name for name, value in vars(errors).items() if _is_cluster_error(value)}
    assert {type(error).__name__ for error in EXAMPLES} == tree
    assert all(name in str(errors.__doc__) for name in tree)


def test_a_dead_worker_is_told_by_group_rank_and_what_was_attempted():
    text = str(EXAMPLES[0])
    assert text.startswith(
        "While painting: the process of painters rank 1 (pid 7, on host) is gone: "
    )
    assert "killed by signal 9. Its last log lines:\n  | end\n" in text


def _is_cluster_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, SgmdError) and value is not SgmdError
