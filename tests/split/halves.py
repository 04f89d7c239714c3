"""One training step in two halves, and the same step on the whole model."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flwr_moe.split.codecs import Chain, Quantise, RandomDropout
from flwr_moe.split.cut import split_model
from flwr_moe.split.prune import Kept

Loss = Callable[[Tensor], Tensor]


def tensor_of(output: Any) -> Tensor:
    """Return the tensor among the outputs of a model of transformers, or the output itself."""
    if isinstance(output, Tensor):
        return output
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def assert_same_step(
    model: nn.Module,
    inputs: Sequence[Any] | dict[str, Any],
    loss_of: Loss,
    cuts: Sequence[str],
) -> None:
    """Compare loss, gradients and buffers of a step at each cut with the whole model, bitwise."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})
    model = model.double().train()
    whole = copy.deepcopy(model)
    expected = loss_of(tensor_of(whole(*args, **kwargs)))
    expected.backward()
    assert any(
        parameter.grad.any() for parameter in whole.parameters() if parameter.grad is not None
    )
    for at in cuts:
        mine = copy.deepcopy(model)
        split = split_model(mine, at, inputs)
        assert split.at == at

        client_keys, server_keys = set(split.client.state_dict()), set(split.server.state_dict())
        assert client_keys
        assert server_keys
        assert not client_keys & server_keys
        assert client_keys | server_keys == set(model.state_dict())

        activation, *context = split.client(*args, **kwargs)
        assert not any(tensor.requires_grad for tensor in context)
        arrived = activation.detach().requires_grad_()
        loss = loss_of(split.server(arrived, *context))
        loss.backward()
        activation.backward(arrived.grad)

        assert torch.equal(loss, expected), at
        for (name, a), b in zip(whole.named_parameters(), mine.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), (at, name)
            assert a.grad is None or torch.equal(a.grad, b.grad), (at, name)
        for (name, a), b in zip(whole.named_buffers(), mine.buffers(), strict=True):
            assert torch.equal(a, b), (at, name)


def take(state: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Copy the kept part of a dense state."""
    small, positions = {}, kept.positions()
    for name, tensor in state.items():
        small[name] = tensor.detach().clone()
        for dim, places in positions.get(name, {}).items():
            small[name] = small[name].index_select(dim, places)
    return small


def wire_bytes(chain: Chain, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
    """Bytes that a chain of dropout and quantisation sends for a tensor, by its formula."""
    size, bits = math.prod(shape[1:]), 8 * dtype.itemsize
    scales = 0
    for codec in chain.codecs:
        if isinstance(codec, RandomDropout):
            size = min(size, max(1, round(size * (1 - codec.p))))
        if isinstance(codec, Quantise):
            bits, scales = codec.bits, shape[0]
    return -(-shape[0] * size * bits // 8) + 4 * scales


def allocated_bytes(module: nn.Module) -> int:
    """Bytes of all tensors of a module that are not on the meta device."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors if not t.is_meta)
