"""Activation checkpointing: what a module computed is computed again in the backward pass instead of kept.

Chen et al. 2016, arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def start(network: nn.Module, modules: bool | Sequence[str]) -> list[Callable[[], object]]:
    """Begin; returns what ends it, to be called.

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
        if able.is_gradient_checkpointing:  # by its owner, who may want it on
            return []
        able.enable_gradient_checkpointing()
        return [able.disable_gradient_checkpointing]
    chosen = [module for module in network.modules() if type(module).__name__ in modules]
    if lacking := set(modules) - {type(module).__name__ for module in chosen}:
        raise ValueError(
            f"{type(network).__name__} has no modules of class {', '.join(sorted(lacking))}; it has "
            f"{', '.join(sorted({type(module).__name__ for module in network.modules()}))}"
        )
    return [_recomputing(module) for module in chosen]


def _recomputing(module: nn.Module) -> Callable[[], object]:
    undo = forward_kept(module)
    # on the object, so that the names of the parameters stay
    module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return undo


def forward_kept(module: nn.Module) -> Callable[[], object]:
    """What puts back the forward that the object has now, which may be that of its class."""
    own = vars(module)
    if "forward" in own:
        return partial(own.__setitem__, "forward", own["forward"])
    return partial(own.pop, "forward", None)


def _able(network: nn.Module) -> Any:
    """The network, or the one that it wraps, which has diffusers' switch."""
    found = (module for module in network.modules() if hasattr(module, "enable_gradient_checkpointing"))
    return next(found, None)


def _first(network: nn.Module) -> str:
    return next((type(module).__name__ for module in network.children()), "Sequential")
