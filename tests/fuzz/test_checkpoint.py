"""A damaged checkpoint is never taken for a whole one: the one before it counts, or an error."""

import shutil
from pathlib import Path

import pytest
import torch

from cluster.checkpoints import MANIFEST, Checkpoints
from sgmd_core.errors import CheckpointError
from tests.fuzz.mutations import NUM_CASES, mutate_bytes, time_limit
from tests.helpers.roles import same_bits
from workers.role_state import RoleState, load_role, save_role

ROLE = "generator"


def state(step: int) -> RoleState:
    """Weights and moments that are other ones at each step."""
    chance = torch.Generator().manual_seed(step)
    values = {name: torch.randn(3, 4, generator=chance) for name in ("first", "second")}
    moments = {f"{kind}/{name}": values[name] + 1 for kind in ("m", "v") for name in values}
    return RoleState(step, values, moments)


def is_state(found: RoleState, step: int) -> bool:
    expected = state(step)
    return (
        found.updates == step
        and same_bits(dict(found.weights), dict(expected.weights))
        and same_bits(dict(found.moments), dict(expected.moments))
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("written") / "checkpoints"
    checkpoints = Checkpoints(str(root))
    for step in (1, 2):
        digests = save_role(checkpoints.folder(step), ROLE, state(step))
        checkpoints.commit(step, {"iteration": step}, digests)
    return root


PARTS = [f"{ROLE}/{name}" for name in ("weights.safetensors", "optimizer.safetensors", "role.json")]


@pytest.mark.parametrize("part", [*PARTS, MANIFEST])
def test_a_damaged_checkpoint_is_noticed_before_a_run_goes_on_from_it(part, written, tmp_path):
    root = Path(shutil.copytree(written, tmp_path / "run"))
    path, noticed = root / "step-000002" / part, 0
    whole = path.read_bytes()
    for seed in range(max(1, NUM_CASES // 2)):
        path.write_bytes(mutate_bytes(whole, seed))
        checkpoints = Checkpoints(str(root))
        with time_limit():
            fault = checkpoints.fault(2, contents=True)
            latest = checkpoints.latest()
            assert latest in (1, 2)
            assert latest == 2 or fault, seed
            if fault:
                noticed += 1
            else:
                # Damage to a word of the manifest that nobody reads leaves the state whole.
                assert part == MANIFEST, seed
                assert is_state(load_role(checkpoints.folder(2), ROLE), 2), seed
    assert noticed


@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_role_that_is_loaded_as_it_is_raises_or_has_every_bit(part, written, tmp_path):
    root = Path(shutil.copytree(written, tmp_path / "run"))
    path, refused = root / "step-000002" / part, 0
    whole = path.read_bytes()
    for seed in range(max(1, NUM_CASES // 2)):
        path.write_bytes(mutate_bytes(whole, seed))
        with time_limit():
            try:
                found = load_role(str(root / "step-000002"), ROLE)
            except CheckpointError:
                refused += 1
                continue
        if part != f"{ROLE}/role.json":
            raise AssertionError(f"seed {seed}: read as if it were whole")
        # The manifest has the digest of role.json; without it, what it names must be whole.
        assert same_bits(dict(found.weights), dict(state(2).weights)), seed
    assert refused
