"""The wire keeps every bit, its types and nothing else."""

import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from cluster.errors import TransferError
from cluster.transfer import array_in, from_wire, pack, to_wire, unpack
from tests.cluster.toys import Colour, Parcel, Toy

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "uint8", "bool"]


def through_the_wire(value):
    """As between processes: arrays arrive read-only."""
    wire = pickle.loads(pickle.dumps(to_wire(value), protocol=5))
    return from_wire(wire)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 3), ()])
def test_a_tensor_keeps_dtype_shape_and_bits(dtype, shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sent = (100 * values).to(getattr(torch, dtype))
    received = through_the_wire(sent)
    assert received.dtype is sent.dtype
    assert received.shape == sent.shape
    assert _bits(received) == _bits(sent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_infinities_signed_zeros_and_subnormals_keep_their_bits(dtype):
    info = torch.finfo(dtype)
    sent = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, info.smallest_normal / 2]).to(
        dtype
    )
    assert _bits(through_the_wire(sent)) == _bits(sent)


def test_a_strided_tensor_keeps_its_values():
    sent = torch.arange(24.0).reshape(4, 6).t()[::2]
    assert torch.equal(through_the_wire(sent), sent)


def test_what_arrives_may_be_written_to_and_nobody_else_sees_it():
    sent = torch.zeros(3)
    wire = to_wire(sent)
    wire.array.setflags(write=False)
    first, second = from_wire(wire), from_wire(wire)
    first.add_(1)
    assert second.sum() == sent.sum() == 0


def test_records_containers_and_plain_values_keep_their_types():
    parcel = Toy().parcel("float32", 4)
    sent = {"a": (parcel, [None, 1, 2.5, True, "x", b"y"]), "b": np.float32(3)}
    received = through_the_wire(sent)
    copy, plain = received["a"]
    assert type(copy) is Parcel
    assert copy.colour is Colour.RED
    assert (copy.sizes, copy.notes, copy.label, copy.volume) == ((1, 4), {"loss": 0.1}, None, 4)
    assert torch.equal(copy.payload, parcel.payload)
    assert plain == [None, 1, 2.5, True, "x", b"y"]
    assert type(received["b"]) is np.float32


def test_what_has_no_form_on_the_wire_is_named_with_its_place():
    with pytest.raises(TransferError, match=r"report\['a'\]\[1\] is a torch\.Size"):
        to_wire({"a": (1, torch.zeros(2).shape)}, "report")
    with pytest.raises(TransferError, match=r"value is part of an autograd graph"):
        to_wire(torch.ones(1, requires_grad=True))
    with pytest.raises(TransferError, match="sparse"):
        to_wire(torch.eye(2).to_sparse())


@dataclass(frozen=True, slots=True)
class Letter:
    """A record of which two tensors may be rounded, each of its own kind."""

    WIRE_KINDS: ClassVar[Mapping[str, str]] = {"text": "value", "slope": "gradient"}

    text: torch.Tensor
    slope: torch.Tensor
    level: torch.Tensor
    page: torch.Tensor | None = None


def _letter(dtype: torch.dtype = torch.float32) -> Letter:
    generator = torch.Generator().manual_seed(3)
    text, slope, level = torch.randn(3, 4096, generator=generator).to(dtype) * 100
    return Letter(text, slope, level)


def _narrowed(value, *kinds):
    return from_wire(pickle.loads(pickle.dumps(to_wire(value, bf16_kinds=set(kinds)), protocol=5)))


def test_only_tensors_of_the_kinds_that_were_named_are_rounded_on_the_way():
    sent = _letter()
    received = _narrowed([sent], "value")[0]
    assert received.text.dtype is torch.float32
    assert torch.equal(received.text, sent.text.bfloat16().float())
    assert not torch.equal(received.text, sent.text)
    assert _bits(received.slope) == _bits(sent.slope)
    assert _bits(received.level) == _bits(sent.level)
    both = _narrowed(sent, "value", "gradient")
    assert torch.equal(both.slope, sent.slope.bfloat16().float())
    assert _bits(_narrowed(sent).text) == _bits(sent.text)


def test_rounding_is_off_by_two_to_the_minus_eight_at_most_and_halves_what_travels():
    sent = _letter()
    error = (_narrowed(sent, "value").text - sent.text).abs() / sent.text.abs()
    assert 2**-9 < error.max() <= 2**-8
    whole, half = (len(pickle.dumps(to_wire(sent, bf16_kinds=k))) for k in (set(), {"value"}))
    assert whole - half == pytest.approx(4096 * 2, abs=100)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_rounded_tensor_arrives_in_its_own_dtype(dtype):
    sent = _letter(dtype)
    received = _narrowed(sent, "value").text
    assert received.dtype is dtype
    assert torch.equal(received, sent.text.bfloat16().to(dtype))


def test_records_that_name_nothing_and_tensors_outside_of_records_keep_their_bits():
    parcel = Toy().parcel("float32", 64)
    weights = {"weight": torch.randn(64)}
    received = _narrowed((parcel, weights), "value", "gradient")
    assert _bits(received[0].payload) == _bits(parcel.payload)
    assert _bits(received[1]["weight"]) == _bits(weights["weight"])


def test_arrays_are_found_wherever_they_hide():
    assert array_in(to_wire({"loss": 1.0, "steps": (1, 2)})) is None
    assert array_in(to_wire([1, {"x": np.zeros(1)}])) == "result[1]['x']"
    parcel = Toy().parcel("bfloat16", 2)
    assert array_in(to_wire(parcel)) == array_in(parcel) == "result.payload"
    assert array_in({"loss": [1.0, torch.zeros(1)]}) == "result['loss'][1]"


@dataclass(frozen=True)
class Sealed:
    """A record that pickles itself, with something inside that has no form on the wire."""

    PACKS_ITSELF: ClassVar[bool] = True

    inside: object


def test_a_record_that_packs_itself_travels_as_it_is():
    sealed = Sealed(object())
    assert to_wire({"it": [sealed]}) == {"it": [sealed]}
    assert from_wire(to_wire(sealed)) is sealed
    assert array_in(to_wire(sealed)) is None
    with pytest.raises(TransferError, match="is a builtins"):
        to_wire(sealed.inside)


@dataclass(frozen=True)
class Scripted:
    """A record of a program that is run as a script, in which its class is looked up."""

    number: int


class TestPacking:
    def test_small_values_travel_as_bytes_and_arrive_with_their_bits(self):
        letter = _letter()
        sent = {"letter": letter, "odd": torch.tensor([float("nan"), -0.0]), "word": "seven"}

        packed = pack(to_wire(sent))

        assert type(packed) is bytes
        arrived = from_wire(unpack(packed))
        assert arrived["word"] == "seven"
        assert type(arrived["letter"]) is Letter
        assert _bits(arrived["letter"].slope) == _bits(letter.slope)
        assert _bits(arrived["odd"]) == _bits(sent["odd"])
        arrived["letter"].slope.zero_()
        assert _bits(letter.slope) == _bits(_letter().slope)

    def test_a_large_array_is_left_where_it_is_and_bytes_stay_bytes(self):
        large = to_wire(torch.zeros(1 << 16))

        assert pack(large) is large
        assert unpack(large) is large
        for text in (b"a caption", b"one of __main__"):
            assert unpack(pack(text)) == text

    def test_what_another_process_does_not_have_by_name_is_left_to_ray(self, monkeypatch):
        @dataclass(frozen=True)
        class Inner:
            number: int

        inner = to_wire(Inner(1))
        assert pack(inner) is inner

        of_a_module = to_wire(Scripted(1))
        assert unpack(pack(of_a_module)) == of_a_module
        monkeypatch.setattr(sys.modules["__main__"], "Scripted", Scripted, raising=False)
        monkeypatch.setattr(Scripted, "__module__", "__main__")
        assert pack(of_a_module) is of_a_module
