"""Casts: every bit as IEEE 754 has it, and nothing else touched."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flwr_moe.arrays import record_of, tensors_of
from flwr_moe.network.ledger import count_bytes
from flwr_moe.network.wire_dtype import PLAIN, SEALED, check_wire_dtype, decode, encode

SEALING = pytest.mark.parametrize("sealed", [True, False])


def content_of(*arrays: np.ndarray, key: str = "arrays") -> RecordDict:
    record = ArrayRecord({f"w{i}": Array(array) for i, array in enumerate(arrays)})
    return RecordDict({key: record})


def there_and_back(array: np.ndarray, dtype: str) -> np.ndarray:
    wired = encode(content_of(array), dtype, sealed=True)
    return decode(wired)["arrays"]["w0"].numpy()


def to_nearest_even(value: np.ndarray) -> np.ndarray:
    """Drop 16 bits of each float32 by whole-number arithmetic alone."""
    bits = value.view(np.uint32).astype(np.uint64)
    low, kept = bits & 0xFFFF, bits >> 16
    up = (low > 0x8000) | ((low == 0x8000) & (kept % 2 == 1))
    return ((kept + up) << 16).astype(np.uint32).view(np.float32)


def test_bfloat16_is_rounded_to_nearest_and_ties_to_even():
    # 1 + 2^-8 lies between 1 and 1 + 2^-7: a tie, whose even end is 1; the next one goes up.
    tie = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20], np.float32)
    assert there_and_back(tie, "bfloat16").tolist() == [1, 1 + 2**-6, -1, 1 + 2**-7]
    rng = np.random.default_rng(0)
    anything = rng.normal(size=(50, 7)).astype(np.float32) * 10.0 ** rng.integers(-30, 30, (50, 7))
    anything = anything.astype(np.float32)
    assert np.array_equal(there_and_back(anything, "bfloat16"), to_nearest_even(anything))


def test_float16_is_rounded_as_numpy_does():
    values = np.array([1 + 2**-11, 1 + 3 * 2**-11, 65504, -65519, 1e-9], np.float32)
    expected = [1, 1 + 2**-9, 65504, -65504, 0]
    assert there_and_back(values, "float16").tolist() == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (4, 3)])
def test_shapes_and_layouts_survive(dtype, shape):
    values = np.arange(12, dtype=np.float32)[: int(np.prod(shape))].reshape(shape)
    for array in (values, np.asfortranarray(values), values.T):
        back = there_and_back(array, dtype)
        assert back.shape == array.shape and back.dtype == np.float32
        assert np.array_equal(back, array)


@SEALING
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bytes_are_halved_and_names_kept(dtype, sealed):
    content = content_of(np.zeros(1000, np.float32), np.zeros((30, 40), np.float32))
    content["config"] = ConfigRecord({"server-round": 1})
    wired = encode(content, dtype, sealed)
    header = 128  # of numpy's format
    assert [len(a.data) for a in wired["arrays"].values()] == [2000 + header, 2400 + header]
    assert list(wired) == list(content) and list(wired["arrays"]) == ["w0", "w1"]
    assert [tuple(a.shape) for a in wired["arrays"].values()] == [(1000,), (30, 40)]
    assert count_bytes(content)["shared"] - count_bytes(wired)["shared"] == 2 * 2200


@pytest.mark.parametrize(
    "array",
    [
        np.array([1 + 2**-40]),
        np.array([2**24 + 1]),
        np.array([True]),
        np.array([1.5], np.float16),
        np.array([1 + 2**-20], ">f4"),
    ],
    ids=lambda a: a.dtype.str,
)
def test_what_is_not_float32_stays(array):
    content = content_of(array)
    assert encode(content, "bfloat16", sealed=True) == content


@pytest.mark.parametrize("key", ["gate", "activation", "gradient"])
def test_records_of_a_kind_of_their_own_stay(key):
    content = content_of(np.array([1 + 2**-20], np.float32), key=key)
    assert encode(content, "bfloat16", sealed=True) == content


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("float16", 65520), ("bfloat16", 3.4e38), ("bfloat16", np.nan), ("float16", np.inf)],
)
def test_what_would_not_be_finite_travels_as_it_is(dtype, value):
    content = content_of(np.array([1, value], np.float32), np.array([2], np.float32))
    wired = encode(content, dtype, sealed=False)
    assert wired["arrays"]["w0"] == content["arrays"]["w0"]
    assert wired["arrays"]["w1"].dtype == dtype


def test_flower_refuses_to_read_sealed_bfloat16_as_numbers():
    wired = encode(content_of(np.ones(3, np.float32)), "bfloat16", sealed=True)["arrays"]
    assert wired["w0"].stype == SEALED
    with pytest.raises(TypeError, match="bfloat16"):
        wired.to_torch_state_dict()
    for sealed, stype in ((True, SEALED), (False, PLAIN)):
        again = encode(RecordDict({"arrays": wired}), "bfloat16", sealed)["arrays"]["w0"]
        assert again.stype == stype and again.data == wired["w0"].data


def test_a_bfloat16_state_dict_survives_bit_by_bit():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(torch.bfloat16)
    state = model.state_dict()
    state["odd"] = torch.tensor([float("nan"), -0.0, 2**-130], dtype=torch.bfloat16)
    state["slice"] = torch.randn(4, 6).to(torch.bfloat16)[1:3, ::2].T
    record = record_of(state)
    assert sum(len(a.data) for a in record.values()) < 128 * len(record) + 2 * 100
    for arrays in (record, encode(RecordDict({"a": record}), "bfloat16", sealed=False)["a"]):
        back = tensors_of(arrays)
        assert list(back) == list(state)
        for key, tensor in state.items():
            assert back[key].dtype == tensor.dtype and back[key].shape == tensor.shape
            bits = torch.int16 if tensor.dtype == torch.bfloat16 else tensor.dtype
            assert torch.equal(back[key].view(bits), tensor.contiguous().view(bits)), key
    torch.nn.Sequential.load_state_dict(model, tensors_of(record_of(model.state_dict())))


def forged(dtype: str, array: np.ndarray, shape: tuple[int, ...] | None = None) -> RecordDict:
    honest = Array(array)
    fake = Array(dtype, honest.shape if shape is None else shape, PLAIN, honest.data)
    return RecordDict({"arrays": ArrayRecord({"w": fake}), "metrics": MetricRecord({"n": 1})})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (forged("bfloat16", np.zeros(3)), "cannot be read: float64"),
        (forged("bfloat16", np.zeros(3, np.uint16), (4,)), "cannot be read: uint16 of shape"),
        (forged("float16", np.zeros(3, np.float32)), "cannot be read: float32"),
        (forged("bfloat16", np.array([0x7F80], np.uint16)), "non-finite"),
        (forged("float16", np.array([np.inf], np.float16)), "non-finite"),
    ],
)
def test_forged_arrays_are_named(content, message):
    with pytest.raises(ValueError, match=f"'arrays/w'.* {message}"):
        decode(content, require_finite=True)


def test_unknown_dtypes_are_named():
    check_wire_dtype("bfloat16")
    with pytest.raises(ValueError, match="wire-dtype is 'int8', expected one of float32"):
        check_wire_dtype("int8")
