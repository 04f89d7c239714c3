"""AG News, or texts like it, shared out over clients, and an encoder with LoRA experts."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from flwr_moe.checks import check_numbers
from flwr_moe.lora.base import own_copy
from flwr_moe.tasks.base import SPLITS, Indices, Task
from flwr_moe.tasks.parquet import LabelledTexts, read_texts, source_of
from flwr_moe.tasks.shares import (
    balanced_draw,
    check_shares,
    check_size,
    deal_by_topic,
    topics_of_clusters,
)
from flwr_moe.tasks.text_encoder import (
    FloatArray,
    TextClassifier,
    Trunk,
    is_token,
    masked_mean,
    top_of,
)
from flwr_moe.tasks.text_lora import LoraPlan, with_experts
from flwr_moe.training.loop import batch_size_for, train_steps
from flwr_moe.training.samples import Samples

NUM_PUBLIC, NUM_CLIENT_TEST, MIN_SAMPLES = 400, 200, 4
WARM_STEPS, WARM_MOE_STEPS, WARM_LEARNING_RATE, WARM_MOE_LEARNING_RATE = 400, 30, 0.003, 0.001
WARM_LAYERS_LEARNING_RATE = 0.0001


class AgNews(Task):
    """News in four topics, told apart by the last layers of a pretrained encoder.

    A sample is what the encoder's lower layers make of a text, (T, D) in half precision: that
    trunk is never trained, so it is run once. The layers above hold routed LoRA experts, which
    are trained together with a linear head on the mean over the tokens; without a plan for
    experts these layers are themselves trained.

    The server's public share is drawn from the training file first, clients share what is left.
    Partition ``"domains"`` deals it out by topic: a cluster sees two topics (see
    :func:`flwr_moe.tasks.text_topics.topics_of_clusters`), every text goes to one client, and
    the test texts of a topic are dealt to the clusters that see it, so that together they are
    each tested once. In the other partitions the test texts are dealt to the clusters at random.
    Files are opened at the first call for data.

    Parameters
    ----------
    data : str
        Folder that holds ``ag_news/train.parquet`` and ``ag_news/test.parquet``, or both files.
    num_clients, num_clusters : int
        Clients, dealt to the clusters in turn: partition p belongs to cluster p mod clusters.
    lora : LoraPlan or None
        Experts of the model; None for plain layers.
    seed : int
        Decides who gets what, and the model's start.
    partition : str
        ``"domains"``, ``"iid"`` or ``"dirichlet"``.
    dirichlet_alpha : float
        Of the partition ``dirichlet``.
    model : str
        Hugging Face name or local folder of an encoder; empty for the bundled MiniLM.
    max_length : int
        Tokens of a text that are read.
    lora_layers : int
        Layers of the encoder, counted from its end, that are no part of the trunk.
    num_train, num_test : int
        Texts of all clients and of the test, equally many of each topic, 0 for all. Which ones
        does not depend on the seed, so that the trunk has to read no others.
    num_public : int
        Texts of the server's public share.
    hub : str
        Name of a Hugging Face data set of such texts, used in place of ``data``.

    Raises
    ------
    ValueError
        If a setting is out of its range, a file is missing or the encoder has no weights here.

    Notes
    -----
    Source: Zhang, Zhao and LeCun 2015 for the data; the rest is ours.
    """

    partitions = ("domains", "iid", "dirichlet")
    min_samples, num_client_test = MIN_SAMPLES, NUM_CLIENT_TEST

    def __init__(
        self,
        data: str,
        num_clients: int,
        num_clusters: int,
        lora: LoraPlan | None,
        seed: int = 0,
        *,
        partition: str = "domains",
        dirichlet_alpha: float = 0.3,
        model: str = "",
        max_length: int = 48,
        lora_layers: int = 2,
        num_train: int = 0,
        num_test: int = 0,
        num_public: int = NUM_PUBLIC,
        hub: str = "",
    ) -> None:
        super().__init__(num_clients, num_clusters, seed, partition, dirichlet_alpha)
        check_numbers(least=0, **{"num-train": num_train, "num-test": num_test})
        check_numbers(least=1, **{"num-public": num_public})
        self.lora = lora
        self.num_train = num_train
        self.num_test = num_test
        self.num_public = num_public
        self.trunk = Trunk(model, lora_layers, max_length)
        self._sources = {split: source_of(data, "ag_news", split, hub) for split in SPLITS}

    @cached_property
    def num_classes(self) -> int:
        """Topics."""
        return int(self._texts("train").labels.max()) + 1

    @cached_property
    def topics(self) -> list[tuple[int, ...]]:
        """Topics that each cluster sees."""
        if self.partition == "domains":
            return topics_of_clusters(self.num_classes, self.num_clusters)
        return [tuple(range(self.num_classes))] * self.num_clusters

    def build_model(self) -> nn.Module:
        """Return the trained part of the encoder: a fresh head, and experts that do nothing yet."""
        return self._trained(self._classifier())

    def _warmed(self, generator: torch.Generator) -> nn.Module:
        """Train the head, while the encoder is as it was pretrained; then what is above the trunk.

        That is, the experts and their gates, or the plain layers, along with the head.
        """
        public = self.public_data()
        plain = self._classifier().eval()
        with torch.no_grad():
            parts = public.x.split(batch_size_for(public.x))
            seen = Samples(torch.cat([plain.pooled(part) for part in parts]), public.y)
        train_steps(plain.head, seen, WARM_STEPS, WARM_LEARNING_RATE, 32, generator)
        model = self._trained(plain)
        rate = WARM_LAYERS_LEARNING_RATE if self.lora is None else WARM_MOE_LEARNING_RATE
        train_steps(model, public, WARM_MOE_STEPS, rate, 16, generator)
        return model

    def gate_view(self, x: Tensor) -> Tensor:
        """Return the mean over its tokens of what the trunk makes of a text, (B, D)."""
        hidden_BTD = x.float()
        return masked_mean(hidden_BTD, is_token(hidden_BTD))

    def _classifier(self) -> TextClassifier:
        top = top_of(self.trunk.where, self.trunk.top_layers)
        return TextClassifier(top, top.config.hidden_size, self.num_classes)

    def _trained(self, classifier: TextClassifier) -> nn.Module:
        """Make trainable what is to be trained of a frozen encoder's layers."""
        if self.lora is not None:
            return with_experts(classifier, self.lora, classifier.head, kept=["head"])
        own_copy(classifier.top)
        return classifier

    def _texts(self, split: str) -> LabelledTexts:
        return read_texts(self._sources[split])

    def _labels(self, split: str) -> Indices:
        return self._texts(split).labels[self._rows[split]]

    def _samples(self, split: str, places: Indices) -> Samples:
        hidden = self._hidden(split)[places]
        labels = self._labels(split)[places]
        return Samples(torch.from_numpy(np.array(hidden)), torch.from_numpy(labels))

    def _hidden(self, split: str) -> FloatArray:
        if split not in self._read:
            found, rows = self._texts(split), self._rows[split]
            drawn = "" if len(rows) == len(found.labels) else f" {rows.tolist()}"
            texts = [found.texts[i] for i in rows]
            self._read[split] = self.trunk.hidden(texts, f"{found.mark}{drawn}")
        return self._read[split]

    @cached_property
    def _read(self) -> dict[str, FloatArray]:
        return {}

    @cached_property
    def _rows(self) -> dict[str, Indices]:
        """Rows of the files that are used at all."""
        rows = {}
        for split, asked, kept in (
            ("train", self.num_train, self.num_public),
            ("test", self.num_test, 0),
        ):
            labels = self._texts(split).labels
            check_size(f"num-{split}", asked, len(labels) - kept)
            rng = np.random.default_rng([0, 4])
            every = np.arange(len(labels))
            size = asked + kept
            rows[split] = balanced_draw(labels, size, self.num_classes, rng) if asked else every
        return rows

    @cached_property
    def _tests(self) -> list[Indices]:
        labels = self._labels("test")
        return deal_by_topic(labels, self.topics, [self.seed, 2])

    @cached_property
    def _shares(self) -> list[Indices]:
        if self.partition != "domains":
            return self._dealt(self._rest)
        check_shares(len(self._rest), self.num_clients, "iid", 1.0, MIN_SAMPLES)
        holders = [self.topics[self.cluster_of(p)] for p in range(self.num_clients)]
        shares = deal_by_topic(self._labels("train")[self._rest], holders, [self.seed, 1])
        if min(map(len, shares)) < 1:
            raise ValueError(
                f"num-clients is {self.num_clients}, expected fewer: the topics of client "
                f"{int(np.argmin([len(s) for s in shares]))} have too few texts"
            )
        return [self._rest[share] for share in shares]
