"""States saved beside the work: the same bytes, the same errors, and one copy at a time."""

import hashlib
import resource
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from cluster.errors import StorageError
from cluster.files import sha256_of
from sgmd_core.errors import NonFiniteError, StaleCallError
from tests.helpers.moves import assert_moves
from tests.helpers.roles import iterate, same_bits, tiny_roles, weights
from workers.role_state import RoleState, load_role
from workers.saving import StateWriter
from workers.tensor_files import RowReader, write_tensors


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_a_state_written_while_the_role_trains_on_is_the_one_of_a_save_that_is_waited_for(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    roles, waiting = tiny_roles(), tiny_roles()
    for each in (roles, waiting):
        iterate(each, 0)
    began = (roles.generator, roles.fake_score)
    beside = str(tmp_path / "beside")
    assert [role.begin_save(beside) for role in began] == [1, 1]
    before = weights(roles.networks["generator"])
    for iteration in (1, 2):
        iterate(roles, iteration)
    assert_moves(weights(roles.networks["generator"]), before)
    assert [role.finish_save(beside, wait=False) for role in began] == [None, None]
    slow_disk.set()
    written = {
        name: one for role in began for name, one in (role.finish_save(beside) or {}).items()
    }
    expected = {
        name: one
        for role in (waiting.generator, waiting.fake_score)
        for name, one in role.save(str(tmp_path / "waited")).items()
    }
    assert bytes_of(tmp_path / "beside") == bytes_of(tmp_path / "waited")
    assert written == expected
    assert written == {name: sha256_of(tmp_path / "beside" / name) for name in written}
    # And training did not notice.
    for iteration in (1, 2):
        iterate(waiting, iteration)
    assert same_bits(weights(roles.networks["generator"]), weights(waiting.networks["generator"]))


def test_a_second_save_waits_for_the_first_so_that_one_copy_is_held(
    tmp_path: Path, slow_disk: threading.Event
) -> None:
    writer = StateWriter()
    copies = [RoleState(step, {"w": torch.full((1000,), float(step))}, {}) for step in (1, 2)]
    writer.begin(str(tmp_path / "1"), {"generator": copies[0]})
    second = threading.Thread(
        target=writer.begin, args=(str(tmp_path / "2"), {"generator": copies[1]})
    )
    second.start()
    # It only starts a thread, so that it would have ended by then if it did not wait.
    second.join(0.5)
    assert second.is_alive()
    assert not (tmp_path / "2").exists()
    slow_disk.set()
    second.join()
    writer.wait()
    for step in (1, 2):
        assert load_role(str(tmp_path / str(step)), "generator").updates == step


@pytest.mark.slow
def test_a_later_save_uses_the_memory_of_the_one_before_and_has_the_same_bytes(
    tmp_path: Path,
) -> None:
    roles, fresh = tiny_roles(), tiny_roles()
    for iteration in range(2):
        iterate(roles, iteration)
        iterate(fresh, iteration)
        for role in (roles.generator, roles.fake_score):
            role.save(str(tmp_path / f"{iteration}"))
    for role in (fresh.generator, fresh.fake_score):
        role.save(str(tmp_path / "fresh"))
    first, second, expected = (bytes_of(tmp_path / name) for name in ("0", "1", "fresh"))
    assert second == expected
    assert all(first[name] != second[name] for name in first if name.endswith(".safetensors"))
    for role in (roles.generator, roles.fake_score):
        taken = role.states({})
        again = role.states(taken)
        assert taken.keys() == again.keys()
        for name, state in taken.items():
            for one, other in zip(
                state.weights.values(), again[name].weights.values(), strict=True
            ):
                assert one.data_ptr() == other.data_ptr()
            for one, other in zip(
                state.moments.values(), again[name].moments.values(), strict=True
            ):
                assert one.data_ptr() == other.data_ptr()


@pytest.mark.slow
def test_a_disk_that_is_full_while_the_role_trains_on_is_heard_of_at_the_end(
    tmp_path: Path,
) -> None:
    roles = tiny_roles()
    iterate(roles, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        roles.generator.begin_save(str(tmp_path))
        with pytest.raises(StorageError, match=r"saving the generator to .*Free space there"):
            roles.generator.finish_save(str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "generator").iterdir())
    # The next one is not spoilt by it.
    roles.generator.save(str(tmp_path))
    assert load_role(str(tmp_path), "generator").updates == 1


@pytest.mark.parametrize(
    "tensors",
    [
        {"b": torch.randn(3, 4), "a": torch.randn(5), "step": torch.tensor(7.0)},
        {"é/weight": torch.randn(2, 2).bfloat16(), "empty": torch.empty(0, 3).bfloat16()},
        {},
    ],
    ids=["float32", "bfloat16", "nothing"],
)
def test_a_streamed_file_has_the_bytes_that_the_library_writes(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "streamed.safetensors"
    digest = write_tensors(path, tensors)
    assert path.read_bytes() == save(tensors)
    assert digest == hashlib.sha256(save(tensors)).hexdigest()


def test_a_streamed_file_of_several_types_is_read_back_by_the_library(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {
        "third": torch.randn(3, 3).T,
        "half": torch.randn(3).half(),
        "flags": torch.tensor([True, False, True]),
        "double": torch.randn(2).double(),
    }
    write_tensors(tmp_path / "mixed", tensors)
    assert same_bits(load_file(tmp_path / "mixed"), tensors)


def test_rows_of_a_file_are_read_into_their_place(tmp_path: Path) -> None:
    whole = torch.randn(10, 3)
    write_tensors(tmp_path / "rows", {"w": whole, "count": torch.tensor(2.0)})
    reader = RowReader(tmp_path / "rows")
    assert reader.shape("w") == (10, 3)
    target = torch.zeros(4, 3)
    reader.read("w", target, 5)
    assert torch.equal(target, whole[5:9])
    assert reader.dtype("count") == torch.float32


def test_a_process_that_has_not_copied_a_state_does_not_finish_its_save(tmp_path: Path) -> None:
    roles = tiny_roles()
    with pytest.raises(StaleCallError, match="has begun no save"):
        roles.generator.finish_save(str(tmp_path / "step-1"))
    roles.generator.save(str(tmp_path / "step-1"))
    with pytest.raises(StaleCallError, match="step-1"):
        roles.generator.finish_save(str(tmp_path / "step-2"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(tmp_path: Path, value: float) -> None:
    roles = tiny_roles()
    name, weight = list(roles.networks["fake_score"].named_parameters())[-1]
    with torch.no_grad():
        weight.view(-1)[-1] = value
    roles.fake_score.begin_save(str(tmp_path))
    with pytest.raises(NonFiniteError, match=f"the weight {name} of fake_score is not finite"):
        roles.fake_score.finish_save(str(tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))
