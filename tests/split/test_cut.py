"""Cutting plain PyTorch models: where, what the halves hold, and their gradients."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.split.cut import materialise, possible_cuts, split_model
from flwr_moe.tasks.models import MoEClassifier
from tests.split.halves import allocated_bytes, assert_same_step


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


class Residual(nn.Module):
    """Two residual blocks between a stem and a head; their ReLUs are called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(functional.relu(self.stem(x)))
        return self.head(h.mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm(self.conv1(x)))
        h = self.conv2(h)
        h += x
        return self.relu(h)


class Encoder(nn.Module):
    """A plain encoder whose every block uses a mask made from the token ids or given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Attention() for _ in range(3))
        self.head = nn.Linear(8, 20)
        self.unused = nn.Linear(2, 2)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            mask = ids != 0
        allowed = mask[:, None, :]
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h, allowed)
        return self.head(h)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.value = nn.Linear(8, 8)

    def forward(self, h: Tensor, allowed: Tensor) -> Tensor:
        scores = self.query(h) @ h.transpose(1, 2)
        weights = scores.masked_fill(~allowed, -1e9).softmax(-1)
        return h + weights @ self.value(h)


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
CLASSES = torch.tensor([0, 1, 4, 2])
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0], [9, 1, 2, 0]])


def class_loss(logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits, CLASSES)


def token_loss(logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), IDS.flatten())


def test_every_module_of_a_sequence_but_the_last_is_a_cut() -> None:
    assert possible_cuts(small_cnn(), IMAGES.float()) == list("01234567")


def test_gradients_of_a_cnn_are_those_of_the_whole_model() -> None:
    # "1" hands its output to a ReLU that works in place.
    assert_same_step(small_cnn(), [IMAGES], class_loss, ["0", "1", "3", "5", "7"])


def test_cuts_of_a_residual_network_spare_the_blocks() -> None:
    model = Residual()
    assert possible_cuts(model, IMAGES.float()) == ["stem", "blocks.0", "blocks.1"]
    assert_same_step(model, [IMAGES], class_loss, ["stem", "blocks.0", "blocks.1", "blocks"])
    message = "no cut after 'blocks.1.conv1': a connection skips it: the output of 'blocks.0' is"
    with pytest.raises(ValueError, match=message):
        split_model(model, "blocks.1.conv1")


def test_a_mask_crosses_as_context() -> None:
    model = Encoder()
    cuts = ["embed", "blocks.0", "blocks.1", "blocks.2"]
    given = {"ids": IDS, "mask": IDS < 9}
    assert possible_cuts(model, IDS) == possible_cuts(model, given) == cuts
    assert_same_step(model, [IDS], token_loss, cuts)
    assert_same_step(model, given, token_loss, cuts)
    with_ids = split_model(model, "blocks.0").client(IDS)
    assert [tensor.dtype for tensor in with_ids] == [torch.float64, torch.bool]
    assert torch.equal(with_ids[1].squeeze(1), IDS != 0)
    assert len(split_model(model, "blocks.2", IDS).client(IDS)) == 1


def test_what_the_forward_pass_leaves_out_belongs_to_the_server() -> None:
    server = split_model(Encoder(), "embed").server
    assert {"unused.weight", "unused.bias"} < set(server.state_dict())


def test_halves_share_their_tensors_with_the_model() -> None:
    model = small_cnn()
    split = split_model(model, "3")
    halves = {**split.client.state_dict(keep_vars=True), **split.server.state_dict(keep_vars=True)}
    assert all(halves[name] is tensor for name, tensor in model.state_dict(keep_vars=True).items())


def test_a_copied_half_is_its_own() -> None:
    split = split_model(small_cnn(), "3")
    twin = copy.deepcopy(split.server)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    x = torch.randn(4, 4, 4, 4)
    assert not torch.equal(twin(x), split.server(x))


def test_modes_of_the_halves_are_theirs() -> None:
    model = small_cnn()
    split = split_model(model, "3")
    assert split.client.training
    split.client.eval()
    split.client(IMAGES.float())
    assert not model[1].running_mean.any()
    split.client.train()
    split.client(IMAGES.float())
    assert model[1].running_mean.any()
    assert not split_model(small_cnn().eval(), "3").server.training


def test_a_module_that_looks_at_values_stays_in_one_piece() -> None:
    model = MoEClassifier(12, 5, 8, 8, num_experts=3, top_k=2)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    assert possible_cuts(model, x) == ["stem", "mix"]
    assert_same_step(model, [x.double()], class_loss, ["stem", "mix"])


def test_only_the_innermost_module_stays_in_one_piece() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(12, 12), nn.Sequential(Branching()), nn.Tanh())
    model = nn.Sequential(nn.Sequential(inner), nn.Linear(5, 5))
    x = torch.randn(4, 12).double()
    # Of the names of one place the outermost member of a sequence is listed; all can be used.
    assert possible_cuts(model.double(), x) == ["0.0.0", "0.0.1", "0"]
    assert_same_step(model, [x], class_loss, ["0.0.0", "0.0.1", "0.0.1.0", "0.0.2", "0"])
    with pytest.raises(ValueError, match=r"after '0\.0\.1\.0\.a'; possible, nearest first"):
        split_model(model, "0.0.1.0.a")


def test_a_constant_of_the_forward_pass_is_no_part_of_the_state() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 3), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + torch.arange(3)) + torch.arange(5)

    assert_same_step(Shifted(), [torch.randn(4, 12).double()], class_loss, ["a"])


def test_a_client_on_the_meta_device_allocates_its_half_only() -> None:
    full = small_cnn()
    with torch.device("meta"):
        model = small_cnn()
    split = split_model(model, "3")
    split.client.to_empty(device="cpu")
    mine = split_model(full, "3").client.state_dict()
    split.client.load_state_dict(mine)
    # Convolution 4·3·9 + 4, batch norm 4·4 floats and one int64 counter.
    assert allocated_bytes(split.client) == 4 * (112 + 16) + 8
    assert allocated_bytes(split.server) == 0
    assert allocated_bytes(model) == allocated_bytes(split.client)
    x = IMAGES.float()
    assert torch.equal(split.client(x)[0], full[:4](x))


def test_materialise_fills_a_half() -> None:
    full = small_cnn()
    with torch.device("meta"):
        split = split_model(small_cnn(), "3")
    state = split_model(full, "3").server.state_dict()
    materialise(split.server, state)
    assert allocated_bytes(split.client) == 0
    x = torch.randn(4, 4, 4, 4)
    assert torch.equal(split.server(x), full[4:](x))
    with torch.no_grad():
        next(split.server.parameters()).zero_()
    assert full[4].weight.any()
    with pytest.raises(ValueError, match=r"tensor '8.weight' has shape \(1,\), expected \(5, 24\)"):
        materialise(split.server, {**state, "8.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"tensor '0.bias' is not of this half"):
        materialise(split.server, {**state, "0.bias": torch.zeros(4)})


def test_a_weight_shared_inside_a_half_stays_shared() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(3)))
    model[1].weight = model[0].weight
    client = split_model(model, "1").client
    materialise(client, {"0.weight": torch.eye(3), "1.weight": torch.eye(3)})
    first, second = (client.get_submodule(name).weight for name in "01")
    assert first is second
    assert len(list(client.parameters())) == 1
    assert torch.equal(first, torch.eye(3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(12, 12, bias=False) for _ in range(3))
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.dropout(self.a(x), 0.5, training=self.training))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h if h.sum() > 0 else -h)


class TwoPaths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(12, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


@pytest.mark.parametrize(
    ("model", "at", "message"),
    [
        (small_cnn(), "9", "no cut after '9'; possible, nearest first: 0, 1, 2, 3, 4, 5, 6, 7"),
        (Residual(), "blocks.2", r"no cut after 'blocks.2'; .* first: blocks.[01], blocks.[01], s"),
        (small_cnn(), "8", "no cut after '8': there are no parameters after it, the server half"),
        (nn.Sequential(nn.Flatten(), nn.Linear(1, 1)), "0", "there are no parameters before it"),
        (Tied(), "middle", "shared weight, 'first.weight' before the cut is 'last.weight' after"),
        (Tied(), "x", "this model has no possible cut: .* shared weight"),
        (Functional(), "a", "Functional.forward does something else in training .* nn.Dropout"),
        (Branching(), "a", "cannot trace Branching.forward .* into a submodule"),
        (TwoPaths(), "a", "the model's input, or its size, is needed after it too"),
        (Recurrent(), "lstm", "it does not return a single tensor"),
    ],
)
def test_errors_take_one_line(model: nn.Module, at: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        split_model(model, at)
    assert "\n" not in str(error.value)


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="example_inputs do not go through the model: "):
        possible_cuts(small_cnn(), torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"example_inputs do not fit the model: .*'y'"):
        possible_cuts(Encoder(), {"ids": IDS, "y": IDS})


def test_possible_cuts_leaves_the_model_alone() -> None:
    model = small_cnn().eval()
    before = copy.deepcopy(model.state_dict())
    possible_cuts(model, IMAGES.float())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_no_need_of_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from torch import nn; from flwr_moe.split.cut import split_model\n"
        "print(split_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), '0').at)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
