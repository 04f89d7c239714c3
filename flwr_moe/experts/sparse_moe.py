"""A sparsely activated feed-forward block: top-k gate, fused experts, exact dispatch.

Dimension suffixes: T tokens, D model width, H hidden width, O output width, E experts,
k experts a token goes to, C rows of an expert's buffer, N = T * k routed rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.checks import check_numbers

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
}


class FusedExperts(nn.Module):
    """The feed-forward experts of one block, stacked along dim 0.

    Parameters
    ----------
    num_experts, d_model, d_hidden, d_out : int
        E, D, H and O; ``w1`` is (E, D, H), ``b1`` (E, H), ``w2`` (E, H, O), ``b2`` (E, O).
    activation : str
        ``"relu"`` or ``"gelu"``.
    """

    def __init__(
        self, num_experts: int, d_model: int, d_hidden: int, d_out: int, activation: str
    ) -> None:
        super().__init__()
        self.activation = activation
        self.w1 = nn.Parameter(torch.empty(num_experts, d_model, d_hidden))
        self.b1 = nn.Parameter(torch.empty(num_experts, d_hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, d_hidden, d_out))
        self.b2 = nn.Parameter(torch.empty(num_experts, d_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every expert as ``nn.Linear`` draws its weights: uniform in ±1/sqrt(fan in)."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x_ECD: Tensor) -> Tensor:
        """Run expert e on rows ``x_ECD[e]``; returns (E, C, O)."""
        hidden_ECH = torch.baddbmm(self.b1.unsqueeze(1), x_ECD, self.w1)
        hidden_ECH = ACTIVATIONS[self.activation](hidden_ECH)
        return torch.baddbmm(self.b2.unsqueeze(1), hidden_ECH, self.w2)


class RoutedBlock(nn.Module):
    """What blocks with a top-k gate have in common: the routing, its counters and its loss.

    The gate is a softmax over all experts; the k largest probabilities are renormalised to sum
    to one and weight the experts' answers (Shazeer et al. 2017, with the order of softmax and
    top-k of Mixtral, Jiang et al. 2024; both orders give the same weights).

    Parameters
    ----------
    num_experts, top_k : int
        Experts E, and how many of them a token is sent to, at most all there are.

    Attributes
    ----------
    tokens_per_expert : Tensor
        (E,) int64, tokens sent to each expert since the last `reset_counters`, in training and
        evaluation alike; not part of the state dict.

    Raises
    ------
    ValueError
        If one of them is below one.
    """

    tokens_per_expert: Tensor

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        check_numbers(least=1, num_experts=num_experts, top_k=top_k)
        self.top_k = top_k
        counters_E = torch.zeros(num_experts, dtype=torch.int64)
        self.register_buffer("tokens_per_expert", counters_E, persistent=False)
        # Gate probabilities (T, E), routed rows (E,) and unmasked experts (E,) of the last pass.
        self._routing: tuple[Tensor, Tensor, Tensor] | None = None

    def route(self, logits_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the experts of every token, and count them.

        Returns
        -------
        tuple of Tensor
            Experts (T, k), their weights (T, k), and routed rows by expert (E,), with
            ``k = min(top_k, E)``.
        """
        num_experts = logits_TE.shape[-1]
        gate_probs_TE = logits_TE.softmax(-1)
        top_probs_Tk, expert_Tk = gate_probs_TE.topk(min(self.top_k, num_experts), -1)
        weight_Tk = top_probs_Tk / top_probs_Tk.sum(-1, keepdim=True)

        with torch.no_grad():
            # A gate restricted from outside says -inf: such an expert may still fill up the top k
            # with weight zero, and must not count, so that a cut block gives the same loss.
            active_E = (logits_TE != -torch.inf).any(0)
            routed_E = torch.bincount(expert_Tk.flatten(), minlength=num_experts)
            count_E = routed_E * active_E
            self.tokens_per_expert += count_E
        self._routing = (gate_probs_TE, count_E, active_E)
        return expert_Tk, weight_Tk, routed_E

    @property
    def load_balance_loss(self) -> Tensor:
        """Differentiable load-balance loss of the last forward pass, a scalar.

        ``E * sum_e f_e * P_e`` with f_e the share of all routed rows that went to expert e and
        P_e its mean gate probability (Fedus et al. 2022, Eqs. 4-6; for k > 1 rows are counted
        over all k choices, so a perfect balance gives 1 for every k). Experts a restricted gate
        excludes count neither in E nor in f.

        Raises
        ------
        ValueError
            If there has been no forward pass yet.
        """
        if self._routing is None:
            raise ValueError("load_balance_loss needs a forward pass first")
        gate_probs_TE, count_E, active_E = self._routing
        share_E = count_E / count_E.sum().clamp(min=1)
        mean_prob_E = gate_probs_TE.sum(0) / max(len(gate_probs_TE), 1)
        return active_E.sum() * (share_E.to(mean_prob_E.dtype) * mean_prob_E).sum()

    def reset_counters(self) -> None:
        """Set `tokens_per_expert` to zero."""
        self.tokens_per_expert.zero_()

    def __getstate__(self) -> dict[str, Any]:
        # The last routing belongs to an autograd graph, which can be neither copied nor pickled.
        return {**self.__dict__, "_routing": None}


class SparseMoE(RoutedBlock):
    """Top-k routed feed-forward block; no token is ever dropped.

    The number of experts is read from the tensors' shapes, so a block whose tensors were cut to
    fewer experts works as it is, with ``min(top_k, num_experts)`` experts a token.

    Parameters
    ----------
    d_model, d_hidden : int
        Width of the input and of each expert's hidden layer.
    num_experts : int
        Number of experts E.
    top_k : int
        Experts a token is sent to, at most all there are.
    activation : str
        ``"relu"`` or ``"gelu"``.
    d_out : int, optional
        Width of the output; `d_model` by default.

    Raises
    ------
    ValueError
        If a size or `top_k` is below one or the activation is unknown.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: str = "relu",
        d_out: int | None = None,
    ) -> None:
        super().__init__(num_experts, top_k)
        d_out = d_model if d_out is None else d_out
        check_numbers(least=1, d_model=d_model, d_hidden=d_hidden, d_out=d_out)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, expected one of {list(ACTIVATIONS)}")
        self.gate = nn.Linear(d_model, num_experts)
        self.experts = FusedExperts(num_experts, d_model, d_hidden, d_out, activation)

    @property
    def num_experts(self) -> int:
        """Number of experts the block holds now."""
        return self.experts.w1.shape[0]

    @classmethod
    def upcycle(
        cls,
        linear1: nn.Linear,
        linear2: nn.Linear,
        num_experts: int,
        top_k: int = 2,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
        *,
        activation: str = "relu",
    ) -> Self:
        """Make a block whose experts all start as a dense one: ``linear2(act(linear1(x)))``.

        Sparse upcycling (Komatsuzaki et al. 2023); the noise that breaks the symmetry between
        the experts is ours. With ``noise=0`` the block computes what the dense one does,
        whatever the gate says.

        Parameters
        ----------
        linear1, linear2 : nn.Linear
            The dense block; copied, not changed.
        num_experts, top_k : int
            See `SparseMoE`.
        noise : float
            Standard deviation of the normal noise, relative to each tensor's root mean square.
        generator : torch.Generator, optional
            Source of the noise and of the gate's first weights.
        activation : str
            ``"relu"`` or ``"gelu"``.

        Raises
        ------
        ValueError
            If the two layers do not fit each other or `noise` is negative.
        """
        if linear1.out_features != linear2.in_features:
            raise ValueError(
                f"linear2 takes {linear2.in_features} features, expected the "
                f"{linear1.out_features} that linear1 gives"
            )
        check_numbers(least=0, noise=noise)
        block = cls(
            linear1.in_features,
            linear1.out_features,
            num_experts,
            top_k,
            activation=activation,
            d_out=linear2.out_features,
        ).to(linear1.weight)
        experts = block.experts
        with torch.no_grad():
            for linear, weight, bias in (
                (linear1, experts.w1, experts.b1),
                (linear2, experts.w2, experts.b2),
            ):
                dense_bias = torch.zeros_like(bias[0]) if linear.bias is None else linear.bias
                for fused, dense in ((weight, linear.weight.T), (bias, dense_bias)):
                    rms = dense.square().mean().sqrt()
                    fused.normal_(generator=generator).mul_(noise * rms).add_(dense)
            bound = 1 / math.sqrt(linear1.in_features)
            block.gate.weight.uniform_(-bound, bound, generator=generator)
            block.gate.bias.zero_()
        return block

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., O)."""
        x_TD = x.reshape(-1, x.shape[-1])
        expert_Tk, weight_Tk, routed_E = self.route(self.gate(x_TD))

        # Sorting only pays when there is an expert to leave out: with all of them chosen, running
        # every expert on every token is the same work, measured 1.4 times faster on small batches.
        if expert_Tk.shape[1] == self.num_experts:
            y_TO = self._all_experts(x_TD, expert_Tk, weight_Tk)
        else:
            y_TO = run_chosen(self.experts, x_TD, expert_Tk, weight_Tk, routed_E)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def _all_experts(self, x_TD: Tensor, expert_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
        """Run every expert on every token, for tokens that all go to every expert."""
        weight_TE = torch.empty_like(weight_Tk).scatter(1, expert_Tk, weight_Tk)
        y_ETO = self.experts(x_TD.expand(self.num_experts, -1, -1))
        return torch.bmm(weight_TE.unsqueeze(1), y_ETO.transpose(0, 1)).squeeze(1)


def run_chosen(
    experts: Callable[[Tensor], Tensor],
    x_TD: Tensor,
    expert_Tk: Tensor,
    weight_Tk: Tensor,
    routed_E: Tensor,
) -> Tensor:
    """Sort the routed rows by expert, run each expert on its own rows, put them back.

    Parameters
    ----------
    experts : callable
        Maps one buffer of rows per expert, (E, C, D), to (E, C, O).
    x_TD : Tensor
        Inputs (T, D).
    expert_Tk, weight_Tk, routed_E : Tensor
        As `RoutedBlock.route` gives them.

    Returns
    -------
    Tensor
        (T, O), the weighted sum of the chosen experts' answers.
    """
    num_experts, k = len(routed_E), expert_Tk.shape[1]
    expert_N = expert_Tk.flatten()
    sorted_expert_N, order_N = expert_N.sort(stable=True)
    capacity = int(routed_E.max())
    first_E = routed_E.cumsum(0) - routed_E
    rank_N = torch.arange(len(order_N), device=order_N.device) - first_E[sorted_expert_N]
    sorted_slot_N = sorted_expert_N * capacity + rank_N

    rows_ND = x_TD.index_select(0, order_N // k)
    buffer_SD = x_TD.new_zeros(num_experts * capacity, x_TD.shape[-1])
    buffer_SD = buffer_SD.index_copy(0, sorted_slot_N, rows_ND)
    y_ECO = experts(buffer_SD.view(num_experts, capacity, x_TD.shape[-1]))

    slot_N = torch.empty_like(sorted_slot_N).scatter_(0, order_N, sorted_slot_N)
    chosen_NO = y_ECO.flatten(0, 1).index_select(0, slot_N)
    return torch.bmm(weight_Tk.unsqueeze(1), chosen_NO.view(-1, k, y_ECO.shape[-1])).squeeze(1)
