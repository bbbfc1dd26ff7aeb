"""An update that is skipped counts as an iteration and as no update, wherever the state goes."""

from pathlib import Path

import pytest

from sgmd_core.errors import StaleCallError
from tests.helpers.moves import assert_moves
from tests.helpers.roles import gather, iterate, same_bits, tiny_roles, weights

ROLES = ("generator", "fake_score")


def _skip(roles, iteration):
    gather(roles, iteration, [(0, 1)])
    for role in (roles.generator, roles.fake_score):
        role.gradient_report(iteration)
        assert role.step(iteration, skip=True) == iteration


@pytest.mark.slow
@pytest.mark.parametrize("way", ["goes on", "checkpoint", "snapshot"])
def test_a_skipped_update_changes_nothing_but_the_number_of_the_iteration(way, tmp_path: Path):
    roles, twin = tiny_roles(), tiny_roles()
    for one in (roles, twin):
        iterate(one, 0)
    before = {role: weights(roles.networks[role]) for role in ROLES}
    average = roles.generator.final_weights()
    _skip(roles, 1)
    _skip(twin, 1)
    for role in ROLES:
        assert same_bits(weights(roles.networks[role]), before[role])
    assert same_bits(roles.generator.final_weights(), average)
    if way == "checkpoint":
        other = tiny_roles()
        for name in ROLES:
            getattr(roles, name).save(str(tmp_path))
            assert getattr(other, name).load(str(tmp_path)) == 1
        roles = other
    elif way == "snapshot":
        other = tiny_roles()
        for name in ROLES:
            assert getattr(other, name).restore(getattr(roles, name).snapshot()) == 1
        roles = other
    with pytest.raises(StaleCallError, match="has made 1 updates and skipped 1"):
        iterate(roles, 1)
    roles.generator.discard()
    roles.fake_score.discard()
    iterate(roles, 2)
    iterate(twin, 2)
    for role in ROLES:
        assert_moves(weights(roles.networks[role]), before[role])
        assert same_bits(weights(roles.networks[role]), weights(twin.networks[role]))
    assert same_bits(roles.generator.final_weights(), twin.generator.final_weights())
