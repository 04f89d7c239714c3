"""How the devices of a system train: what the settings say, else what was found best for it."""

from __future__ import annotations

from flwr.app import ConfigRecord

from flwr_moe.app.registry import SYSTEMS, UNTIL_CONTACT, Tuned
from flwr_moe.app.settings import Settings
from flwr_moe.app.tasks import task_kind


def tuned_for(settings: Settings) -> Tuned:
    """Return the settings found best for the system on such a task."""
    tuned = SYSTEMS[settings.system].tuned
    return tuned.get(task_kind(settings).start(settings), tuned["warm"])


def train_config(settings: Settings, seed: int) -> ConfigRecord:
    """Tell the devices how to train; settings of 0 become the tuned ones."""
    kind, tuned = SYSTEMS[settings.system], tuned_for(settings)
    steps = settings.local_steps or tuned.local_steps
    return ConfigRecord(
        {
            "seed": seed,
            "learning-rate": settings.learning_rate or tuned.learning_rate,
            "batch-size": settings.batch_size,
            "local-steps": UNTIL_CONTACT if kind.until_contact else steps,
            "max-local-steps": settings.max_local_steps,
            "evaluate-own": kind.personal,
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
