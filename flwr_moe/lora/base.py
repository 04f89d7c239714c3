"""The frozen base of a LoRA mixture: kept out of states and training, shared between models."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

FINGERPRINT = "lora_base_fingerprint"
"""Name of the buffer that says which base an adapter belongs to."""

FINGERPRINT_BYTES = 8
SAMPLED_VALUES = 1024
"""Values of each tensor, evenly spread, that the fingerprint looks at."""

_bases: dict[Hashable, nn.Module] = {}
_lock = threading.Lock()


def shared_base(key: Hashable, load: Callable[[], nn.Module]) -> nn.Module:
    """Load a base model once per process, and give out copies that share its weights.

    The weights are loaded for real even under ``torch.device("meta")``: a ClientApp that builds
    its full model there needs them, because they never travel.

    Parameters
    ----------
    key : hashable
        Names the base, for example its path and the dtype it is loaded in.
    load : callable
        Loads it; called for the first request of `key` only.

    Returns
    -------
    nn.Module
        Modules of its own, parameters on common storage: not to be trained or changed in place.

    Notes
    -----
    Source: ours.
    """
    with _lock:
        if key not in _bases:
            with torch.device("cpu"):
                _bases[key] = load()
        base = _bases[key]
        memo: dict[int, object] = {
            id(p): nn.Parameter(p.detach(), False) for p in base.parameters()
        }
        return copy.deepcopy(base, memo)


def base_fingerprint(model: nn.Module, left_out: Sequence[str]) -> Tensor:
    """Hash the parameters and persistent buffers of `model`, but those of some modules.

    Names, shapes and dtypes count, and up to 1,024 values of each tensor: quick even for a large
    model, and sure to tell apart bases that were trained differently.

    Parameters
    ----------
    model : nn.Module
        The base, before anything of it is replaced.
    left_out : sequence of str
        Names of modules that do not count.

    Returns
    -------
    Tensor
        Eight whole numbers from 0 to 255 as float32, so that they survive being averaged as all
        tensors of a state are.

    Raises
    ------
    ValueError
        If a tensor is on the meta device: such a base cannot be filled later.
    """
    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    prefixes = tuple(f"{name}." for name in left_out)
    for name, tensor in model.state_dict().items():
        if name.startswith(prefixes):
            continue
        if tensor.is_meta:
            raise ValueError(
                f"{name} of the base model is on the meta device, expected real weights "
                "(load it with flwr_moe.lora.shared_base)"
            )
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED_VALUES)].contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.float32, device="cpu")


def freeze(model: nn.Module, left_out: Sequence[str]) -> None:
    """Turn the parameters of `model` into buffers outside its state, but those of some modules.

    As buffers they are in no list of parameters, so that no optimiser and no
    ``requires_grad_(True)`` over a whole model can change what several models share.
    Normalisation by running statistics stays in evaluation mode.
    """
    frozen: dict[int, Tensor] = {}
    kept = {id(m) for name in left_out for m in model.get_submodule(name).modules()}
    for module in model.modules():
        if id(module) in kept:
            continue
        parameters = {name: p for name, p in module._parameters.items() if p is not None}
        for name, parameter in parameters.items():
            del module._parameters[name]
            # One tensor for tied parameters.
            frozen.setdefault(id(parameter), _plain(parameter))
            module.register_buffer(name, frozen[id(parameter)], persistent=False)
        module._non_persistent_buffers_set |= set(module._buffers)
        if parameters:
            vars(module)["submodels_share"] = tuple(parameters)
        if module._buffers.get("running_mean") is not None:
            module.register_forward_pre_hook(_stay_in_evaluation)


def own_copy(module: nn.Module) -> None:
    """Give a module parameters of its own, in place; empty ones under ``torch.device("meta")``."""
    meta = torch.empty(0).is_meta
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                tensor = parameter.detach()
                child._parameters[name] = nn.Parameter(
                    tensor.to("meta") if meta else tensor.clone()
                )


def refuse_other_bases(model: nn.Module, fingerprint: Tensor) -> None:
    """Keep the fingerprint in the state of `model`, and check it in every state it loads."""
    model.register_buffer(FINGERPRINT, fingerprint)
    model.register_load_state_dict_pre_hook(_check_fingerprint)


def _check_fingerprint(
    module: nn.Module, state: dict[str, Any], prefix: str, *ignored: object
) -> None:
    given = state.get(prefix + FINGERPRINT)
    if given is None:
        return
    own = module.get_buffer(FINGERPRINT)
    if given.shape != own.shape or not torch.equal(given.to(own).round(), own):
        raise ValueError(
            f"adapter from another base model: its fingerprint is {_hex(given)}, "
            f"expected {_hex(own)}"
        )
    # Averaging may have moved it by rounding; that must not add up over rounds.
    state[prefix + FINGERPRINT] = own


def _hex(fingerprint: Tensor) -> str:
    return bytes(int(v) % 256 for v in fingerprint.flatten().round().tolist()).hex()


def _plain(parameter: Tensor) -> Tensor:
    # Subclasses of Parameter, as those of quantised weights, carry more than their values.
    return parameter.detach() if type(parameter) is nn.Parameter else parameter


def _stay_in_evaluation(module: nn.Module, args: object) -> None:
    module.eval()
