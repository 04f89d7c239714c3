"""VGG: sizes by hand, where it can be cut, and that nothing depends on the batch."""

import pytest
import torch
from torch import fx, nn

from flwr_moe.tasks.vgg import VGG


def count(model):
    return sum(p.numel() for p in model.parameters())


def vgg19_by_hand(norm):
    convolutions = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256)] + [(256, 256)] * 3
    convolutions += [(256, 512)] + [(512, 512)] * 7
    assert len(convolutions) == 16
    total = sum(9 * before * after + after for before, after in convolutions)
    total += sum(2 * after for _, after in convolutions) if norm != "none" else 0
    return total + 512 * 10 + 10


@pytest.mark.parametrize(
    ("norm", "known"), [("none", 20_029_514), ("batch", 20_040_522), ("group", 20_040_522)]
)
def test_vgg19_has_the_known_number_of_parameters(norm, known):
    with torch.device("meta"):
        assert count(VGG("vgg19", norm=norm)) == vgg19_by_hand(norm) == known


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [("vgg-small", 4), ("vgg11", 8), ("vgg13", 10), ("vgg16", 13), ("vgg19", 16)],
)
def test_depth_pooling_and_output(name, convolutions):
    model = VGG(name, num_classes=7, width=0.125)
    assert [n for n, _ in model.features.named_children()] == [str(i) for i in range(convolutions)]
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convolutions
    pools = sum(isinstance(m, nn.MaxPool2d) for m in model.modules())
    assert pools == (4 if name == "vgg-small" else 5)
    x = torch.randn(2, 3, 32, 32)
    assert model.features(x).shape[2:] == (32 // 2**pools,) * 2
    assert model(x).shape == (2, 7)


def test_width_scales_channels_in_eights():
    widths = [block.conv.out_channels for block in VGG("vgg-small", width=0.3).features]
    # 9.6, 19.2, 38.4 to the nearest multiples of 8.
    assert widths == [8, 16, 40, 40]


def test_block_order_and_names():
    model = VGG("vgg-small")
    assert [n for n, _ in model.features[0].named_children()] == ["conv", "norm", "relu", "pool"]
    assert not any(getattr(m, "inplace", False) for m in model.modules())
    assert "features.3.conv.weight" in model.state_dict()
    # Without a norm and without pooling after the first of two convolutions.
    bare = VGG("vgg13", width=0.125, norm="none").features[0]
    assert [n for n, _ in bare.named_children()] == ["conv", "relu"]


def test_running_block_after_block_is_the_whole_and_fx_traces_it():
    torch.manual_seed(0)
    model = VGG("vgg11", width=0.125)
    x = torch.randn(3, 3, 32, 32)
    whole = model(x)
    traced = fx.symbolic_trace(model)
    assert torch.equal(traced(x), whole)
    h = x
    for block in model.features:
        h = block(h)
    assert torch.equal(model.classifier(h.mean((2, 3))), whole)


def test_a_sample_does_not_see_its_batch_with_group_normalisation():
    torch.manual_seed(0)
    x = torch.randn(8, 3, 32, 32)
    group, batch = VGG("vgg-small", norm="group"), VGG("vgg-small", norm="batch")
    assert torch.allclose(group(x)[:1], group(x[:1]), atol=1e-5)
    assert not torch.allclose(batch(x)[:1], batch(x[:1]), atol=1e-2)
    assert not list(group.buffers()) and list(batch.buffers())


def test_gradients_reach_the_first_of_sixteen_layers():
    torch.manual_seed(0)
    model = VGG("vgg19", width=0.125, norm="none")
    x = torch.randn(4, 3, 32, 32)
    model(x).square().mean().backward()
    assert model.features[0].conv.weight.grad.norm() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "vgg12"}, "model is 'vgg12', expected one of vgg-small, vgg11"),
        ({"norm": "layer"}, "norm is 'layer', expected one of batch, group, none"),
        ({"width": 0.0}, "width is 0.0, expected above 0"),
        ({"width": float("nan")}, "width is nan, expected above 0"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        VGG(**settings)
