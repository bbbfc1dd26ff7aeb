"""Every error reaches the user as it was raised, from whichever process."""

import importlib
import inspect
import pickle
import pkgutil

import pytest

import cluster
import pipelines
import sgmd_core
import workers
from cluster.errors import ClusterError
from sgmd_core.errors import ConfigError, SgmdError


def all_errors() -> list[type[SgmdError]]:
    """Every error class of every module, wherever it is defined."""
    for package in (sgmd_core, workers, cluster, pipelines):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name != "pipelines.__main__":
                importlib.import_module(module.name)
    found, waiting = [], [SgmdError]
    while waiting:
        error = waiting.pop()
        found.append(error)
        waiting.extend(error.__subclasses__())
    return sorted(set(found), key=lambda error: (error.__module__, error.__name__))


def example(error: type[SgmdError]) -> SgmdError:
    """An instance with a different value in every argument."""
    values = {
        str: lambda n: f"text {n}",
        int: lambda n: n,
        float: lambda n: n + 0.5,
        int | None: lambda n: n,
        tuple[str, ...]: lambda n: (f"first {n}", f"second {n}"),
        tuple[tuple[str, int], ...]: lambda n: ((f"first {n}", n), (f"second {n}", n)),
    }
    parameters = list(inspect.signature(error.__init__).parameters.values())[1:]
    return error(*(values[p.annotation](n) for n, p in enumerate(parameters, start=3)))


ERRORS = all_errors()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_an_error_crosses_processes_with_its_type_its_fields_and_its_words(error):
    before = example(error)
    before.add_note("and a note")
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is error
    assert vars(after) == vars(before)
    assert str(after) == str(before)
    assert after.args == before.args


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_an_error_is_named_after_what_went_wrong_and_says_so_in_its_docstring(error):
    assert error.__name__.endswith("Error")
    assert error.__doc__


def test_errors_of_the_cluster_side_are_cluster_errors():
    strays = [e for e in ERRORS if e.__module__.startswith("cluster")]
    assert all(issubclass(error, ClusterError) for error in strays)
    assert len(strays) > 5


def test_the_words_are_what_was_attempted_found_and_expected_and_what_to_do():
    error = ConfigError("reading a.yaml", "lr is -1", "a positive number", "Correct lr.")
    assert str(error) == ("While reading a.yaml: lr is -1. Expected a positive number. Correct lr.")


def test_what_is_not_known_is_left_out_of_the_words():
    assert str(ConfigError("reading a.yaml", "no such file")) == (
        "While reading a.yaml: no such file."
    )
