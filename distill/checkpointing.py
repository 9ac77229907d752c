"""Activation checkpointing: what a module computed is computed again in the backward pass instead of kept.

Chen et al. 2016, arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def start(network: nn.Module, modules: bool | Sequence[str]) -> list[nn.Module]:
    """Begin; returns what `stop` wants.

    modules: True asks the network itself, as diffusers' can; names of classes choose the modules that compute again.
    Raises ValueError where the network cannot, or has no such modules.
    """
    if modules is False:
        return []
    if modules is True:
        able = _able(network)
        if able is None:
            raise ValueError(
                f"{type(network).__name__} has no enable_gradient_checkpointing; name the classes of the modules that "
                f"shall compute again, such as checkpointing=['{_first(network)}']"
            )
        able.enable_gradient_checkpointing()
        return [able]
    chosen = [module for module in network.modules() if type(module).__name__ in modules]
    if lacking := set(modules) - {type(module).__name__ for module in chosen}:
        raise ValueError(
            f"{type(network).__name__} has no modules of class {', '.join(sorted(lacking))}; it has "
            f"{', '.join(sorted({type(module).__name__ for module in network.modules()}))}"
        )
    for module in chosen:
        # on the object, so that the names of the parameters stay
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return chosen


def stop(network: nn.Module, started: Sequence[nn.Module]) -> None:
    for module in started:
        able: Any = module
        if module.__dict__.pop("forward", None) is None:
            able.disable_gradient_checkpointing()


def _able(network: nn.Module) -> Any:
    """The network, or the one that it wraps, which has diffusers' switch."""
    found = (module for module in network.modules() if hasattr(module, "enable_gradient_checkpointing"))
    return next(found, None)


def _first(network: nn.Module) -> str:
    return next((type(module).__name__ for module in network.children()), "Sequential")
