"""Saved and loaded roles go on bit for bit; what does not fit is named."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import StorageError
from sgmd_core.errors import CheckpointError
from tests.helpers.moves import assert_moves
from tests.helpers.roles import iterate, same_bits, tiny_roles, weights


def _save(roles, folder: str) -> None:
    roles.generator.save(folder)
    roles.fake_score.save(folder)


def _load(roles, folder: str) -> tuple[int, int]:
    return roles.generator.load(folder), roles.fake_score.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tracking", "place"), [("shared", "folder"), ("shared", "url"), ("fresh", "folder")]
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tracking, place, tmp_path):
    folder = str(tmp_path / "step-000002") if place == "folder" else f"memory://{tmp_path.name}/s"
    straight, stopped, resumed = (tiny_roles(tracking) for _ in range(3))
    for iteration in range(2):
        iterate(straight, iteration)
        iterate(stopped, iteration)
    _save(stopped, folder)
    assert _load(resumed, folder) == (2, 2)
    for iteration in range(2, 5):
        iterate(straight, iteration)
        iterate(resumed, iteration)
    for role in ("generator", "fake_score"):
        assert_moves(weights(straight.networks[role]), weights(stopped.networks[role]))
        assert same_bits(weights(resumed.networks[role]), weights(straight.networks[role]))
    assert_moves(straight.generator.final_weights(), stopped.generator.final_weights())
    assert same_bits(resumed.generator.final_weights(), straight.generator.final_weights())


@pytest.mark.parametrize(
    "lost",
    [
        "generator/weights",
        "generator/optimizer",
        "ema/weights",
        "fake_score/weights",
        "fake_score/optimizer",
    ],
)
def test_a_resume_that_lost_a_part_would_make_other_bits(lost, tmp_path):
    straight, resumed = tiny_roles(), tiny_roles()
    for iteration in range(2):
        iterate(straight, iteration)
    _save(straight, str(tmp_path))
    path = tmp_path / f"{lost}.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(path).items()}, path)
    as_an_older_version_saved_it(path.parent)
    _load(resumed, str(tmp_path))
    iterate(straight, 2)
    iterate(resumed, 2)
    found, expected = (
        weights(roles.networks["generator"])
        | {f"fake/{name}": value for name, value in weights(roles.networks["fake_score"]).items()}
        | {f"ema/{name}": value for name, value in roles.generator.final_weights().items()}
        for roles in (resumed, straight)
    )
    assert_moves(expected, found)


@pytest.mark.slow
def test_saving_disturbs_nothing(tmp_path):
    saving, silent = tiny_roles(), tiny_roles()
    for iteration in range(2):
        iterate(saving, iteration)
        iterate(silent, iteration)
        _save(saving, str(tmp_path / str(iteration)))
    start = weights(tiny_roles().networks["generator"])
    assert_moves(weights(silent.networks["generator"]), start)
    assert same_bits(weights(saving.networks["generator"]), weights(silent.networks["generator"]))


def test_a_checkpoint_has_a_folder_for_each_role_and_one_for_the_average(tmp_path):
    roles = tiny_roles()
    iterate(roles, 0)
    _save(roles, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ema", "fake_score", "generator"]
    saved = load_file(tmp_path / "ema" / "weights.safetensors")
    assert same_bits(saved, roles.generator.final_weights())
    assert not (tmp_path / "ema" / "optimizer.safetensors").exists()
    assert json.loads((tmp_path / "generator" / "role.json").read_text())["updates"] == 1


def test_without_an_average_the_present_weights_are_final_and_no_ema_folder_is_written(tmp_path):
    roles = tiny_roles(ema_decay=0.0)
    iterate(roles, 0)
    roles.generator.save(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["generator"]
    assert same_bits(roles.generator.final_weights(), weights(roles.networks["generator"]))


def test_final_weights_are_copies_that_later_updates_leave_alone():
    roles = tiny_roles()
    iterate(roles, 0)
    taken = roles.generator.final_weights()
    before = {name: value.clone() for name, value in taken.items()}
    iterate(roles, 1)
    assert same_bits(taken, before)


@pytest.mark.slow
def test_a_checkpoint_can_be_loaded_over_a_run_that_went_on(tmp_path):
    roles, straight = tiny_roles(), tiny_roles()
    iterate(roles, 0)
    _save(roles, str(tmp_path))
    once = weights(roles.networks["generator"])
    iterate(roles, 1)
    _load(roles, str(tmp_path))
    iterate(roles, 1)
    for iteration in range(2):
        iterate(straight, iteration)
    assert_moves(weights(straight.networks["generator"]), once)
    assert same_bits(weights(roles.networks["generator"]), weights(straight.networks["generator"]))


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"loading the generator from .*nowhere/generator"):
        tiny_roles().generator.load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "role.json"])
@pytest.mark.parametrize("damage", ["torn", "missing"])
def test_a_torn_or_missing_file_is_an_error_and_leaves_the_role_as_it_was(tmp_path, file, damage):
    roles = tiny_roles()
    iterate(roles, 0)
    _save(roles, str(tmp_path))
    path = tmp_path / "fake_score" / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    other = tiny_roles()
    before = weights(other.networks["fake_score"])
    with pytest.raises(CheckpointError, match="loading the fake_score"):
        other.fake_score.load(str(tmp_path))
    assert same_bits(weights(other.networks["fake_score"]), before)


def as_an_older_version_saved_it(folder: Path) -> None:
    """Takes the digests out of role.json."""
    counters = json.loads((folder / "role.json").read_text())
    kept = {name: counters[name] for name in ("updates", "has_optimizer")}
    (folder / "role.json").write_text(json.dumps(kept))


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors"])
def test_a_flipped_bit_is_an_error_and_leaves_the_role_as_it_was(tmp_path, file):
    roles, other = tiny_roles(), tiny_roles()
    iterate(roles, 0)
    _save(roles, str(tmp_path))
    path = tmp_path / "generator" / file
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    before = weights(other.networks["generator"])
    with pytest.raises(CheckpointError, match=rf"{file} is not what was written"):
        other.generator.load(str(tmp_path))
    assert same_bits(weights(other.networks["generator"]), before)
    as_an_older_version_saved_it(path.parent)
    other.generator.load(str(tmp_path))
    assert not same_bits(weights(other.networks["generator"]), before), "nothing checked it then"


def test_the_files_of_another_role_are_refused(tmp_path):
    roles = tiny_roles()
    iterate(roles, 0)
    _save(roles, str(tmp_path))
    own, others = tmp_path / "generator", tmp_path / "fake_score"
    shutil.copy(others / "weights.safetensors", own / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is not what was written"):
        tiny_roles().generator.load(str(tmp_path))
    shutil.copytree(others, own, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"role\.json is that of the fake_score"):
        tiny_roles().generator.load(str(tmp_path))


def test_a_role_that_does_not_fit_on_the_disk_says_so(tmp_path):
    roles = tiny_roles()
    iterate(roles, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"saving the generator to .*Free space there"):
            roles.generator.save(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "generator").iterdir())


def test_weights_of_another_network_are_refused_by_name(tmp_path):
    roles = tiny_roles()
    iterate(roles, 0)
    _save(roles, str(tmp_path))
    path: Path = tmp_path / "generator" / "weights.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    save_file({**tensors, first: torch.zeros(3)}, path)
    as_an_older_version_saved_it(path.parent)
    with pytest.raises(CheckpointError) as caught:
        roles.generator.load(str(tmp_path))
    assert first in str(caught.value)
    assert "(3,)" in str(caught.value)
