"""Two small models with experts: a list of modules (as Mixtral had them), and fused tensors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flwr_moe.experts import ExpertLayout, SparseMoE
from flwr_moe.experts.families import family_named
from flwr_moe.experts.restrict import gate_logits

WIDTH, HIDDEN, CLASSES = 6, 10, 3
EXPERTS = (5, 4)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class ListBlock(nn.Module):
    """Top-2 block that loops over its experts and keeps their number as an attribute."""

    def __init__(self, width: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, 2
        self.gate = nn.Linear(width, num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(width, hidden) for _ in range(num_experts))

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_Tk, chosen_Tk = self.gate(x_TD).softmax(-1).topk(self.top_k, -1)
        weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True)
        y_TD = torch.zeros_like(x_TD)
        for e in range(self.num_experts):
            weight_T = (weights_Tk * (chosen_Tk == e)).sum(-1)
            y_TD = y_TD + weight_T[:, None] * self.experts[e](x_TD)
        return y_TD


class Net(nn.Module):
    """Two residual blocks with different numbers of experts between dense layers."""

    def __init__(self, block: Callable[[int, int, int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(block(WIDTH, HIDDEN, n) for n in EXPERTS)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


BLOCKS = {"list": ListBlock, "fused": SparseMoE}
both_kinds = pytest.mark.parametrize("kind", list(BLOCKS))


def build(kind: str, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(BLOCKS[kind]).double()


@torch.no_grad()
def gate_probabilities(model: nn.Module, layout: ExpertLayout, *args: object, **inputs: object):
    """Probabilities (T, E) of every layer, float64, from what the full model's gates return."""
    seen: list[Tensor] = []
    handles = []
    for layer in layout.moe_layers:

        def hook(module, args, output, layer=layer):
            logits_TE = gate_logits(output, layer).reshape(-1, layer.num_experts).double()
            seen.append(family_named(layer.family).probabilities(logits_TE))

        handles.append(model.get_submodule(layer.gate).register_forward_hook(hook))
    model.eval()(*args, **inputs)
    for handle in handles:
        handle.remove()
    return [probs_TE.numpy() for probs_TE in seen]
