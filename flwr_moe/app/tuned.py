"""Step sizes and step counts found for each system, and the training order made of them."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ConfigRecord

from flwr_moe.app.build_task import settle_experts
from flwr_moe.app.config import Settings

UNTIL_CONTACT = 0
ALWAYS_UNTIL_CONTACT = ("ems-fl", "fedavg-until-pass")
PERSONALISED = ("fedmoe-da", "local")


@dataclass(frozen=True)
class Tuned:
    """Best settings found for one system on one kind of partition (benchmarks/tune.py).

    Attributes
    ----------
    learning_rate : float
        Of the devices' optimiser.
    local_steps : int
        Steps per update; :data:`UNTIL_CONTACT` for as many as fit before the next contact.
    """

    learning_rate: float
    local_steps: int


TUNED = {
    "ems-fl": Tuned(0.003, UNTIL_CONTACT),
    "fedavg": Tuned(0.0005, 100),
    "fedavg-until-pass": Tuned(0.0003, UNTIL_CONTACT),
    "fedasync": Tuned(0.0001, UNTIL_CONTACT),
    "fedbuff": Tuned(0.0003, UNTIL_CONTACT),
    "fedmoe-da": Tuned(0.003, 40),
    "local": Tuned(0.003, 40),
    "splitfed": Tuned(0.0005, 100),
    "fedsl": Tuned(0.0005, 100),
    "emo": Tuned(0.0005, 100),
}
#: Where data is not split by domain, models start untrained.
TUNED_UNTRAINED = {name: Tuned(0.003, 40) for name in ("fedavg", "emo", "splitfed", "fedsl")}
#: LoRA experts of pretrained encoders.
TUNED_TEXT = {
    "ems-fl": Tuned(0.003, UNTIL_CONTACT),
    "fedavg": Tuned(0.003, 100),
    "fedavg-until-pass": Tuned(0.003, UNTIL_CONTACT),
    "fedasync": Tuned(0.001, UNTIL_CONTACT),
    "fedbuff": Tuned(0.001, UNTIL_CONTACT),
    "fedmoe-da": Tuned(0.003, 40),
    "local": Tuned(0.003, 40),
}
#: Their layers themselves.
TUNED_TEXT_PLAIN = {
    "fedavg": Tuned(0.0003, 40),
    "fedavg-until-pass": Tuned(0.0003, UNTIL_CONTACT),
    "fedasync": Tuned(0.0001, UNTIL_CONTACT),
    "fedbuff": Tuned(0.0001, UNTIL_CONTACT),
    "splitfed": Tuned(0.0003, 40),
    "fedsl": Tuned(0.0003, 40),
    "emo": Tuned(0.0003, 40),
}


def train_config(settings: Settings, system: str, seed: int) -> ConfigRecord:
    """Tell the devices how to train; settings of 0 become the tuned ones."""
    tuned = TUNED[system]
    if settings.task == "ag-news" or (settings.task == "text" and settings.model):
        plain = settle_experts(settings, [system]).text_experts == "none"
        tuned = (TUNED_TEXT_PLAIN if plain else TUNED_TEXT).get(system, tuned)
    elif settings.partition != "domains" or settings.task != "digits":
        tuned = TUNED_UNTRAINED.get(system, tuned)
    steps = settings.local_steps or tuned.local_steps
    return ConfigRecord(
        {
            "seed": seed,
            "learning-rate": settings.learning_rate or tuned.learning_rate,
            "batch-size": settings.batch_size,
            "local-steps": UNTIL_CONTACT if system in ALWAYS_UNTIL_CONTACT else steps,
            "max-local-steps": settings.max_local_steps,
            "evaluate-own": system in PERSONALISED,
            **_precision(settings),
        }
    )


def _precision(settings: Settings) -> dict[str, str | bool]:
    """Say which precision is asked for; nothing where it is the usual one."""
    said: dict[str, str | bool] = {}
    if settings.train_dtype != "float32":
        said["train-dtype"] = settings.train_dtype
    if settings.gradient_checkpointing:
        said["gradient-checkpointing"] = True
    return said
