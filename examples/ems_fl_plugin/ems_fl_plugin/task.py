"""A model with experts as one would write it, and wine cultivars as clusters see them."""

import torch
from sklearn.datasets import load_wine
from torch import nn

from flwr_moe.experts import ExpertLayout, SparseMoE
from flwr_moe.training import Samples

NUM_EXPERTS, NUM_CLUSTERS = 6, 2


class Net(nn.Module):
    """Thirteen measurements in, three cultivars out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(13, 32)
        self.moe = SparseMoE(32, 32, NUM_EXPERTS)
        self.head = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, 13) to logits (B, 3)."""
        h = torch.relu(self.stem(x))
        return self.head(h + self.moe(h))


def layout() -> ExpertLayout:
    """Tell which tensor belongs to which expert."""
    with torch.device("meta"):
        return ExpertLayout.of(Net())


def load_data(cluster: int, test: bool = False) -> Samples:
    """Return a cluster's samples; the second one's instruments read upside down."""
    x, y = load_wine(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0) * (1 if cluster % NUM_CLUSTERS == 0 else -1)
    chosen = torch.arange(len(y)) % 5 == 0
    chosen = chosen if test else ~chosen
    return Samples(torch.tensor(x, dtype=torch.float32)[chosen], torch.tensor(y)[chosen])
