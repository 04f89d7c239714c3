"""Pruning: the small module computes what the dense one does with the pruned units silenced."""

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from flwr_moe.split.prune import Kept, PruneSchedule, choose_kept, expand, put_back, shrink
from flwr_moe.split.prune_groups import find_groups
from tests.split.halves import take

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(model: nn.Module, seed: int = 3) -> nn.Module:
    """Fill every tensor at random, running statistics too, in float64."""
    model = model.double()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            draw = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.copy_(draw.abs() + 0.5 if name.endswith("running_var") else draw)
    return model


def vgg() -> nn.Module:
    return seeded(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 4, 3, bias=False),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(4 * 2 * 2, 10),
            nn.GELU(),
            nn.Linear(10, 5),
        )
    )


VGG_READERS = {"0": ("3", 1), "3": ("6", 1), "6": ("9", 4), "9": ("11", 1)}
"""Who reads a layer's units, and how many inputs a unit is there."""


def silence(model: nn.Module, kept: Kept, readers: dict[str, tuple[str, int]]) -> nn.Module:
    """Set to zero what the readers make of pruned units: they are gone, at full size."""
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for name, (reader, width) in readers.items():
            weight = silent.get_submodule(reader).weight
            for unit in range(weight.shape[1] // width):
                if unit not in kept.indices[name]:
                    weight[:, unit * width : (unit + 1) * width] = 0
    return silent


def test_choice_of_four_channels_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([3.0, -0.5, -4.0, 1.0]).reshape(4, 1, 1, 1))
        model[0].bias.copy_(torch.tensor([0.0, 9.0, 0.0, 9.0]))
    for rate, expected in [(0, (0, 1, 2, 3)), (0.25, (0, 2, 3)), (0.5, (0, 2)), (0.75, (2,))]:
        assert choose_kept(model, rate).indices == {"0": expected}


def test_magnitude_is_the_norm_of_all_weights_of_a_unit():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        # Norms 5 and sqrt(32): the largest single weight is not what counts.
        model[0].weight.copy_(torch.tensor([[5.0, 0.0], [4.0, 4.0]]))
    assert choose_kept(model, 0.5).indices == {"0": (1,)}


def two_layers(first: list[float], second: list[float]) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, len(first), 1),
        nn.Conv2d(len(first), len(second), 1),
        nn.Conv2d(len(second), 1, 1),
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(first).reshape(-1, 1, 1, 1))
        model[1].weight.zero_()
        model[1].weight[:, 0, 0, 0] = torch.tensor(second)
    return model


def test_uneven_layer_loses_more_than_an_even_one():
    even, uneven = [1.0] * 4, [100.0, 100.0, 1.0, 2.0]
    kept = choose_kept(two_layers(even, uneven), 0.25)
    assert kept.indices == {"0": (0, 1, 2, 3), "1": (0, 1)}


def test_no_layer_goes_below_the_floor():
    even, uneven = [1.0, 0.9, 1.1, 1.2], [100.0, 1.0, 1.0, 2.0]
    kept = choose_kept(two_layers(even, uneven), 0.375, min_kept=0.5)
    assert kept.indices == {"0": (0, 2, 3), "1": (0, 3)}
    kept = choose_kept(two_layers(even, uneven), 0.375, min_kept=0.25)
    assert kept.indices == {"0": (0, 1, 2, 3), "1": (0,)}
    # Above 1 - min_kept an even spread is the floor.
    kept = choose_kept(two_layers(even, uneven), 0.75, min_kept=0.5)
    assert kept.indices == {"0": (3,), "1": (0,)}


def test_large_layers_keep_multiples_of_eight_channels():
    # Of 96 channels 72 stay, the 24 weakest go: 11 of the first layer and 13 of the second would
    # leave 21 and 51. Below are 16 and 48; the one block of 8 that is missing goes to the first.
    first = [1.0] * 11 + [3.0] * 21
    second = [1.0] * 13 + [3.0] * 51
    kept = choose_kept(two_layers(first, second), 0.25)
    assert [len(units) for units in kept.indices.values()] == [24, 48]
    # 38 go at 0.4, all 24 weak ones and 14 others: 58 stay, and 56 is the nearest multiple.
    kept = choose_kept(two_layers(first, second), 0.4)
    assert sum(len(units) for units in kept.indices.values()) == 56
    assert all(len(units) % 8 == 0 for units in kept.indices.values())
    kept = choose_kept(two_layers([1.0] * 32, [1.0] * 64), 0.0)
    assert [len(units) for units in kept.indices.values()] == [32, 64]
    # A layer always keeps something.
    kept = choose_kept(two_layers([1.0] * 32, [1.0] * 64), 0.97)
    assert [len(units) for units in kept.indices.values()] == [8, 8]


def test_rate_by_group():
    kept = choose_kept(vgg(), {"3": 0.5, "9": 0.3})
    assert {name: len(units) for name, units in kept.indices.items()} == {
        "0": 6,
        "3": 4,
        "6": 4,
        "9": 7,
    }
    assert kept.share == 21 / 28


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
def test_small_vgg_equals_the_dense_one_with_silenced_units(rate, training):
    dense = vgg().train(training)
    kept = choose_kept(dense, rate)
    assert 0 < kept.share < 1
    silent, small = silence(dense, kept, VGG_READERS), shrink(dense, kept)
    assert small.training is training
    x = noise(5, 3, 8, 8)
    expected, found = silent(x), small(x)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(found, dense(x))

    expected.square().sum().backward()
    found.square().sum().backward()
    gradients = {name: p.grad for name, p in silent.named_parameters()}
    for name, gradient in take(gradients, kept).items():
        torch.testing.assert_close(small.get_parameter(name).grad, gradient, **CLOSE)
    running = take(silent.state_dict(), kept)
    for name, buffer in small.named_buffers():
        torch.testing.assert_close(buffer, running[name], **CLOSE)


def test_sizes_of_the_small_layers():
    model = vgg()
    kept = choose_kept(model, {"0": 0.5, "3": 0.25, "6": 0.5, "9": 0.4})
    small = shrink(model, kept)
    assert [tuple(small[i].weight.shape) for i in (0, 1, 3, 6, 9, 11)] == [
        (3, 3, 3, 3),
        (3,),
        (6, 3, 3, 3),
        (2, 6, 3, 3),
        (6, 2 * 4),
        (5, 6),
    ]
    assert (small[3].in_channels, small[3].out_channels) == (3, 6)
    assert (small[9].in_features, small[9].out_features, small[1].num_features) == (8, 6, 3)
    assert model[3].weight.shape == (8, 6, 3, 3)


def test_rate_zero_is_a_copy():
    model = vgg().eval()
    kept = choose_kept(model, 0)
    small = shrink(model, kept)
    assert kept.share == 1
    assert torch.equal(small(noise(2, 3, 8, 8)), model(noise(2, 3, 8, 8)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(small.state_dict()[name], tensor)
        assert small.state_dict()[name].data_ptr() != tensor.data_ptr()


def test_take_is_the_state_of_the_small_module():
    model = vgg()
    kept = choose_kept(model, 0.5)
    taken, small = take(model.state_dict(), kept), shrink(model, kept).state_dict()
    assert taken.keys() == small.keys()
    assert all(torch.equal(taken[name], small[name]) for name in taken)


def test_putting_back_what_was_taken_changes_nothing():
    model = vgg()
    before = copy.deepcopy(model.state_dict())
    kept = choose_kept(model, 0.5)
    state = model.state_dict()
    assert put_back(state, take(state, kept), kept) is state
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_put_back_writes_kept_entries_only():
    model = vgg()
    kept = choose_kept(model, 0.5)
    before = copy.deepcopy(model.state_dict())
    trained = {k: t + 1 for k, t in take(before, kept).items()}
    put_back(model.state_dict(), trained, kept)
    rows, columns = list(kept.indices["3"]), list(kept.indices["0"])
    change = model[3].weight.detach() - before["3.weight"]
    expected = torch.zeros(8, 6, 3, 3, dtype=torch.float64)
    for row in rows:
        for column in columns:
            expected[row, column] = 1
    torch.testing.assert_close(change, expected, **CLOSE)
    assert torch.equal(model[1].num_batches_tracked, before["1.num_batches_tracked"] + 1)


def test_pruned_units_can_return():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
    kept = choose_kept(model, 0.5)
    assert kept.indices == {"0": (1,)}
    small = shrink(model, kept)
    with torch.no_grad():
        small[0].weight.fill_(0.5)
    put_back(model.state_dict(), small.state_dict(), kept)
    assert model[0].weight.tolist() == [[1.0], [0.5]]
    assert choose_kept(model, 0.5).indices == {"0": (0,)}


def test_flops_fall():
    model, x = vgg(), noise(2, 3, 8, 8)
    counts = []
    for rate in (0, 0.25, 0.5):
        small = shrink(model, choose_kept(model, rate))
        with FlopCounterMode(display=False) as counter:
            small(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.8 * counts[0]
    assert counts[2] < 0.5 * counts[0]


def test_output_units_only_on_request():
    model = seeded(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()
    assert find_groups(model) == ()
    assert choose_kept(model, 0).share == 1
    kept = choose_kept(model, 0.5, prune_output=True)
    x = noise(3, 2, 6, 6)
    activation = shrink(model, kept)(x)
    assert activation.shape == (3, 2, 4, 4)
    whole = expand(activation, kept)
    expected = model(x)
    for unit in range(4):
        if unit not in kept.indices["0"]:
            expected[:, unit] = 0
    torch.testing.assert_close(whole, expected, **CLOSE)


def test_expand_lets_gradients_through_to_kept_units():
    model = nn.Sequential(nn.Linear(3, 4))
    kept = Kept.of(find_groups(model, prune_output=True), {"0": [1, 3]})
    activation = noise(2, 2).requires_grad_()
    (expand(activation, kept) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert activation.grad.tolist() == [[2.0, 4.0], [2.0, 4.0]]
    with pytest.raises(ValueError, match=r"activation has shape \(2, 3\), expected 2 along -1"):
        expand(noise(2, 3), kept)


def test_expand_without_pruned_output_is_the_input():
    x = noise(2, 4)
    assert expand(x, choose_kept(vgg(), 0.5)) is x


class Named(nn.Module):
    """A wrapper with dotted names, functional calls and flattening by view."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3))
        self.head = nn.Linear(6 * 4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.max_pool2d(self.features(x), 2)
        return self.head(torch.relu(y).view(y.size(0), -1)), x


class Functional(nn.Module):
    """Spells the same in other words."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3))
        self.head = nn.Linear(6 * 4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = nn.functional.max_pool2d(nn.functional.relu(self.features(x)), 2)
        return self.head(torch.flatten(y, start_dim=1)), x


class ByShape(Functional):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = nn.functional.max_pool2d(self.features(x).relu(), kernel_size=2)
        return self.head(y.reshape(y.shape[0], -1)), x


def test_wrappers_and_graph_modules_with_several_outputs():
    named = seeded(Named())
    for model in (named, fx.symbolic_trace(named), seeded(Functional()), seeded(ByShape())):
        kept = choose_kept(model, 0.5)
        assert set(kept.indices) == {"features.0", "features.2"}
        readers = {"features.0": ("features.2", 1), "features.2": ("head", 4)}
        x = noise(2, 3, 8, 8)
        expected = silence(model, kept, readers)(x)[0]
        torch.testing.assert_close(shrink(model, kept)(x)[0], expected, **CLOSE)
        # The output's first tensor is the activation.
        assert find_groups(model, prune_output=True)[-1].output_dim == -1


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.inner = nn.Conv2d(4, 6, 1)
        self.outer = nn.Conv2d(6, 4, 1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.deep = nn.Conv2d(4, 4, 1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.outer(torch.relu(self.inner(x)))
        return self.deep(self.twice(self.twice(x)))


def test_units_read_in_unknown_ways_are_not_offered():
    assert [group.name for group in find_groups(Residual(), prune_output=True)] == ["inner"]


class ReadsAWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) @ self.first.weight.T


def test_layers_whose_weight_is_read_directly_are_not_offered():
    assert find_groups(ReadsAWeight()) == ()


def test_tied_weights_are_not_offered():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    model[2].weight = model[0].weight
    assert find_groups(model) == ()


def test_nothing_to_prune():
    with pytest.raises(ValueError, match="Embedding has nothing to prune, expected convolutions"):
        choose_kept(nn.Embedding(3, 4), 0.5)


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan")])
def test_rate_out_of_range(rate):
    for call in (
        lambda: choose_kept(vgg(), rate),
        lambda: PruneSchedule(rate),
    ):
        with pytest.raises(ValueError, match=rf"rate is {rate}, expected at least 0 and below 1"):
            call()
    with pytest.raises(ValueError, match=rf"3 is {rate}, expected at least 0 and below 1"):
        choose_kept(vgg(), {"3": rate})


def test_other_bad_input():
    model = vgg()
    with pytest.raises(ValueError, match="min_kept is 0, expected above 0 and up to 1"):
        choose_kept(model, 0.5, min_kept=0)
    with pytest.raises(ValueError, match="group 'x' is unknown, expected one of"):
        choose_kept(model, {"x": 0.5})
    groups = find_groups(model)
    for units in ([], [1, 0], [1, 1], [-1, 2], [5, 6]):
        with pytest.raises(ValueError, match="group '0' keeps"):
            Kept.of(groups, {"0": units})
    kept = choose_kept(model, 0.5)
    with pytest.raises(ValueError, match=r"tensor '0\.bias' is in one state only"):
        small = take(model.state_dict(), kept)
        del small["0.bias"]
        put_back(model.state_dict(), small, kept)
    with pytest.raises(ValueError, match=r"tensor '0\.weight' has shape \(6, 3, 3, 3\), expected"):
        put_back(model.state_dict(), model.state_dict(), kept)


def test_schedule_by_hand():
    schedule = PruneSchedule(0.6, start_round=3, ramp_rounds=2, every=2)
    assert [schedule.chooses(t) for t in range(1, 8)] == [
        False, False, True, False, True, False, True,
    ]  # fmt: skip
    rates = [round(schedule.rate_in(t), 9) for t in range(1, 8)]
    assert rates == [0, 0, 0.2, 0.2, 0.6, 0.6, 0.6]
    assert PruneSchedule(0.5).rate_in(1) == 0.5
    assert not PruneSchedule(0.0).chooses(1)
    with pytest.raises(ValueError, match="every is 0, expected at least 1"):
        PruneSchedule(0.5, every=0)
