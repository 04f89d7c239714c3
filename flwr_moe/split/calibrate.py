"""Statistics of batch norms measured anew, without the noise that training had at the cut."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

BATCH = 256
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def calibrated(model: nn.Module, state: Mapping[str, Tensor], inputs: Tensor) -> dict[str, Tensor]:
    """Return a state whose batch norms have the statistics of ``inputs``.

    Values dropped at the cut make what the server half sees more varied than it is when the model
    answers, and batch norms remember that. A forward pass of the whole model puts it right.

    Parameters
    ----------
    model : nn.Module
        Of the state's form; its values are overwritten.
    state : mapping
        State dict of the whole model.
    inputs : Tensor, shape (N, ...)
        Samples of the server's own, at least two.

    Returns
    -------
    dict
        The state with new running means and variances; the same where the model has none.

    Raises
    ------
    ValueError
        If there are fewer than two samples and batch norms to calibrate.

    Notes
    -----
    Source: Li et al. 2019 for the shift of variance between dropout and batch norm; measuring anew
    is ours. Every batch counts alike.
    """
    model.load_state_dict(state)
    norms = [m for m in model.modules() if isinstance(m, _NORMS) and m.track_running_stats]
    if not norms:
        return dict(state)
    if len(inputs) < 2:
        raise ValueError(f"{len(inputs)} samples to calibrate with, expected at least 2")
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    with torch.no_grad():
        for part in inputs.split(BATCH):
            if len(part) > 1:
                model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return {key: value.clone() for key, value in model.state_dict().items()}
