"""Settings of single systems; their keys begin with the system's name."""

from __future__ import annotations

from dataclasses import dataclass

from flwr_moe.app.spec import setting


@dataclass(frozen=True)
class SystemSettings:
    """What only some systems look at."""

    min_experts: int = setting(1, "fewest experts a cluster owns", minimum=1)
    max_experts: int = setting(
        0, "most experts a cluster owns; 0: num-experts / num-clusters, rounded up", minimum=0
    )
    eval_every_minutes: float = setting(
        1.0, "virtual minutes a model must last to be evaluated; 0: every one", minimum=0
    )

    ems_fl_gate: str = setting(
        "random-features",
        "how the gate is fitted; plain: not at all",
        "ems-fl.gate",
        choices=("plain", "linear", "random-features"),
    )
    ems_fl_num_features: int = setting(
        1024, "random features of the gate", "ems-fl.num-features", minimum=1
    )
    ems_fl_assignment: str = setting(
        "exact",
        "how experts are assigned to clusters",
        "ems-fl.assignment",
        choices=("exact", "greedy", "random"),
    )
    ems_fl_wait_for_all: bool = setting(
        False, "assign experts only when every cluster was seen", "ems-fl.wait-for-all"
    )
    ems_fl_train_shared: bool = setting(
        False, "also train the shared layers", "ems-fl.train-shared"
    )
    ems_fl_inference: str = setting(
        "mixture",
        "mixture: submodels mixed by the gate's posterior; gate: the assembled model",
        "ems-fl.inference",
        choices=("mixture", "gate"),
    )
    fedasync_alpha: float = setting(
        0.6,
        "weight of a fresh update",
        "fedasync.alpha",
        minimum=0,
        open_minimum=True,
        maximum=1,
    )
    fedasync_staleness: str = setting(
        "polynomial",
        "how the weight falls with staleness",
        "fedasync.staleness",
        choices=("constant", "polynomial", "hinge"),
    )
    fedbuff_buffer_size: int = setting(
        6, "updates aggregated at a time", "fedbuff.buffer-size", minimum=1
    )
    fedmoe_da_p: int = setting(3, "peers each expert is mixed with", "fedmoe-da.p", minimum=0)
    fedmoe_da_tau: float = setting(
        1.0, "temperature of the mixing weights", "fedmoe-da.tau", minimum=0, open_minimum=True
    )
    fedmoe_da_interval: int = setting(
        5, "rounds between refreshes of the mixing matrix", "fedmoe-da.interval", minimum=1
    )
    fedmoe_da_gate: str = setting(
        "mixed",
        "what happens to the gates",
        "fedmoe-da.gate",
        choices=("mixed", "local", "average"),
    )
    fedmoe_da_relay: bool = setting(
        False, "send experts through the server, not from peer to peer", "fedmoe-da.relay"
    )
    fedmoe_da_head: str = setting(
        "shared",
        "personal: every client keeps its own classification head; shared: it is averaged",
        "fedmoe-da.head",
        choices=("personal", "shared"),
    )
    fedsl_cut: str = setting("", "layer after which to cut; empty: the task's", "fedsl.cut")
    fedsl_prune: float = setting(
        0.25,
        "share of channels pruned on the device",
        "fedsl.prune",
        minimum=0,
        maximum=1,
        open_maximum=True,
    )
    fedsl_prune_every: int = setting(
        5, "rounds between choices of the channels that stay", "fedsl.prune-every", minimum=1
    )
    fedsl_bits: int = setting(
        8, "bits of a quantised value, from 2; 0: off", "fedsl.bits", minimum=0, maximum=16
    )
    fedsl_dropout: float = setting(
        0.5,
        "share of activations dropped at the cut",
        "fedsl.dropout",
        minimum=0,
        maximum=1,
        open_maximum=True,
    )
    fedsl_interval: int = setting(
        5, "rounds between averages of the client halves", "fedsl.interval", minimum=1
    )
    fedsl_server: str = setting(
        "copies",
        "copies: a server half for each client, averaged every round; shared: one for all",
        "fedsl.server",
        choices=("copies", "shared"),
    )
    fedsl_labels: str = setting(
        "server",
        "server: labels travel with activations; client: they stay, and so does the model's end",
        "fedsl.labels",
        choices=("server", "client"),
    )
    fedsl_top_cut: str = setting(
        "",
        "with labels=client, layer after which the client's end begins; empty: the last possible",
        "fedsl.top-cut",
    )
    fedsl_server_speedup: float = setting(
        100.0,
        "the server's speed as a multiple of a device's",
        "fedsl.server-speedup",
        minimum=0,
        open_minimum=True,
    )
    fedsl_clip: float = setting(
        0.0, "largest norm of the gradient of each half; 0: any", "fedsl.clip", minimum=0
    )
    fedsl_timeout_s: float = setting(
        60.0,
        "wall seconds that a device waits for the server half",
        "fedsl.timeout-s",
        minimum=0,
        open_minimum=True,
    )
    emo_overlays: int = setting(2, "overlay nodes", "emo.overlays", minimum=1)
    emo_tap: str = setting("", "layer whose output is replayed; empty: the task's", "emo.tap")
    emo_scaling: str = setting(
        "vertical",
        "deeper tail, or parallel tails",
        "emo.scaling",
        choices=("vertical", "horizontal"),
    )
    emo_controller: str = setting(
        "convergence",
        "when activations are refreshed",
        "emo.controller",
        choices=("convergence", "fixed", "every-round"),
    )
    emo_base: str = setting(
        "fedavg", "what trains the small model", "emo.base", choices=("fedavg", "fedasync")
    )
    emo_period: int = setting(
        5,
        "rounds between refreshes; controller=convergence begins with it",
        "emo.period",
        minimum=1,
    )
    emo_budget_mb: float = setting(
        0.0, "most megabytes of activations; 0: any", "emo.budget-mb", minimum=0
    )
    emo_size: int = setting(
        3, "layers of the tail, or with scaling=horizontal tails", "emo.size", minimum=1
    )
    emo_width: int = setting(48, "channels of the tail's first layer", "emo.width", minimum=1)
    emo_steps: int = setting(
        2000, "training steps of each overlay in the whole run", "emo.steps", minimum=1
    )
    emo_learning_rate: float = setting(
        0.005,
        "highest step size of the overlays",
        "emo.learning-rate",
        minimum=0,
        open_minimum=True,
    )
    emo_speedup: float = setting(
        20.0,
        "training steps of an overlay while a device makes one",
        "emo.speedup",
        minimum=0,
        open_minimum=True,
    )
    emo_backhaul_bps: float = setting(
        1e8,
        "bits a second between overlays and server",
        "emo.backhaul-bps",
        minimum=0,
        open_minimum=True,
    )
    emo_off_load: float = setting(
        1.0,
        "share of queries that the ensemble answers, the small model the rest",
        "emo.off-load",
        minimum=0,
        maximum=1,
    )
