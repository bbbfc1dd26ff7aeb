"""The collector is paused for imports alone."""

import gc

import pytest

from sgmd_core.collector import paused_collector


def test_it_is_paused_inside_and_runs_again_also_after_an_error() -> None:
    with paused_collector():
        assert not gc.isenabled()
        # As where a module that is imported imports another one.
        with paused_collector():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), paused_collector():
        raise ImportError
    assert gc.isenabled()


def test_a_collector_that_the_user_has_turned_off_stays_off() -> None:
    gc.disable()
    try:
        with paused_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
