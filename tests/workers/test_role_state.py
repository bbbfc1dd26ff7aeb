"""Saved and loaded roles go on bit for bit; what does not fit is named."""

import json
import resource
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import StorageError
from sgmd_core.errors import CheckpointError
from tests.helpers.moves import assert_moves
from tests.helpers.roles import iterate, same_bits, tiny_roles, weights
from workers import role_state
from workers.role_state import RoleState, load_role, save_role
from workers.rows import RowRange


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def parts_of(whole: RoleState, cuts: list[int]) -> list[RoleState]:
    """A state cut into rows, as the ranks of a role hold it; the moments like their weights."""
    found = []
    for first, end in pairwise(cuts):
        rows = {
            name: RowRange(
                min(first, len(value)), max(0, min(end, len(value)) - first), value.shape
            )
            for name, value in whole.weights.items()
        }
        cut = {
            label: value[first:end] if value.ndim else value
            for label, value in (whole.weights | whole.moments).items()
        }
        weights = {name: cut[name] for name in whole.weights}
        moments = {label: cut[label] for label in whole.moments}
        found.append(RoleState(whole.updates, weights, moments, None, 0, rows))
    return found


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes this process a rank of several for what is written."""

    def become(rank: int, ranks: int) -> None:
        monkeypatch.setattr(role_state, "own_rank", lambda: rank)
        monkeypatch.setattr(role_state, "num_ranks", lambda: ranks)
        monkeypatch.setattr(role_state, "is_first_rank", lambda: rank == 0)

    return become


def whole_state() -> RoleState:
    chance = torch.Generator().manual_seed(0)
    made = {"a": torch.randn(10, 3, generator=chance), "b": torch.randn(7, generator=chance)}
    made["c"] = torch.randn(2, 5, generator=chance)
    moments = {f"exp_avg/{name}": value * 2 for name, value in made.items()}
    moments |= {f"step/{name}": torch.tensor(3.0) for name in made}
    return RoleState(3, made, moments)


PLACES = ("disk", "memory")


def address(place: str, tmp_path: Path) -> str:
    return str(tmp_path) if place == "disk" else f"memory://{tmp_path.name}"


def save_parts(as_rank: Callable[[int, int], None], folder: str, cuts: list[int]) -> None:
    parts = parts_of(whole_state(), cuts)
    for rank, part in enumerate(parts):
        as_rank(rank, len(parts))
        digests = save_role(folder, "generator", part)
        stem = f"generator/rank-{rank:05d}-of-{len(parts):05d}"
        own = {f"{stem}.safetensors", f"{stem}.optimizer.safetensors", f"{stem}.json"}
        assert digests.keys() == own | ({"generator/role.json"} if rank == 0 else set())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("cuts", [[0, 3, 6, 10], [0, 10], [0, 2, 4, 6, 8, 10]])
def test_any_number_of_ranks_reads_its_rows_of_what_three_ranks_wrote(
    as_rank: Callable[[int, int], None], tmp_path: Path, place: str, cuts: list[int]
) -> None:
    folder = address(place, tmp_path)
    save_parts(as_rank, folder, [0, 3, 6, 10])
    expected = parts_of(whole_state(), cuts)
    assert not same_bits(expected[0].moments, parts_of(whole_state(), [1, 4])[0].moments)
    for part in expected:
        found = load_role(folder, "generator", part.rows)
        assert found.updates == 3
        assert same_bits(found.weights, part.weights)
        assert same_bits(found.moments, part.moments)
        assert found.rows == part.rows


@pytest.mark.parametrize("place", PLACES)
def test_what_several_ranks_wrote_is_read_whole_and_what_one_wrote_by_rows(
    as_rank: Callable[[int, int], None], tmp_path: Path, place: str
) -> None:
    folder, whole = address(place, tmp_path), whole_state()
    save_parts(as_rank, f"{folder}/several", [0, 3, 6, 10])
    as_rank(0, 1)
    save_role(f"{folder}/one", "generator", whole)
    for saved in ("several", "one"):
        found = load_role(f"{folder}/{saved}", "generator")
        assert same_bits(found.weights, whole.weights)
        assert same_bits(found.moments, whole.moments)
        for part in parts_of(whole, [0, 4, 8, 10]):
            found = load_role(f"{folder}/{saved}", "generator", part.rows)
            assert same_bits(found.weights | found.moments, part.weights | part.moments)


def test_a_rank_reads_no_file_that_holds_none_of_its_rows(
    as_rank: Callable[[int, int], None], tmp_path: Path
) -> None:
    save_parts(as_rank, str(tmp_path), [0, 5, 10])
    for path in (tmp_path / "generator").glob("rank-00001-*.safetensors"):
        path.write_bytes(b"torn")
    first, second = parts_of(whole_state(), [0, 5, 10])
    assert same_bits(load_role(str(tmp_path), "generator", first.rows).weights, first.weights)
    for rows in (second.rows, None):
        with pytest.raises(
            CheckpointError, match=r"rank-00001-of-00002\S* is not what was written"
        ):
            load_role(str(tmp_path), "generator", rows)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: (folder / "rank-00001-of-00002.json").unlink(), "FileNotFoundError"),
        (
            lambda folder: shutil.copy(
                folder / "rank-00000-of-00002.json", folder / "rank-00001-of-00002.json"
            ),
            "is that of",
        ),
        (lambda folder: rewrite_index(folder, updates=4), "is that of"),
        (lambda folder: rewrite_index(folder, rows={"a": [0, 5, [10, 3]]}), "rows of a"),
    ],
    ids=["missing", "of another rank", "of another update", "of the same rows"],
)
def test_parts_that_do_not_make_a_whole_are_refused(
    as_rank: Callable[[int, int], None],
    tmp_path: Path,
    damage: Callable[[Path], object],
    why: str,
) -> None:
    save_parts(as_rank, str(tmp_path), [0, 5, 10])
    damage(tmp_path / "generator")
    with pytest.raises(CheckpointError, match=why):
        load_role(str(tmp_path), "generator")


def rewrite_index(folder: Path, **changes: object) -> None:
    path = folder / "rank-00001-of-00002.json"
    content = json.loads(path.read_text())
    for name, value in changes.items():
        content[name] = content[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(content))
