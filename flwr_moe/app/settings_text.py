"""Settings of tasks that are texts, and of the LoRA experts that learn them."""

from __future__ import annotations

from dataclasses import dataclass

from flwr_moe.app.spec import setting


@dataclass(frozen=True)
class TextSettings:
    """How texts are read, and what of a pretrained encoder is trained."""

    text_max_length: int = setting(
        48, "tokens of a text that are read", "text.max-length", minimum=4
    )
    text_experts: str = setting(
        "auto",
        "what is trained: routed experts or plain layers; auto: as the systems need it",
        "text.experts",
        choices=("auto", "routed", "none"),
    )
    text_lora_layers: int = setting(
        2,
        "last layers of the encoder that are trained",
        "text.lora-layers",
        minimum=1,
    )
    text_num_public: int = setting(
        400, "texts that the server warms up on", "text.num-public", minimum=1
    )
    text_hub: str = setting(
        "", "Hugging Face data set or folder of texts, in place of data", "text.hub"
    )
    lora_rank: int = setting(8, "rank of every expert's matrices", "lora.rank", minimum=1)
    lora_alpha: int = setting(16, "their product counts alpha / rank", "lora.alpha", minimum=1)
    lora_targets: str = setting(
        "query,value", "linear layers that get experts, by the ends of their names", "lora.targets"
    )
    lora_gate: str = setting(
        "sequence",
        "what a gate sends to experts: every token, or a text as a whole",
        "lora.gate",
        choices=("token", "sequence"),
    )
