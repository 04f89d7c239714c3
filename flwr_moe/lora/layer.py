"""A frozen linear map plus routed low-rank experts (LoRA) on top of it.

Dimension suffixes: B samples, S tokens of a sample, T tokens (or decisions), D input width,
O output width, E experts, k experts a token goes to, r rank, n = E * r,
C rows of an expert's buffer.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flwr_moe.experts.sparse_moe import RoutedBlock, run_chosen

GateKind = Literal["token", "sequence"]

GATE_KINDS: tuple[GateKind, ...] = ("token", "sequence")

DENSE_EXPERTS_PER_CHOICE = 6
"""Experts per chosen one up to which running all of them takes no longer than sorting the tokens.

Measured forward and backward on one CPU core, widths 384 to 2048, ranks 8 and 16: with 8 experts
of which 2 answer 0.8 to 1.2 times the time of sorting, with 12 about the same, with 32 it is 1.3
to 1.7 times.
"""


_MASKS: ContextVar[tuple[Tensor | None, ...]] = ContextVar("token_masks", default=())


class LoRAExperts(nn.Module):
    """The low-rank maps of one linear layer's experts, stacked along dim 0.

    Parameters
    ----------
    num_experts, rank, d_in, d_out : int
        E, r, D and O; ``lora_A`` is (E, r, D), ``lora_B`` (E, O, r).
    device, dtype : torch.device, torch.dtype
        Of the tensors, which start empty.
    """

    def __init__(
        self,
        num_experts: int,
        rank: int,
        d_in: int,
        d_out: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        a_ErD = torch.empty(num_experts, rank, d_in, device=device, dtype=dtype)
        b_EOr = torch.empty(num_experts, d_out, rank, device=device, dtype=dtype)
        self.lora_A, self.lora_B = nn.Parameter(a_ErD), nn.Parameter(b_EOr)

    def forward(self, x_ECD: Tensor) -> Tensor:
        """Run expert e on rows ``x_ECD[e]``; returns (E, C, O)."""
        hidden_ECr = torch.bmm(x_ECD, self.lora_A.transpose(1, 2))
        return torch.bmm(hidden_ECr, self.lora_B.transpose(1, 2))

    def mixed(self, x_TD: Tensor, weight_TE: Tensor) -> Tensor:
        """Run all experts as one map of rank ``E * r``, weighted token by token; returns (T, O)."""
        hidden_Tn = functional.linear(x_TD, self.lora_A.flatten(0, 1))
        hidden_TEr = hidden_Tn.unflatten(1, self.lora_A.shape[:2]) * weight_TE.unsqueeze(2)
        b_On = self.lora_B.transpose(0, 1).flatten(1)
        return functional.linear(hidden_TEr.flatten(1), b_On)


class LoRAExpertsLinear(RoutedBlock):
    """``base_layer(x) + scaling * sum_e w_e B_e A_e dropout(x)``, the weights w from a top-k gate.

    The number of experts is read from the tensors' shapes, as in `SparseMoE`. The base layer is
    called as it is, so that its class (also one with quantised weights) does not matter.

    Parameters
    ----------
    base_layer : nn.Module
        Maps (..., D) to (..., O); an ``nn.Linear`` or transformers' ``Conv1D``.
    d_in, d_out : int
        D and O.
    num_experts, top_k : int
        Experts E, and how many of them answer, at most all there are.
    rank : int
        Rank r of each expert.
    scaling : float
        Factor on the experts' answer: in LoRA alpha / r.
    dropout : float
        Probability with which an input of the experts (not of the base, nor of the gate) is
        dropped in training.
    gate : {"token", "sequence"}
        Whether every token is routed by itself, or every sample (first dimension) as a whole by
        the mean of its tokens; see `token_mask` for padding.
    device, dtype : torch.device, torch.dtype
        Of experts and gate, which start empty; see `reset_parameters`.

    Attributes
    ----------
    tokens_per_expert : Tensor
        As in `RoutedBlock`; counts samples when the gate sees sequences.

    Notes
    -----
    LoRA: Hu et al. 2022. Gate on every adapted layer: source ours.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        d_in: int,
        d_out: int,
        num_experts: int,
        top_k: int,
        *,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        gate: GateKind = "token",
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(num_experts, top_k)
        self.tokens_per_expert = self.tokens_per_expert.to(device)
        self.base_layer = base_layer
        # Made without nn.Linear's own draw from the global generator.
        self.gate = nn.utils.skip_init(
            nn.Linear, d_in, num_experts, bias=False, device=device, dtype=dtype
        )
        self.experts = LoRAExperts(num_experts, rank, d_in, d_out, device, dtype)
        self.dropout = nn.Dropout(dropout)
        self.scaling, self.gate_kind = scaling, gate

    @property
    def num_experts(self) -> int:
        """Number of experts the layer holds now."""
        return self.experts.lora_A.shape[0]

    @property
    def weight(self) -> Tensor:
        """Weight of the base layer, for models that look at it."""
        return cast(Tensor, self.base_layer.weight)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every A and the gate as PEFT and ``nn.Linear`` do, set every B to zero.

        Both draws are uniform in ±1/sqrt(D), on the CPU whatever device the layer is on.
        """
        if self.gate.weight.is_meta:
            return
        bound = 1 / math.sqrt(self.gate.in_features)
        with torch.no_grad():
            for tensor in (self.experts.lora_A, self.gate.weight):
                drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                tensor.copy_(drawn.uniform_(-bound, bound, generator=generator))
            self.experts.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., O)."""
        y: Tensor = self.base_layer(x)
        # Adapters of a base in half precision are kept in single precision.
        x = x.to(self.experts.lora_A.dtype)
        by_sample = self.gate_kind == "sequence" and x.ndim > 2
        gate_input_TD = mean_over_tokens(x) if by_sample else x.reshape(-1, x.shape[-1])
        expert_Tk, weight_Tk, routed_E = self.route(self.gate(gate_input_TD))

        if by_sample:
            tokens = x.shape[1:-1].numel()
            expert_Tk = expert_Tk.repeat_interleave(tokens, 0)
            weight_Tk = weight_Tk.repeat_interleave(tokens, 0)
            routed_E = routed_E * tokens

        x_TD = self.dropout(x).reshape(-1, x.shape[-1])
        if self.num_experts <= DENSE_EXPERTS_PER_CHOICE * expert_Tk.shape[1]:
            weight_TE = weight_Tk.new_zeros(len(x_TD), self.num_experts)
            delta_TO = self.experts.mixed(x_TD, weight_TE.scatter(1, expert_Tk, weight_Tk))
        else:
            delta_TO = run_chosen(self.experts, x_TD, expert_Tk, weight_Tk, routed_E)
        return y + (self.scaling * delta_TO).view_as(y).to(y.dtype)


@contextmanager
def token_mask(mask_BS: Tensor | None) -> Iterator[None]:
    """Within this context, gates that see sequences average over tokens whose mask is not zero.

    Models whose ``forward`` takes an ``attention_mask`` (B, S) need no such context: they set it
    themselves. Layers whose input is not (B, S, D) average over all tokens. A backward pass that
    runs forward passes again (gradient checkpointing) has to be inside the context, too.

    Parameters
    ----------
    mask_BS : Tensor or None
        Nonzero for tokens that count; None for all.
    """
    _MASKS.set((*_MASKS.get(), mask_BS))
    try:
        yield
    finally:
        _MASKS.set(_MASKS.get()[:-1])


def mean_over_tokens(x: Tensor) -> Tensor:
    """Average (B, ..., D) to (B, D), over the tokens of the mask in force where it fits."""
    mask_BS = (_MASKS.get() or (None,))[-1]
    if mask_BS is None or mask_BS.shape != x.shape[:-1]:
        return x.flatten(1, -2).mean(1)
    weight_BS1 = (mask_BS != 0).to(x.dtype).unsqueeze(-1)
    # A sample of padding alone has no mean; zero is as good an answer as any.
    return (x * weight_BS1).sum(1) / weight_BS1.sum(1).clamp(min=1)


def follow_attention_mask(model: nn.Module) -> None:
    """Make the outermost modules that take an ``attention_mask`` set it as the token mask."""
    if "attention_mask" in inspect.signature(model.forward).parameters:
        model.register_forward_pre_hook(_enter, with_kwargs=True)
        model.register_forward_hook(_leave, always_call=True)
    else:
        for child in model.children():
            follow_attention_mask(child)


def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    position = list(inspect.signature(module.forward).parameters).index("attention_mask")
    mask = kwargs.get("attention_mask", args[position] if len(args) > position else None)
    known = _MASKS.get()
    _MASKS.set((*known, mask if isinstance(mask, Tensor) else (known or (None,))[-1]))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    _MASKS.set(_MASKS.get()[:-1])
