"""Models of the built-in tasks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flwr_moe.experts import SparseMoE


class MoEClassifier(nn.Module):
    """A stem, one residual mixture-of-experts block, and a linear head.

    Parameters
    ----------
    num_inputs, num_classes : int
        Numbers in one sample, and classes.
    d_model, d_hidden : int
        Width of the features and of every expert.
    num_experts, top_k : int
        Experts, and experts a sample is sent to.
    """

    def __init__(
        self,
        num_inputs: int,
        num_classes: int,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        top_k: int,
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(num_inputs, d_model)
        self.moe = SparseMoE(d_model, d_hidden, num_experts, top_k)
        # A name for the residual sum, so that the model can be cut there.
        self.mix = nn.Identity()
        self.head = nn.Linear(d_model, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (B, ...) to logits (B, classes)."""
        h_BD = torch.relu(self.stem(x.flatten(1)))
        logits: Tensor = self.head(self.mix(h_BD + self.moe(h_BD)))
        return logits


class DenseClassifier(nn.Module):
    """The dense model that :class:`MoEClassifier` is upcycled from."""

    def __init__(self, num_inputs: int, num_classes: int, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.stem = nn.Linear(num_inputs, d_model)
        self.up = nn.Linear(d_model, d_hidden)
        self.down = nn.Linear(d_hidden, d_model)
        self.head = nn.Linear(d_model, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (B, ...) to logits (B, classes)."""
        h_BD = torch.relu(self.stem(x.flatten(1)))
        return self.head(h_BD + self.down(torch.relu(self.up(h_BD))))

    def upcycled(
        self, num_experts: int, top_k: int, noise: float, generator: torch.Generator
    ) -> MoEClassifier:
        """Return a mixture whose experts all start as this model's feed-forward block.

        Parameters
        ----------
        num_experts, top_k : int
            Experts, and experts a sample is sent to.
        noise : float
            Relative noise that tells the experts apart.
        generator : torch.Generator
            Source of the noise.
        """
        model = MoEClassifier(
            self.stem.in_features,
            self.head.out_features,
            self.up.in_features,
            self.up.out_features,
            num_experts,
            top_k,
        )
        model.moe = SparseMoE.upcycle(self.up, self.down, num_experts, top_k, noise, generator)
        model.stem.load_state_dict(self.stem.state_dict())
        model.head.load_state_dict(self.head.state_dict())
        return model
