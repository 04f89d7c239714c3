"""Parts of a model of transformers, which run the library's own forward pass.

Blocks of other parts hand on what they get, and so do the embeddings after a cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PartOfModel(nn.Module):
    """Some blocks of a model, which holds the modules of its skeleton under their own names."""

    skeleton: Any

    def __init__(self, skeleton: nn.Module, is_decoder: bool, pools_last: bool) -> None:
        super().__init__()
        # Beside the modules rather than among them, where it would add a prefix to all names.
        self.__dict__["skeleton"] = skeleton
        self._modules = skeleton._modules
        self._parameters = skeleton._parameters
        self._buffers = skeleton._buffers
        self.training = skeleton.training
        self._options = {"use_cache": False} if is_decoder else {}
        self._is_decoder, self._pools_last = self.kind = is_decoder, pools_last


class ClientHalf(PartOfModel):
    """Embeddings and the first blocks of a model of transformers."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Run up to the cut.

        Parameters
        ----------
        input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds : Tensor, optional
            As the model takes them. `token_type_ids` serve the embeddings alone, and so do the
            `position_ids` of an encoder.

        Returns
        -------
        tuple of Tensor
            The hidden state (B, T, D); for sequence classification with a decoder the index (B,)
            of the token that is classified; the attention mask, if there is one or positions are
            given; the positions, if a decoder was given them.

        Raises
        ------
        ValueError
            If a decoder is to classify several sequences and has no padding token.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        given = {name: value for name, value in inputs.items() if value is not None}
        base = self.skeleton.base_model
        hidden_BTD = base(**given, **self._options).last_hidden_state
        crossing = [hidden_BTD]
        if self._pools_last:
            crossing.append(self._last_token(hidden_BTD, input_ids))
        positions = [position_ids] if self._is_decoder and position_ids is not None else []
        if attention_mask is None and positions:
            attention_mask = hidden_BTD.new_ones(hidden_BTD.shape[:2], dtype=torch.int64)
        if attention_mask is not None:
            crossing += [attention_mask, *positions]
        return tuple(crossing)

    def _last_token(self, hidden_BTD: Tensor, input_ids: Tensor | None) -> Tensor:
        """Index of the last token that is no padding, as the library's heads choose it."""
        size, length = hidden_BTD.shape[:2]
        padding = self.skeleton.config.get_text_config().pad_token_id
        if padding is None and size > 1:
            raise ValueError(
                f"batch of {size} sequences, expected 1: pad_token_id is not set in the config"
            )
        last_B = torch.full((size,), length - 1, device=hidden_BTD.device)
        if padding is None or input_ids is None:
            return last_B
        place_T = torch.arange(length, device=hidden_BTD.device)
        return (place_T * (input_ids != padding)).argmax(-1)


class ServerHalf(PartOfModel):
    """The other blocks and the head of a model of transformers."""

    def forward(self, hidden_BTD: Tensor, *context: Tensor) -> Tensor:
        """Run from the cut on.

        Parameters
        ----------
        hidden_BTD : Tensor
            Hidden state at the cut (B, T, D).
        *context : Tensor
            The other tensors that the client half has returned.

        Returns
        -------
        Tensor
            Logits, or the last hidden state (B, T, D) of a model without a head.

        Raises
        ------
        ValueError
            If the head gives something else.
        """
        model = self.skeleton
        given, last_B = self._given([hidden_BTD, *context])
        if last_B is not None:
            scores_BTK = model.score(model.base_model(**given).last_hidden_state)
            rows_B = torch.arange(len(last_B), device=last_B.device)
            return scores_BTK[rows_B, last_B]
        output = model(**given)
        result = output.get("logits", output.get("last_hidden_state"))
        if result is None:
            raise ValueError(f"{type(model).__name__} gives {', '.join(output)}, expected logits")
        return result

    def _given(self, inputs: list[Tensor]) -> tuple[dict[str, Any], Tensor | None]:
        """Return what the model is called with, and the index of the token that counts."""
        last_B = inputs.pop(1) if self._pools_last else None
        names = ("inputs_embeds", "attention_mask", "position_ids")
        return dict(zip(names, inputs, strict=False)) | self._options, last_B
