"""What the system emo takes beside its strategy: tail, links, judge, and an ensemble from disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord
from safetensors.torch import load_file
from torch import nn

from flwr_moe.app.judge import together
from flwr_moe.app.settings import ConfigError, Settings
from flwr_moe.app.systems.emo import EMOSettings
from flwr_moe.app.tasks import build_task, task_kind
from flwr_moe.app.tracker import Verdict
from flwr_moe.network import Links, NodeProfile
from flwr_moe.overlay.block import tap_output
from flwr_moe.overlay.ensemble import Ensemble
from flwr_moe.overlay.tails import build_tail
from flwr_moe.report import load_results
from flwr_moe.split.cut import split_model
from flwr_moe.strategies.emo.strategy import EMO
from flwr_moe.tasks import Task
from flwr_moe.training import accuracy_and_loss, predict

OVERLAY = "overlay"
TAIL, WEIGHTS, THRESHOLD = "emo.tail.", "emo.weights", "emo.threshold"


def emo_tap(settings: Settings) -> str:
    """Return the layer whose output is replayed.

    Raises
    ------
    ConfigError
        If neither the settings nor the task name one.
    """
    tap = settings.of(EMOSettings).tap or task_kind(settings).cut
    if not tap:
        raise ConfigError(f"emo.tap is empty: expected a layer, task {settings.task} has no tap")
    return tap


def emo_tail(settings: Settings, task: Task) -> nn.Module:
    """Build the tail that all overlays begin with.

    Raises
    ------
    ConfigError
        If the model has no such tap or the tail does not fit.
    """
    own = settings.of(EMOSettings)
    model, example = task.warm_model(), task.public_data().x[:1]
    try:
        front = split_model(model, emo_tap(settings), example).client
        return build_tail(
            tap_output(front, example).shape[1:],
            task.num_classes,
            own.scaling,
            own.size,
            own.width,
            settings.seed,
        )
    except ValueError as error:
        raise ConfigError(f"emo.tap={emo_tap(settings)!r}: {error}") from None


@dataclass(frozen=True)
class EdgeLinks:
    """Links of the devices as they are, and wires to the overlays.

    Parameters
    ----------
    devices : Links
        Of all nodes that are no overlays.
    overlays : Links
        Of the overlays.
    """

    devices: Links
    overlays: Links

    def transfer(self, node: NodeProfile, direction: str, n_bytes: int, start_s: float) -> float:
        """Return when bytes that are ready at ``start_s`` have arrived."""
        return self._of(node).transfer(node, direction, n_bytes, start_s)

    def next_contact(self, node: NodeProfile, direction: str, after_s: float) -> float:
        """Return when the next contact begins."""
        return self._of(node).next_contact(node, direction, after_s)

    def _of(self, node: NodeProfile) -> Links:
        return self.overlays if node.role == OVERLAY else self.devices


class EMOJudge:
    """Judge the ensemble as it is, and the small model beside it.

    Parameters
    ----------
    task : Task
        Held-out data.
    strategy : EMO
        Has the tails.

    Attributes
    ----------
    small : list of float
        Accuracy of the small model at every verdict.
    """

    def __init__(self, task: Task, strategy: EMO) -> None:
        tests = together(task.test_data())
        self.x, self.y = tests.x, tests.y
        self.strategy = strategy
        self.model = task.build_model()
        self.small: list[float] = []
        self.off_loaded = math.nan

    def __call__(self, arrays: ArrayRecord) -> Verdict:
        """Judge with the tail as it is at this moment."""
        ensemble = self.strategy.ensemble(arrays)

        def verdict() -> tuple[float, float]:
            answer = ensemble.answer(self.x)
            self.small.append(accuracy_and_loss(predict(ensemble.small, self.x), self.y)[0])
            self.off_loaded = float(answer.off_loaded.double().mean())
            return accuracy_and_loss(answer.log_probs, self.y)

        return verdict

    def report(self, arrays: ArrayRecord) -> dict[str, Any]:
        """Return what the overlays did, for ``summary.json``."""
        return {
            **self.strategy.report(),
            "small-accuracy": self.small[-1] if self.small else math.nan,
            "small-accuracies": self.small,
            "off-loaded": self.off_loaded,
        }

    def extra_weights(self) -> dict[str, Any]:
        """Return the tail, weights and threshold, to be saved beside the small model."""
        ensemble = self.strategy.ensemble()
        if not ensemble.tails:
            return {}
        state = ensemble.tails[0].state_dict()
        return {
            **{TAIL + key: tensor.numpy() for key, tensor in state.items()},
            WEIGHTS: ensemble.weights,
            THRESHOLD: torch.tensor(ensemble.threshold).numpy(),
        }


def load_ensemble(
    folder: Path | str, seed: int = 0, data: str = "", tail: Callable[[], nn.Module] | None = None
) -> Ensemble:
    """Build the ensemble that a run of the system ``emo`` has saved.

    Parameters
    ----------
    folder : Path or str
        Results folder.
    seed : int
        Which run.
    data : str
        Folder with the data set, if it is no longer where it was.
    tail : callable, optional
        Builds the tail, where it was none of the built-in ones.

    Returns
    -------
    Ensemble
        ``predict(x)`` gives classes. Without saved tails the small model answers alone.

    Raises
    ------
    ResultsError
        If the folder is none.
    ValueError
        If it has no weights of such a run, or they do not fit.
    """
    path = Path(folder) / f"weights-emo-seed{seed}.safetensors"
    settings = Settings.from_mapping(load_results(folder).settings)
    settings = settings.replace(system="emo", seed=seed, data=data or settings.data)
    if not path.is_file():
        raise ValueError(f"{path} is missing, expected the weights of a run of emo")
    saved = load_file(path)
    task = build_task(settings, settings.num_clients, seed)
    small = task.build_model()
    keys = small.state_dict().keys()
    try:
        small.load_state_dict({key: saved[key] for key in keys})
        front = split_model(small, emo_tap(settings)).client
        if WEIGHTS not in saved:
            return Ensemble(small, front)
        made = tail() if tail is not None else emo_tail(settings, task)
        made.load_state_dict(
            {key.removeprefix(TAIL): t for key, t in saved.items() if key.startswith(TAIL)}
        )
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: the saved model does not fit: {error}") from None
    return Ensemble(small, front, [made], saved[WEIGHTS].numpy(), float(saved[THRESHOLD]))
