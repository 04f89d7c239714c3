"""EMO: edge overlays that add capacity to a running federation."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from logging import INFO
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import nn

from flwr_moe.arrays import record_of, tensors_of
from flwr_moe.checks import check_numbers
from flwr_moe.messages.emo import ActivationOrder, TailOrder, recipe_fields
from flwr_moe.network import HorizonReached, with_clock
from flwr_moe.network.filters import DevicesOnly
from flwr_moe.network.flower_adapter import log
from flwr_moe.overlay.block import fingerprint, tap_output
from flwr_moe.overlay.controller import Controller, Convergence
from flwr_moe.overlay.ensemble import Ensemble
from flwr_moe.overlay.tails import check_tail
from flwr_moe.overlay.training import Recipe
from flwr_moe.split.cut import split_model
from flwr_moe.strategies.base import EvaluateFn, EventLoop
from flwr_moe.strategies.emo.run import EMORun
from flwr_moe.training import Samples, accuracy_and_loss, predict


class EMO(Strategy):
    """Any Flower strategy, and overlays beside it that train larger tails on its model's tap.

    The base strategy runs as it is, on a Grid of the devices alone. When the controller asks,
    devices send their tap layer's activations to an overlay, which trains a tail on them at its
    own pace. Devices need :func:`~flwr_moe.client_apps.overlay_mod`, overlays are nodes whose node
    config says ``role="overlay"`` with :func:`~flwr_moe.client_apps.register_overlay`.

    Parameters
    ----------
    base : Strategy
        Trains the small model.
    model : nn.Module
        The small model; its values do not matter.
    tap : str
        Layer whose output is replayed.
    tail : nn.Module
        Maps activations to logits (B, classes), or (B, T, classes) of T parallel tails; all
        overlays begin with its values, and their ClientApp builds the same module.
    held_out : Samples
        Of the server: the small model's score for the controller, and the ensemble's weights and
        threshold, come from these.
    controller : callable
        When to refresh, see `flwr_moe.overlay.controller`.
    recipe : Recipe
        How tails are trained.
    local_steps : int
        Training steps of one order to an overlay.
    average_every : int
        Orders after which an overlay reports its tail, and tails are averaged.
    share_before_last : float
        Share of an overlay's steps that it may make before the last refresh has come.
    off_load : float
        Share of queries that the ensemble is to answer; the small model answers the rest alone.
    ram_bytes, disk_bytes, versions : int
        Limits of each overlay's cache; 0 for no limit on disk, and for any number of versions.
    cache_folder : str
        Where overlays keep their caches whose node config names no folder.
    batch_size : int
        Samples of a device's training step, for the time a pass over its data takes.
    exchange_url, exchange_token, exchange_timeout_s : str, str, float
        As for FedMoEDA.
    run_name : str
        Tells this run's activations from those of others in the same folders and exchanges;
        Flower's run id by default.
    evaluate_overlays : bool
        Whether ``evaluate_fn`` is also called when tails have changed; the result does not hold
        what it returns then.
    seed : int
        Of activations' rounding and of the overlays' training.

    Raises
    ------
    ValueError
        If there is no such tap, the tail does not fit it, or a number is out of range.

    Notes
    -----
    Source: EMO; how nodes talk, averaging and the rules of the controller are ours. Nothing of an
    overlay reaches the base strategy: on equal links its arrays are bit for bit those of a run
    without overlays. Activations do share the devices' links and processors, after each round's
    reply, so rounds may end later.
    """

    def __init__(
        self,
        base: Strategy,
        *,
        model: nn.Module,
        tap: str,
        tail: nn.Module,
        held_out: Samples,
        controller: Controller | None = None,
        recipe: Recipe | None = None,
        local_steps: int = 100,
        average_every: int = 2,
        share_before_last: float = 0.5,
        off_load: float = 1.0,
        ram_bytes: int = 256 * 2**20,
        disk_bytes: int = 0,
        versions: int = 2,
        cache_folder: str = "",
        batch_size: int = 32,
        exchange_url: str = "",
        exchange_token: str = "",
        exchange_timeout_s: float = 10.0,
        run_name: str = "",
        evaluate_overlays: bool = False,
        seed: int = 0,
    ) -> None:
        check_numbers(least=1, local_steps=local_steps, average_every=average_every)
        check_numbers(least=1, batch_size=batch_size, held_out=len(held_out))
        check_numbers(least=0, ram_bytes=ram_bytes, disk_bytes=disk_bytes, versions=versions)
        check_numbers(least=0, most=1, share_before_last=share_before_last, off_load=off_load)
        self.base, self.tap, self.held_out = base, tap, held_out
        self.model, self.tail = copy.deepcopy(model), copy.deepcopy(tail)
        self.front = split_model(self.model, tap, held_out.x[:1]).client
        self.shape = tuple(tap_output(self.front, held_out.x[:1]).shape[1:])
        self.num_classes = predict(self.model, held_out.x[:1]).shape[-1]
        check_tail(self.tail, self.shape, self.num_classes)
        self.controller: Controller = controller or Convergence()
        self.recipe = recipe or Recipe()
        self.local_steps, self.average_every = local_steps, average_every
        self.share_before_last, self.off_load = share_before_last, off_load
        self.ram_bytes, self.disk_bytes, self.versions = ram_bytes, disk_bytes, versions
        self.cache_folder, self.batch_size = cache_folder, batch_size
        self.exchange_url, self.exchange_token = exchange_url, exchange_token
        self.exchange_timeout_s = exchange_timeout_s
        self.run_name = run_name
        self.evaluate_overlays, self.seed = evaluate_overlays, seed
        self.run: EMORun | None = None

    # --- Strategy's hooks: those of the base -------------------------------------

    def summary(self) -> None:
        """Log the settings."""
        log(INFO, "\t├──> EMO: tap %s, activations %s", self.tap, self.shape)
        log(INFO, "\t├──> %s", self.controller)
        self.base.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the base."""
        return self.base.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As the base."""
        return self.base.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the base."""
        return self.base.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """As the base."""
        return self.base.aggregate_evaluate(server_round, replies)

    # --- the run -----------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run the base strategy, with overlays beside it.

        Parameters and result are those of the base's ``start``; afterwards `ensemble` gives the
        larger model.
        """
        grid = with_clock(grid, timeout)
        self.run = run = self._new_run(EventLoop(grid, timeout))
        run.arrays = initial_arrays
        devices = DevicesOnly(grid, run)
        self.summary()
        seen = Result(arrays=initial_arrays)
        last_round = 0

        def watch(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            nonlocal last_round
            last_round, seen.arrays = server_round, arrays
            run.saw(arrays, self._score(arrays))
            metrics = evaluate_fn(server_round, arrays) if evaluate_fn is not None else None
            if metrics is not None:
                seen.evaluate_metrics_serverapp[server_round] = metrics
            return metrics

        def look() -> None:
            if self.evaluate_overlays and evaluate_fn is not None:
                evaluate_fn(last_round, run.arrays)

        run.on_tail = look
        try:
            seen = self.base.start(
                devices, initial_arrays, num_rounds, timeout, train_config, evaluate_config, watch
            )
            run.finish()
        except HorizonReached:
            log(INFO, "EMO: the time is over, the result is what was seen of the base strategy")
        return seen

    def ensemble(self, arrays: ArrayRecord | None = None) -> Ensemble:
        """Return the small model and the overlays' tail as one, fitted on the held-out samples.

        Parameters
        ----------
        arrays : ArrayRecord, optional
            The small model; the last one of the run by default.

        Raises
        ------
        ValueError
            If there has been no run.
        """
        if self.run is None:
            raise ValueError("EMO has no ensemble before start() was called")
        state = (arrays or self.run.arrays).to_torch_state_dict()
        small, tail = copy.deepcopy(self.model), copy.deepcopy(self.tail)
        small.load_state_dict(state)
        front = split_model(small, self.tap, self.held_out.x[:1]).client
        trained = any(overlay.orders for overlay in self.run.overlays.values())
        tail.load_state_dict(tensors_of(self.run.tail))
        made = Ensemble(small, front, [tail] if trained else [])
        made.fit(self.held_out.x, self.held_out.y, self.off_load)
        return made

    def report(self) -> dict[str, Any]:
        """Return what the overlays did, for ``summary.json``."""
        if self.run is None:
            return {}
        ledger = self.run.loop.grid.ledger
        overlay_steps = sum(overlay.steps for overlay in self.run.overlays.values())
        return {
            # The ledger counts every training message; these are the base strategy's alone.
            "updates": ledger.updates - self.run.counts["answered"],
            "device-steps": ledger.steps - overlay_steps,
            "refreshes": list(self.run.refreshed),
            "activation-bytes": self.run.activation_bytes,
            "overlay-steps": overlay_steps,
            "overlay-events": dict(self.run.counts),
            "small-scores": list(self.run.scores),
        }

    def _new_run(self, loop: EventLoop) -> EMORun:
        front, run_name = self.front.state_dict(), self.run_name or str(loop.grid.run.run_id)
        common: dict[str, Any] = {
            "mailbox": f"emo-{run_name}",
            "fingerprint": fingerprint(run_name, self.tap, self.shape, self.num_classes, front),
            "seed": self.seed,
            "exchange_url": self.exchange_url,
            "exchange_token": self.exchange_token,
            "exchange_timeout_s": self.exchange_timeout_s,
        }
        training = TailOrder(
            **common,
            shape=list(self.shape),
            num_classes=self.num_classes,
            ram_bytes=self.ram_bytes,
            disk_bytes=self.disk_bytes,
            versions=self.versions,
            cache_folder=self.cache_folder,
            local_steps=self.local_steps,
            extra=recipe_fields(self.recipe),
        )
        return EMORun(
            loop,
            controller=self.controller,
            activations=ActivationOrder(**common, tap=self.tap),
            training=training,
            front=front.keys(),
            tail=record_of(self.tail.state_dict()),
            batch_size=self.batch_size,
            average_every=self.average_every,
            share_before_last=self.share_before_last,
        )

    def _score(self, arrays: ArrayRecord) -> float:
        """Accuracy of the small model on the held-out samples, NaN if it is not a whole model."""
        state = arrays.to_torch_state_dict()
        if state.keys() != self.model.state_dict().keys():
            return math.nan
        with torch.random.fork_rng(devices=[]):
            self.model.load_state_dict(state)
            return accuracy_and_loss(predict(self.model, self.held_out.x), self.held_out.y)[0]
