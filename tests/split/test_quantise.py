"""Bit packing and stochastic rounding, against plain computations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_moe.split.codecs import dequantise, num_levels, pack, packed_size, quantise, unpack


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits_by_hand(codes: list[int], bits: int) -> list[int]:
    """Write codes of up to 8 bits as one long number, lowest bits first."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


def test_three_bit_codes_by_hand():
    # 0b010_001 | 0b101 << 6 = 0b1_0101_0001: bytes 0x51, 0x01
    packed = pack(np.array([1, 2, 5], np.uint16), 3)
    assert packed.tolist() == [0x51, 0x01]


def test_twelve_bit_codes_by_hand():
    # Low bytes first, then the upper four bits of both codes in one byte.
    packed = pack(np.array([0xABC, 0x123], np.uint16), 12)
    assert packed.tolist() == [0xBC, 0x23, 0x1A]


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=40))
def test_packing_is_one_long_number(bits, values):
    codes = [value % 2**bits for value in values]
    assert pack(np.array(codes, np.uint16), bits).tolist() == bits_by_hand(codes, bits)


@given(st.integers(1, 16), st.lists(st.integers(0, 65535), max_size=40))
def test_unpack_inverts_pack_in_exactly_the_bytes_needed(bits, values):
    codes = np.array([value % 2**bits for value in values], np.uint16)
    packed = pack(codes, bits)
    assert len(packed) == packed_size(len(codes), bits) == -(-len(codes) * bits // 8)
    assert unpack(packed, bits, len(codes)).tolist() == codes.tolist()


@pytest.mark.parametrize("size", [1, 3])
def test_wrong_number_of_bytes(size):
    with pytest.raises(ValueError, match=rf"packed codes have {size} bytes, expected 2 for 3 val"):
        unpack(np.zeros(size, np.uint8), 4, 3)


def test_values_on_steps_stay():
    x = torch.tensor([-3.0, -1.0, 0.0, 2.0, 3.0])
    result = quantise(x, 3, generator(), "tensor")
    assert result.codes.tolist() == [-3, -1, 0, 2, 3]
    assert result.scale.tolist() == [3.0]
    assert dequantise(result, 3, "tensor").tolist() == x.tolist()


def test_without_negative_values_all_codes_are_above_zero():
    x = torch.tensor([0.0, 1.0, 5.0, 7.0])
    result = quantise(x, 3, generator(), "tensor")
    assert not result.signed
    assert result.codes.tolist() == [0, 1, 5, 7]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("signed", [True, False])
def test_mean_over_draws_is_the_input(bits, signed):
    """With 1,500 draws the mean must lie within 5 standard errors of the input, for 60 values."""
    draws = 1500
    x = torch.rand(60, generator=generator(1), dtype=torch.float64).float()
    x = x * 2 - 1 if signed else x
    step = x.abs().max().double() / num_levels(bits, signed)
    source = generator(2)
    total = torch.zeros(60, dtype=torch.float64)
    for _ in range(draws):
        total += dequantise(quantise(x, bits, source, "tensor"), bits, "tensor")
    place = x.double() / step
    share = place - place.floor()
    error = step * (share * (1 - share) / draws).sqrt()
    # float32 arithmetic may be off by a few units in the last place of the largest value.
    slack = 4e-7 * x.abs().max()
    assert ((total / draws - x).abs() <= 5 * error + slack).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 16),
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.sampled_from(["tensor", "sample", "channel"]),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.integers(0, 99),
)
def test_error_below_one_step(bits, shape, scale_per, size, seed):
    x = torch.randn(shape, generator=generator(seed)) * size
    result = quantise(x, bits, generator(seed + 1), scale_per)
    dims = {"tensor": list(range(x.ndim)), "sample": list(range(1, x.ndim))}
    dims["channel"] = [d for d in range(x.ndim) if d != 1]
    largest = x.abs().amax(dim=dims[scale_per], keepdim=True)
    step = largest / num_levels(bits, result.signed)
    error = (dequantise(result, bits, scale_per) - x).abs()
    assert (error <= step * (1 + 1e-3)).all()
    assert result.scale.tolist() == largest.reshape(-1).tolist()


def test_all_zero_and_empty():
    for x in (torch.zeros(3, 4), torch.zeros(0, 4), torch.zeros(3, 0)):
        result = quantise(x, 4, generator(), "sample")
        assert torch.equal(dequantise(result, 4, "sample"), x)


def test_values_beyond_float32():
    with pytest.raises(ValueError, match="not finite in float32"):
        quantise(torch.tensor([1e300], dtype=torch.float64), 8, generator(), "tensor")


def test_scale_per_channel_needs_channels():
    with pytest.raises(ValueError, match=r"shape is \(3,\), expected dimension 1 for a scale per"):
        quantise(torch.ones(3), 8, generator(), "channel")
