"""Codecs: exact bytes, the same mask on both sides, gradients as autograd has them."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from flwr_moe.split.codecs import (
    Chain,
    CodecKey,
    Encoded,
    Passthrough,
    Quantise,
    RandomDropout,
    cut_codecs,
    draw,
    smallest,
)
from tests.split.halves import wire_bytes

WORDS = [24271, 64080, 29299, 2874, 47803, 537]
KEY = CodecKey(seed=7, round=2, batch=3, partition=1, role="activation")
BACK = dataclasses.replace(KEY, role="gradient")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_passthrough_is_bitwise():
    x = noise(2, 3)
    encoded = Passthrough().encode(x, KEY)
    assert encoded.num_bytes == 2 * 3 * 8
    assert torch.equal(Passthrough().decode(encoded, KEY), x)


def test_dropout_bytes_and_count_by_hand():
    codec = RandomDropout(0.75)
    encoded = codec.encode(noise(3, 2, 10, dtype=torch.float32), KEY)
    # 5 of the 20 values of each of 3 samples, 4 bytes each.
    assert encoded.tensors["values"].shape == (3, 5)
    assert encoded.num_bytes == 3 * 5 * 4
    assert codec.mask((3, 2, 10), KEY).flatten(1).sum(1).tolist() == [5, 5, 5]


def test_dropout_keeps_the_scaled_values_of_its_mask():
    x = noise(4, 3, 8)
    codec = RandomDropout(0.25)
    y = codec.decode(codec.encode(x, KEY), KEY)
    torch.testing.assert_close(y, x * codec.mask(x.shape, KEY) / 0.75, rtol=1e-15, atol=0)


def test_other_side_draws_the_same_mask_from_its_own_objects():
    mine = RandomDropout(0.5).mask((4, 50), CodecKey(7, 2, 3, 1, "activation"))
    theirs = RandomDropout(0.5).mask((4, 50), CodecKey(7, 2, 3, 1, "gradient"))
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("field", ["seed", "round", "batch", "partition"])
def test_every_batch_has_a_mask_of_its_own(field):
    other = dataclasses.replace(KEY, **{field: 9})
    codec = RandomDropout(0.5)
    assert not torch.equal(codec.mask((4, 50), KEY), codec.mask((4, 50), other))


def test_mask_is_fair():
    """Each of 40 places is kept in 2,000 draws within 5 standard errors of the kept share."""
    draws = 2000
    share = RandomDropout(0.75).mask((draws, 40), KEY).double().mean(0)
    assert ((share - 0.25).abs() <= 5 * (0.25 * 0.75 / draws) ** 0.5).all()


def test_equal_draws_keep_the_first():
    draws = np.array([[5, 2, 5, 5, 1], [4, 3, 2, 1, 0]], np.uint32)
    assert np.flatnonzero(smallest(draws, 3)).tolist() == [0, 1, 4, 7, 8, 9]


def test_draws_are_the_same_on_any_machine():
    """The words that NumPy documents as stable: a change would part the two sides of a cut."""
    words = draw(7, 6, np.uint16)
    raw = int(np.random.SFC64(7).random_raw())
    assert words[:4].tolist() == [raw >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
    assert words.tolist() == WORDS
    assert draw(7, 3, np.uint32).tolist() == [
        low + (high << 16) for low, high in zip(WORDS[::2], WORDS[1::2], strict=True)
    ]


def test_layout_in_memory_does_not_matter():
    x, chain = noise(4, 6, 3, 5), cut_codecs(dropout=0.5, bits=8)["activation"]
    encoded = chain.encode(x, KEY)
    other = chain.encode(x.contiguous(memory_format=torch.channels_last), KEY)
    assert all(torch.equal(other.tensors[name], t) for name, t in encoded.tensors.items())


def test_large_finite_values_are_no_error():
    x = torch.full((2, 4), 3e38)
    assert torch.equal(Passthrough().decode(Passthrough().encode(x, KEY), KEY), x)


def test_mask_ignores_the_global_generator():
    torch.manual_seed(0)
    first = RandomDropout(0.5).mask((2, 30), KEY)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first, RandomDropout(0.5).mask((2, 30), KEY))
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


def test_gradient_through_the_wire_is_that_of_the_masked_network():
    """Client half, codec, server half, codec, against autograd on x * mask / (1 - p)."""
    torch.manual_seed(0)
    client = torch.nn.Linear(5, 8).double()
    server = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    x = noise(6, 5)
    chains = cut_codecs(dropout=0.5)

    whole = client(x) * RandomDropout(0.5).mask((6, 8), KEY) / 0.5
    server(whole).square().sum().backward()
    expected = [p.grad.clone() for p in client.parameters()]
    client.zero_grad()

    sent = client(x)
    arrived = chains["activation"].decode(chains["activation"].encode(sent, KEY), KEY)
    assert torch.equal(arrived, whole.detach())
    arrived.requires_grad_()
    server(arrived).square().sum().backward()
    back = chains["gradient"].encode(arrived.grad, BACK)
    assert back.num_bytes == 6 * 4 * 8
    sent.backward(chains["gradient"].decode(back, BACK))
    for parameter, gradient in zip(client.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_odd_sizes_stay_unbiased():
    # 1.5 of 3 values rounds to 2; scaling by 3/2 instead of 2 keeps the mean.
    codec = RandomDropout(0.5)
    draws = 3000
    y = codec.decode(codec.encode(torch.ones(draws, 3), KEY), KEY)
    assert y.sum(1).allclose(torch.tensor(3.0))
    assert ((y.mean(0) - 1).abs() <= 5 * (0.5 / draws) ** 0.5).all()


@pytest.mark.parametrize("bits", range(2, 17))
def test_quantised_bytes_by_hand(bits):
    encoded = Quantise(bits, "tensor").encode(noise(3, 7, dtype=torch.float32), KEY)
    assert encoded.num_bytes == (21 * bits + 7) // 8 + 4
    encoded = Quantise(bits).encode(noise(3, 7, dtype=torch.float32), KEY)
    assert encoded.num_bytes == (21 * bits + 7) // 8 + 3 * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", [Passthrough(), RandomDropout(0.5), Quantise(8)])
def test_dtype_is_restored(codec, dtype):
    for x in (noise(4, 6).to(dtype), torch.zeros(4, 6, dtype=dtype)):
        y = Chain([codec]).decode(Chain([codec]).encode(x, KEY), KEY)
        assert y.dtype == dtype
        assert y.shape == x.shape
        assert torch.isfinite(y).all()
        assert y.any() == x.any()


def test_rounding_differs_by_role_and_repeats_by_key():
    x, codec = noise(4, 50), Quantise(4)
    first = codec.encode(x, KEY).tensors["values"]
    assert torch.equal(first, codec.encode(x, KEY).tensors["values"])
    assert not torch.equal(first, codec.encode(x, BACK).tensors["values"])


class Halve:
    """Subtracts 1, then halves: order matters."""

    def encode(self, x, key):
        return Encoded({"values": (x - 1) / 2, "note": torch.ones(1)}, {"k": "halve"})

    def decode(self, encoded, key):
        assert encoded.metadata == {"k": "halve"}
        assert encoded.tensors["note"].item() == 1
        return encoded.tensors["values"] * 2 + 1


class Square:
    def encode(self, x, key):
        return Encoded({"values": x**2}, {"k": "square"})

    def decode(self, encoded, key):
        assert encoded.metadata == {"k": "square"}
        return encoded.tensors["values"].sqrt()


def test_chain_applies_in_order_and_undoes_in_reverse():
    x = torch.tensor([[5.0, 9.0]])
    chain = Chain([Halve(), Square()])
    encoded = chain.encode(x, KEY)
    assert encoded.tensors["values"].tolist() == [[4.0, 16.0]]
    assert encoded.metadata == {"0.k": "halve", "1.k": "square"}
    assert chain.decode(encoded, KEY).tolist() == x.tolist()


def test_more_than_ten_codecs_keep_their_metadata_apart():
    chain = Chain([Halve()] * 12)
    x = torch.tensor([[4096.0]])
    assert chain.decode(chain.encode(x, KEY), KEY).tolist() == x.tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=4),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    st.sampled_from([None, 2, 5, 8, 11, 16]),
    st.sampled_from(DTYPES),
)
def test_any_shape_there_and_back_in_the_bytes_foretold(shape, dropout, bits, dtype):
    x = noise(*shape).to(dtype)
    for role, chain in cut_codecs(dropout=dropout, bits=bits).items():
        key = dataclasses.replace(KEY, role=role)
        encoded = chain.encode(x, key)
        assert encoded.num_bytes == wire_bytes(chain, shape, dtype)
        y = chain.decode(encoded, key)
        assert y.shape == x.shape
        assert y.dtype == dtype
        dropped = ~RandomDropout(dropout).mask(shape, KEY)
        assert not y[dropped].any()


def test_bytes_of_a_chain_by_hand():
    chain = cut_codecs(dropout=0.5, bits=5)["activation"]
    # 32 samples of 8*6*6 = 288 values, 144 kept: 32*144*5/8 = 2,880 bytes and 32 scales.
    assert wire_bytes(chain, (32, 8, 6, 6)) == 2880 + 128
    assert chain.encode(noise(32, 8, 6, 6), KEY).num_bytes == 3008


def test_survives_safetensors(tmp_path):
    x, chain = noise(4, 10, dtype=torch.float32), cut_codecs(dropout=0.5, bits=6)["activation"]
    encoded = chain.encode(x, KEY)
    save_file(encoded.tensors, tmp_path / "wire", metadata=encoded.metadata)
    with safe_open(tmp_path / "wire", "pt") as file:
        names = file.keys()
        read = Encoded({name: file.get_tensor(name) for name in names}, file.metadata())
    assert torch.equal(chain.decode(read, KEY), chain.decode(encoded, KEY))


def test_half_as_much_error_after_a_relu():
    x = noise(8, 500, dtype=torch.float32)
    errors = []
    for y in (x, x.relu()):
        codec = Quantise(4, "tensor")
        errors.append((codec.decode(codec.encode(y, KEY), KEY) - y).abs().max().item())
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("codec", [Passthrough(), RandomDropout(0.5), Quantise(8), Chain([])])
def test_values_that_are_not_finite(codec, bad):
    with pytest.raises(ValueError, match="not finite"):
        codec.encode(torch.tensor([[0.0, bad]]), KEY)


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match=r"the tensor is torch\.int64, expected one of"):
        Quantise(8).encode(torch.ones(2, 2, dtype=torch.int64), KEY)


@pytest.mark.parametrize("bits", [0, 1, 17, -8, 8.0, True])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=rf"bits is {bits}, expected a whole number from 2 to 16"):
        Quantise(bits)


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0, float("nan")])
def test_p_out_of_range(p):
    with pytest.raises(ValueError, match=rf"p is {p}, expected at least 0 and below 1"):
        cut_codecs(dropout=p)


def test_unknown_scale():
    with pytest.raises(ValueError, match="scale_per is 'row', expected one of"):
        Quantise(8, "row")


def test_dropout_needs_more_than_samples():
    with pytest.raises(ValueError, match=r"shape is \(4,\), expected samples and at least one"):
        RandomDropout(0.5).encode(torch.ones(4), KEY)


CHAIN = cut_codecs(dropout=0.5, bits=8)["activation"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(7, dtype=torch.uint8)}, "packed codes have 7 bytes, expected 8"),
        ({"values": torch.zeros(8)}, "values are torch.float32"),
        ({"1.scale": torch.ones(3)}, "expected torch.float32 \\(2,\\)"),
        ({"1.scale": torch.tensor([1.0, -1.0])}, "negative or not finite"),
        ({"1.scale": None}, "wire tensor 'scale' is missing"),
        ({"values": None}, "wire tensor 'values' is missing"),
        ({"0.shape": "2,9999999999"}, "values have shape"),
        ({"0.shape": "8"}, "values have shape"),
        ({"0.shape": "2,-8"}, "metadata shape is"),
        ({"1.shape": None}, "metadata shape is None"),
        ({"1.dtype": "int8"}, "expected a dtype of"),
        ({"1.signed": "2"}, "signed 0 or 1"),
    ],
)
def test_broken_wire_data(change, message):
    good = CHAIN.encode(noise(2, 8, dtype=torch.float32), KEY)
    tensors, metadata = dict(good.tensors), dict(good.metadata)
    for name, value in change.items():
        target = metadata if name in metadata else tensors
        target.pop(name)
        if value is not None:
            target[name] = value
    with pytest.raises(ValueError, match=message):
        CHAIN.decode(Encoded(tensors, metadata), KEY)
