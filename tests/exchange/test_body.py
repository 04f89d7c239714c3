import gc
import json
import random
import struct

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_moe.exchange.body import (
    BadBody,
    BadName,
    Limits,
    TensorSpec,
    check_name,
    checksum,
    pack,
    read_header,
    unpack,
)

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.uint32,
    torch.int32,
    torch.float32,
    torch.uint64,
    torch.int64,
    torch.float64,
    torch.complex64,
]
NUMPY = ["bool", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c8"]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def body_of(header: object, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(dtype: object = "U8", shape: object = (2,), offsets: object = (0, 2)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 5)], ids=str)
def test_every_dtype_and_shape_comes_back_bit_by_bit(dtype, shape):
    values = torch.arange(30)[: torch.Size(shape).numel()].reshape(shape)
    tensor = values.to(torch.int64).remainder(2).bool() if dtype is torch.bool else values.to(dtype)
    tensors, _ = unpack(pack({"x": tensor}))
    assert tensors["x"].dtype == dtype and tensors["x"].shape == tensor.shape
    assert raw(tensors["x"]) == raw(tensor)


@pytest.mark.parametrize("code", NUMPY)
def test_numpy_arrays_of_either_byte_order_and_any_strides(code):
    values = np.arange(12).reshape(3, 4).astype(np.dtype(code))
    for array in (
        values,
        values.T,
        values[::-1, ::2],
        values.astype(values.dtype.newbyteorder(">")),
    ):
        tensors, _ = unpack(pack({"x": array}))
        np.testing.assert_array_equal(tensors["x"].numpy(), array)
    scalar, _ = unpack(pack({"x": values[1, 1].reshape(())}))
    assert scalar["x"].shape == () and scalar["x"].numpy() == values[1, 1]


def test_strided_and_trained_tensors():
    weight = torch.nn.Parameter(torch.randn(4, 6))
    tensors, _ = unpack(pack({"t": weight.T, "s": weight[::2, 1::3]}))
    assert torch.equal(tensors["t"], weight.T) and torch.equal(tensors["s"], weight[::2, 1::3])


def test_reads_and_is_read_by_the_safetensors_library():
    tensors = {
        "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "half": torch.randn(5).bfloat16(),
        "empty": torch.empty(0, 7),
        "doubles": torch.randn(2, 2, dtype=torch.float64),
    }
    body = pack(tensors, {"version": "3"})
    theirs = safetensors.torch.load(body)
    ours, metadata = unpack(safetensors.torch.save(tensors, {"version": "3"}))
    assert metadata == {"version": "3"} == unpack(body)[1]
    assert theirs.keys() == ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor) and torch.equal(ours[name], tensor)


def test_order_of_names_is_kept_and_equal_input_gives_equal_bytes():
    tensors = {"z": torch.zeros(1, dtype=torch.uint8), "a": torch.zeros(2), "m": torch.zeros(1)}
    assert list(unpack(pack(tensors))[0]) == ["z", "a", "m"]
    assert pack(tensors, {"k": "v"}) == pack(dict(tensors), {"k": "v"})
    assert unpack(pack({})) == ({}, {})


def test_tensors_lie_in_the_body_and_keep_it_alive():
    body = bytearray(pack({"x": torch.zeros(4)}))
    tensors, _ = unpack(body)
    tensors["x"][3] = 1.0
    assert body[-4:] == struct.pack("<f", 1.0)
    tensors, _ = unpack(pack({"x": torch.arange(100_000)}))
    gc.collect()
    torch.full((100_000,), 7)  # would take the place of freed memory
    assert torch.equal(tensors["x"], torch.arange(100_000))


@pytest.mark.filterwarnings("error")
def test_read_only_and_misaligned_bodies_need_no_warning():
    expected = torch.arange(5, dtype=torch.float64)
    body = pack({"x": expected})
    for shift in range(8):
        shifted = memoryview(b"-" * shift + body)[shift:]
        assert torch.equal(unpack(shifted)[0]["x"], expected)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "body has 0 bytes, expected at least 8"),
        (b"\x02\0\0\0\0\0\0", "body has 7 bytes"),
        (struct.pack("<Q", 3) + b"{}", "header has 3 bytes, expected at most 2"),
        (struct.pack("<Q", 2**63) + b"{}", "expected at most 1048576"),
        (body_of(b""), "does not start with"),
        (body_of(b" {}"), "does not start with"),
        (body_of(b"[]"), "does not start with"),
        (body_of(b"{"), "not JSON"),
        (body_of(b'{"\xff": 1}'), "not JSON"),
        (body_of(b'{"a":' + b"[" * 100_000), "not JSON"),
        (body_of(b'{"a":' + b"9" * 5_000 + b"}"), "not JSON"),
        (body_of(b'{"a": 1, "a": 1}'), "header has 'a' twice"),
        (body_of(b'{"x":{"dtype":"U8","dtype":"U8"}}'), "header has 'dtype' twice"),
        (body_of({"__metadata__": ["a"]}), "metadata is not"),
        (body_of({"__metadata__": {"a": 1}}), "metadata is not"),
        (body_of(b'{"__metadata__": {"a": "\\ud800"}}'), "metadata is not"),
        (body_of(b'{"\\ud800": 1}'), "not text"),
        (body_of({"x": 5}), "'x' is described by other than"),
        (body_of({"x": {"dtype": "U8", "shape": [2]}}, b"ab"), "'x' is described by other than"),
        (body_of({"x": entry() | {"more": 1}}, b"ab"), "'x' is described by other than"),
        (body_of({"x": entry(dtype="U7")}, b"ab"), "'x' has dtype 'U7'"),
        (body_of({"x": entry(dtype=["U8"])}, b"ab"), "'x' has dtype"),
        (body_of({"x": entry(shape=2)}, b"ab"), "'x' has shape 2"),
        (body_of({"x": entry(shape=[-1, -2])}, b"ab"), "'x' has shape"),
        (body_of({"x": entry(shape=[2.0])}, b"ab"), "'x' has shape"),
        (body_of({"x": entry(shape=[True, 2])}, b"ab"), "'x' has shape"),
        (body_of({"x": entry(shape=[1] * 64 + [2])}, b"ab"), "'x' has shape"),
        (body_of({"x": entry(shape=[0, 2**62, 4], offsets=[0, 0])}), "expected a smaller one"),
        (body_of({"x": entry(offsets=[0])}, b"ab"), "'x' has data_offsets"),
        (body_of({"x": entry(offsets=[0, "2"])}, b"ab"), "'x' has data_offsets"),
        (body_of({"x": entry(offsets=[-2, 0])}, b"ab"), "'x' has data_offsets"),
        (body_of({"x": entry(offsets=[2, 0])}, b"ab"), "'x' has data_offsets"),
        (body_of({"x": entry(shape=[3])}, b"ab"), "'x' has 2 bytes, expected 3"),
        (body_of({"x": entry(dtype="F32")}, b"ab"), "'x' has 2 bytes, expected 8"),
        (body_of({"x": entry(), "y": entry(offsets=[1, 3])}, b"abc"), "'y' overlaps"),
        (body_of({"x": entry(), "y": entry()}, b"ab"), "'y' overlaps"),
        (body_of({"x": entry(), "y": entry(offsets=[3, 5])}, b"abcde"), "'y' leaves a gap"),
        (body_of({"x": entry(offsets=[1, 3])}, b"abc"), "'x' leaves a gap"),
        (body_of({"x": entry()}, b"abc"), "tensors end at byte"),
        (body_of({"x": entry()}, b"a"), "tensors end at byte"),
        (body_of({}, b"a"), "tensors end at byte"),
        (body_of({"b": entry(dtype="BOOL")}, b"\0\2"), "'b' has booleans"),
    ],
)
def test_each_malformed_body_is_refused_with_one_line(body, reason):
    with pytest.raises(BadBody) as refusal:
        unpack(body)
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


def test_limits_are_inclusive():
    body = pack({"x": torch.zeros(2), "y": torch.zeros(1)})
    header = int.from_bytes(body[:8], "little")
    unpack(body, Limits(len(body), 2, header))
    for limits, reason in (
        (Limits(len(body) - 1, 2, header), "body has"),
        (Limits(len(body), 1, header), "2 tensors, expected at most 1"),
        (Limits(len(body), 2, header - 1), "header has"),
    ):
        with pytest.raises(BadBody, match=reason):
            unpack(body, limits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 57, 99])
def test_non_finite_values_are_refused_by_name(dtype, value, place):
    tensor = torch.ones(100, dtype=dtype)
    tensor[place] = value
    body = pack({"fine": torch.ones(3), "bad one": tensor})
    with pytest.raises(BadBody, match="tensor 'bad one' has non-finite values"):
        unpack(body)
    assert raw(unpack(body, require_finite=False)[0]["bad one"]) == raw(tensor)


def test_the_largest_values_and_non_finite_complex():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        ends = [torch.finfo(dtype).min, torch.finfo(dtype).max]
        unpack(pack({"x": torch.tensor(ends, dtype=dtype)}))
    with pytest.raises(BadBody, match="'x' has non-finite"):
        unpack(pack({"x": torch.tensor([complex(0, float("nan"))])}))


def test_expected_tensors():
    body = pack({"a": torch.zeros(2, 3), "b": torch.zeros(1, dtype=torch.int64)})
    expected = {"a": torch.empty(2, 3), "b": TensorSpec((1,), torch.int64)}
    assert unpack(body, expected=expected)[0].keys() == {"a", "b"}
    for change, reason in (
        ({"c": torch.zeros(1)}, r"'c' is missing \(1 in all\)"),
        ({"a": TensorSpec((3, 2), torch.float32)}, r"'a' has shape \(2, 3\), expected \(3, 2\)"),
        ({"b": TensorSpec((1,), torch.int32)}, "'b' is of torch.int64, expected torch.int32"),
    ):
        with pytest.raises(BadBody, match=reason):
            unpack(body, expected=expected | change)
    with pytest.raises(BadBody, match="'b' is unexpected"):
        unpack(body, expected={"a": expected["a"]})


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"__metadata__": torch.zeros(1)}, None),
        ({5: torch.zeros(1)}, None),
        ({"x": np.array(["text"])}, None),
        ({"x": torch.zeros(1, dtype=torch.complex128)}, None),
        ({}, {"k": 1}),
        ({}, {1: "v"}),
    ],
)
def test_what_cannot_be_packed(tensors, metadata):
    with pytest.raises(ValueError, match="expected"):
        pack(tensors, metadata)


@pytest.mark.parametrize("name", ["a", "A-z_0.9", "_", "x" * 200, "a..b"])
def test_good_names(name):
    check_name(name)


@pytest.mark.parametrize(
    "name", ["", ".a", "..", "a/b", "a\\b", "a b", "ä", "a\n", "a~b", "x" * 201, 3]
)
def test_bad_names(name):
    with pytest.raises(BadName, match="expected 1 to 200"):
        check_name(name)


def test_checksum_is_sha256():
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, "abc"
    assert checksum(b"abc") == checksum(memoryview(b"abc")) == known


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(NUMPY[1:]), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
)
def test_round_trip_of_anything(specs, metadata):
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.integers(0, 100, shape).astype(np.dtype(code))
        for name, (code, shape) in specs.items()
    }
    tensors, words = unpack(pack(arrays, metadata))
    assert words == metadata and list(tensors) == list(arrays)
    for name, array in arrays.items():
        assert tensors[name].numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensors[name].numpy(), array)


def test_broken_bodies_raise_nothing_but_bad_body():
    generator = random.Random(0)
    good = pack(
        {"w": torch.randn(3, 2), "flag": torch.tensor([True]), "n": torch.arange(3)}, {"k": "v"}
    )
    refused = 0
    for trial in range(6_000):
        body = bytearray(good)
        if trial % 3 == 0:  # change some bytes, of the header rather than the data
            for _ in range(generator.randint(1, 3)):
                body[generator.randrange(int(len(body) * 0.85))] = generator.randrange(256)
        elif trial % 3 == 1:  # swap a character of the header for one that keeps it near to JSON
            body[generator.randrange(8, 8 + int.from_bytes(good[:8], "little"))] = ord(
                generator.choice('0123456789-{}[]",:e. ')
            )
        else:  # cut, or nonsense behind a plausible length
            body = bytearray(
                good[: generator.randrange(len(good))]
                if generator.random() < 0.5
                else struct.pack("<Q", generator.randrange(40)) + generator.randbytes(40)
            )
        try:
            tensors, _ = unpack(bytes(body))
        except BadBody:
            refused += 1
        else:
            for tensor in tensors.values():  # memory that is really there
                tensor.clone()
            assert sum(t.nbytes for t in tensors.values()) <= len(body)
    assert 4_000 < refused < 6_000


def test_many_names_with_one_twice_are_refused_quickly():
    names = ",".join(f'"{number}":0' for number in [*range(80_000), 79_999])
    with pytest.raises(BadBody, match="'79999' twice"):
        read_header(body_of(f"{{{names}}}".encode()))
