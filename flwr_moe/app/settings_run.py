"""Settings of every run: what is learnt, by whom, for how long."""

from __future__ import annotations

from dataclasses import dataclass

from flwr_moe.app.spec import setting

SYSTEMS = (
    "fedavg",
    "fedavg-until-pass",
    "fedasync",
    "fedbuff",
    "ems-fl",
    "fedmoe-da",
    "splitfed",
    "fedsl",
    "emo",
    "local",
)
AVAILABLE_TASKS = ("digits", "cifar10", "ag-news", "text")


@dataclass(frozen=True)
class RunSettings:
    """What is learnt, by whom, for how long."""

    system: str = setting("ems-fl", "the system to run", choices=SYSTEMS)
    task: str = setting(
        "digits",
        "what is learnt",
        available=AVAILABLE_TASKS,
        or_path="a folder or Hugging Face name (with a '/') of 32 x 32 images",
    )
    seed: int = setting(0, "seed of data, model and links", minimum=0)
    horizon_hours: float = setting(48.0, "virtual hours to run", minimum=0, open_minimum=True)
    num_rounds: int = setting(0, "rounds to run; 0: until the horizon", minimum=0)
    num_clients: int = setting(0, "clients; 0: one per SuperNode", minimum=0)
    num_clusters: int = setting(6, "device clusters, each with a site of its own", minimum=1)
    num_experts: int = setting(12, "experts of the model, per layer", minimum=1)
    top_k: int = setting(2, "experts active per sample", minimum=1)
    partition: str = setting(
        "domains",
        "how the data is shared out; domains: by camera, topic or place, with cifar10 iid",
        choices=("domains", "iid", "dirichlet", "conflict"),
    )
    dirichlet_alpha: float = setting(
        0.3, "concentration of partition=dirichlet", minimum=0, open_minimum=True
    )
    num_groups: int = setting(
        3, "groups of clients that name the classes differently, partition=conflict", minimum=1
    )
    learning_rate: float = setting(0.0, "step size; 0: the system's tuned value", minimum=0)
    batch_size: int = setting(16, "samples a training step", minimum=1)
    local_steps: int = setting(0, "training steps per update; 0: the system's own", minimum=0)
    max_local_steps: int = setting(1000, "most training steps between two passes", minimum=1)
    model: str = setting(
        "",
        "vgg-small, vgg11, vgg13, vgg16 or vgg19; Hugging Face name or folder, with ag-news of an "
        "encoder, with text of a causal language model; empty: the task's own",
    )
    model_width: float = setting(0.0, "factor on the channels; 0: the task's own", minimum=0)
    num_train: int = setting(0, "training samples of all clients; 0: all there are", minimum=0)
    num_test: int = setting(0, "test samples; 0: all there are", minimum=0)
    judge_on: str = setting(
        "auto",
        "held-out data a global model is judged on: of all, or of each client apart (mean); auto: "
        "each apart if a personal system is compared or the partition asks for it",
        choices=("auto", "all", "own"),
    )
    augment: bool = setting(False, "shift and mirror training images at random")
    train_dtype: str = setting(
        "float32", "floats that devices train with", choices=("float32", "bfloat16")
    )
    gradient_checkpointing: bool = setting(
        False, "transformers on devices keep less in memory and compute it twice"
    )
    data: str = setting("", "folder with the data set as parquet; with task=text a text file")
    out: str = setting("", "results folder of `flwr run`")
