"""Silenced units against the physically smaller module."""

import torch
from torch import nn

from flwr_moe.split.prune import choose_kept, expand, shrink, silenced


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ).double()


def test_silenced_module_answers_as_the_smaller_one() -> None:
    net = conv_net()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    net(x)  # running statistics that are not those of a start
    kept = choose_kept(net, 0.5, prune_output=True)
    assert kept.share < 1
    wanted = expand(shrink(net, kept).eval()(x), kept)
    dense = net.eval()(x)
    net.load_state_dict(silenced(net.state_dict(), kept))
    torch.testing.assert_close(net.eval()(x), wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(dense, wanted)


def test_nothing_else_changes() -> None:
    net = conv_net()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    kept = choose_kept(net, 0.5, prune_output=True)
    new = silenced(net.state_dict(), kept)
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[key])
    positions = kept.positions()
    for key, tensor in new.items():
        part = tensor
        for dim, stays in positions.get(key, {}).items():
            part = part.index_select(dim, stays)
        whole = before[key]
        for dim, stays in positions.get(key, {}).items():
            whole = whole.index_select(dim, stays)
        assert torch.equal(part, whole)
    assert new["0.weight"].abs().sum((1, 2, 3)).count_nonzero() == len(positions["0.weight"][0])
