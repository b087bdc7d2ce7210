"""What is sent comes out as it went in, over a stream and in a Flower message; anything else is refused."""

import io
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from federa.checkpoint import State
from federa.client import ClientUpdate
from federa.flower.codec import pack_state, pack_update, unpack_state, unpack_update
from federa.flower.parcel import Parcel

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
PARCELS = st.builds(
    Parcel,
    st.dictionaries(st.text(), VALUES, max_size=4),
    st.dictionaries(st.text(min_size=1), st.binary(), max_size=3),
)


@settings(max_examples=30)
@given(PARCELS)
def test_there_and_back(parcel):
    stream = io.BytesIO()
    parcel.write(stream)
    stream.seek(0)
    assert Parcel.read(stream) == parcel and stream.read() == b""
    again = Parcel.from_record(parcel.to_record())
    assert (again.facts, dict(again.blobs)) == (parcel.facts, dict(parcel.blobs))


@settings(max_examples=30)
@given(PARCELS, st.data())
def test_a_cut_stream_is_an_end(parcel, data):
    stream = io.BytesIO()
    parcel.write(stream)
    content = stream.getvalue()
    cut = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(EOFError):
        Parcel.read(io.BytesIO(content[:cut]))


def test_bytes_that_are_not_a_parcel():
    with pytest.raises(ValueError, match="parcel: must begin as federa's do"):
        Parcel.read(io.BytesIO(b"GET / HTTP/1.1\r\n\r\n"))
    with pytest.raises(ValueError, match="parcel: the header must have at most 16777216 bytes, got 4294967296"):
        Parcel.read(io.BytesIO(b"federa1\n" + struct.pack("<Q", 2**32)))
    with pytest.raises(ValueError, match="facts: must be JSON"):
        Parcel.read(io.BytesIO(b"federa1\n" + struct.pack("<Q", 4) + b"[1,}"))
    with pytest.raises(ValueError, match="parcel: must hold facts and sizes, got"):
        Parcel.read(io.BytesIO(b"federa1\n" + struct.pack("<Q", 15) + json.dumps([{}, {"a": -1}]).encode()))
    from flwr.app import ConfigRecord, RecordDict

    with pytest.raises(ValueError, match="message: must hold federa's records facts and blobs, got others"):
        Parcel.from_record(RecordDict({"facts": ConfigRecord({"json": "{}"})}))


TENSORS = {"a.lora_A": torch.randn(3, 5), "b": torch.tensor([1.5]), "count": torch.tensor([7])}


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_states_and_updates(wire):
    """float32: the same bits. bfloat16: rounded down there, the change rounded up here, other dtypes as they are."""
    books = {"server": {"v.b": torch.ones(1)}, "variates": {1: TENSORS}, "seen": {1: 2}, "best": {"round": 3}}
    state = State(4, TENSORS, **books)
    facts, content = pack_state(state, wire)
    assert facts == {"round": 4, "base": {}}  # nothing of the server's own
    assert {name.split("/")[0] for name in load(content)} == {"tensors"}
    there = unpack_state(facts, content, TENSORS)
    half = (lambda t: t.bfloat16().float() if t.is_floating_point() else t) if wire == "bfloat16" else lambda t: t
    assert there.round == 4 and all(torch.equal(there.tensors[n], half(t)) for n, t in TENSORS.items())
    assert {n: t.dtype for n, t in there.tensors.items()} == {n: t.dtype for n, t in TENSORS.items()}

    new = {name: tensor + 1 if name == "count" else tensor * 1.01 for name, tensor in there.tensors.items()}
    update = ClientUpdate(2, 10, 3, new, {"loss": 0.5})
    back = unpack_update(*pack_update(update, there.tensors, wire), TENSORS, wire)
    assert (back.client, back.examples, back.steps, back.metrics, back.finite) == (2, 10, 3, {"loss": 0.5}, True)
    for name, tensor in TENSORS.items():
        expected = new[name]
        if wire == "bfloat16" and tensor.is_floating_point():
            expected = tensor + (new[name] - there.tensors[name]).bfloat16().float()
        assert torch.equal(back.tensors[name], expected), name


def test_a_full_precision_payload_where_half_was_agreed():
    facts, content = pack_update(ClientUpdate(0, 1, 1, TENSORS, {"loss": 0.5}), TENSORS, "float32")
    with pytest.raises(ValueError, match=r"must be torch.bfloat16 on the wire, got torch.float32"):
        unpack_update(facts, content, TENSORS, "bfloat16")


@given(st.binary(max_size=200))
def test_payloads_of_any_bytes(content):
    """Malformed bytes never raise anything but ValueError, whatever they are."""
    facts = {"client": 0, "examples": 1, "steps": 1, "metrics": {"loss": 1.0}, "finite": True}
    with pytest.raises(ValueError, match=r"^payload: must be safetensors, got "):
        unpack_update(facts, content, TENSORS, "float32")
