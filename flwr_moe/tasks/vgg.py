"""VGG networks for 32 by 32 images, made to be cut after any block."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

PLANS: dict[str, tuple[int | str, ...]] = {
    "vgg-small": (32, "M", 64, "M", 128, "M", 128, "M"),
    "vgg11": (64, "M", 128, "M", *(256,) * 2, "M", *(512,) * 2, "M", *(512,) * 2, "M"),
    "vgg13": (64, 64, "M", 128, 128, "M", *(256,) * 2, "M", *(512,) * 2, "M", *(512,) * 2, "M"),
    "vgg16": (64, 64, "M", 128, 128, "M", *(256,) * 3, "M", *(512,) * 3, "M", *(512,) * 3, "M"),
    "vgg19": (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M"),
}
"""Channels of every block; "M" halves height and width at the end of the block before it."""

NORMS = ("batch", "group", "none")
GROUP_SIZE = 8
"""Channels are multiples of it, and that many are normalised together."""


class VGG(nn.Module):
    """A VGG network with one linear classifier, for images (B, 3, 32, 32).

    ``features`` is a sequence of blocks ``features.0``, ``features.1``, …, each a convolution, a
    normalisation, a ReLU and, where the plan says so, a max pooling, under the names ``conv``,
    ``norm``, ``relu`` and ``pool``. The average over what is left of height and width feeds
    ``classifier``. Nothing works in place and nothing depends on the data, so that the network
    can be cut after any submodule, or traced.

    Parameters
    ----------
    name : str
        A plan: ``vgg11``, ``vgg13``, ``vgg16``, ``vgg19``, or ``vgg-small`` with four
        convolutions for quick trials.
    num_classes : int
        Outputs of the classifier.
    width : float
        Factor on every number of channels, rounded to multiples of 8.
    norm : str
        ``batch``, ``group`` (groups of 8 channels) or ``none``. Batch normalisation learnt faster
        in federated rounds, with few rounds and small models; its running statistics are part of
        the state and are averaged like weights, those of a split model's client half too. Group
        normalisation has no such state and treats a sample alike in any batch.

    Raises
    ------
    ValueError
        If the plan or norm is unknown or the width is not above 0.

    Notes
    -----
    Source: configurations A, B, D and E of Simonyan and Zisserman 2015, with the classifier cut
    to one layer as usual for CIFAR-10; group normalisation by Wu and He 2018. Convolutions keep
    their bias, so ``vgg19`` with a norm has the 20,040,522 parameters known for that form.
    """

    def __init__(
        self,
        name: str = "vgg19",
        num_classes: int = 10,
        width: float = 1.0,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if name not in PLANS:
            raise ValueError(f"model is {name!r}, expected one of {', '.join(PLANS)}")
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}, expected one of {', '.join(NORMS)}")
        if not 0 < width < float("inf"):
            raise ValueError(f"width is {width}, expected above 0")
        plan = PLANS[name]
        blocks: list[nn.Module] = []
        channels_in = 3
        for place, entry in enumerate(plan):
            if isinstance(entry, int):
                channels = max(GROUP_SIZE, round(entry * width / GROUP_SIZE) * GROUP_SIZE)
                pooled = plan[place + 1 : place + 2] == ("M",)
                blocks.append(_block(channels_in, channels, norm, pooled))
                channels_in = channels
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels_in, num_classes)
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, 32, 32) to logits (B, classes)."""
        return self.classifier(self.flatten(self.pool(self.features(x))))

    def _initialise(self) -> None:
        # Torch's default shrinks the signal in every ReLU layer; sixteen of them would kill it.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _block(channels_in: int, channels: int, norm: str, pooled: bool) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv"] = nn.Conv2d(channels_in, channels, kernel_size=3, padding=1)
    if norm == "group":
        layers["norm"] = nn.GroupNorm(channels // GROUP_SIZE, channels)
    elif norm == "batch":
        layers["norm"] = nn.BatchNorm2d(channels)
    layers["relu"] = nn.ReLU()
    if pooled:
        layers["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(layers)
