"""Random tokens for tiny models of transformers, and their training written out by hand."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.experts import ExpertLayout
from flwr_moe.experts.families import repair_nllb
from flwr_moe.training import Samples
from tests.experts.test_families import CONFIGS, TEXT_TO_TEXT, VOCABULARY

STEPS, BATCH, RATE = 2, 3, 0.01
TRAIN = {
    "seed": 4,
    "learning-rate": RATE,
    "batch-size": BATCH,
    "local-steps": STEPS,
    "max-local-steps": STEPS,
}


class Speaker(nn.Module):
    """Maps tokens (B, T) to logits (B, T, V)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        kind, config = CONFIGS[name]
        self.inner = kind(copy.deepcopy(config))
        self.both = name in TEXT_TO_TEXT
        repair_nllb(self.inner)

    def forward(self, x: Tensor) -> Tensor:
        more = {"decoder_input_ids": x} if self.both else {}
        return self.inner(input_ids=x, **more).logits


class Tokens:
    """Every client has a few random sequences; client p belongs to cluster p mod clusters."""

    num_classes, own_tests = VOCABULARY, False

    def __init__(self, name: str, num_clients: int, num_clusters: int) -> None:
        self.name = name
        self.num_clients, self.num_clusters = num_clients, num_clusters

    def cluster_of(self, partition_id: int) -> int:
        return partition_id % self.num_clusters

    def draw(self, size: int, seed: int) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(3, VOCABULARY, (size, 6), generator=generator)
        return Samples(x[:, :-1], x[:, 1:])

    def train_data(self, partition_id: int) -> Samples:
        return self.draw(4 + 2 * partition_id, partition_id)

    def client_test_data(self, partition_id: int) -> Samples:
        return self.draw(3, 50 + partition_id)

    def public_data(self) -> Samples:
        return self.draw(3, 99)

    def test_data(self) -> list[Samples]:
        return [self.draw(3, 100 + k) for k in range(self.num_clusters)]

    def build_model(self) -> Speaker:
        return Speaker(self.name)

    def warm_model(self) -> Speaker:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build_model()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            # Far from the first weights, whose outputs hardly depend on the experts.
            for tensor in model.state_dict().values():
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
        return model


def train_by_hand(model: nn.Module, data: Samples, seed: int, trainable: list[Tensor]) -> nn.Module:
    """Adam on batches drawn by the seed; whatever is not trainable stays."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is other for other in trainable))
    optimiser = torch.optim.Adam(trainable, lr=RATE, fused=True)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(STEPS):
            batch = torch.randint(len(data), (BATCH,), generator=generator)
            logits = model(data.x[batch])
            optimiser.zero_grad()
            functional.cross_entropy(logits.flatten(0, 1), data.y[batch].flatten()).backward()
            optimiser.step()
    return model


def parameters_of_experts(model: nn.Module, layout: ExpertLayout) -> list[Tensor]:
    homes = tuple(f"{layer.experts}." for layer in layout.moe_layers)
    return [p for name, p in model.named_parameters() if name.startswith(homes)]
