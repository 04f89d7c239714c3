"""The ClientApp that ``flwr run`` and deployed SuperNodes load."""

from __future__ import annotations

from functools import lru_cache

from flwr.app import Context
from flwr.clientapp import ClientApp
from torch import nn

from flwr_moe.app.emo import emo_tail
from flwr_moe.app.registry import SYSTEMS
from flwr_moe.app.settings import Settings
from flwr_moe.app.systems.emo import EMOSettings
from flwr_moe.app.tasks import build_task
from flwr_moe.client_apps import build_client_app
from flwr_moe.client_apps.node import partition_of
from flwr_moe.tasks import Task


@lru_cache(maxsize=4)
def _task(settings: Settings, num_clients: int) -> Task:
    return build_task(settings, num_clients, settings.seed)


def make_client_app(settings: Settings | None = None) -> ClientApp:
    """Build the ClientApp for given settings, or for those of each run's own configuration.

    Parameters
    ----------
    settings : Settings, optional
        Fixed settings, for runs that are started from Python; by default every message is
        answered with the settings in the node's run configuration.
    """

    def settings_of(context: Context) -> Settings:
        return settings or Settings.from_mapping(context.run_config)

    def task_of(context: Context) -> Task:
        run = settings_of(context)
        nodes = context.node_config.get("num-partitions", 0)
        return _task(run, run.num_clients or int(nodes) - SYSTEMS[run.system].extra_nodes(run))

    def speed_of(context: Context) -> float:
        run = settings_of(context)
        is_overlay = partition_of(context) >= task_of(context).num_clients
        return run.steps_per_second * (run.of(EMOSettings).speedup if is_overlay else 1.0)

    def tail_of(context: Context) -> nn.Module:
        return emo_tail(settings_of(context), task_of(context))

    return build_client_app(task_of, speed_of, tail_of)


app = make_client_app()
