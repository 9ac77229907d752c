"""The variance that a network predicts beside its mean, heard through the wrappers around it.

Nichol and Dhariwal 2021, arXiv:2102.09672, Sec. 3.1: such a network returns twice the channels, the second half saying
where between two known variances, on a logarithmic scale, that of the next state lies.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .denoiser import Denoiser, Model
from .grid import Node, Nodes
from .wrapper import altered


def predict_with_variance(model: Model, x: Tensor, node: Node | Nodes, **condition: Any) -> tuple[Tensor, Tensor]:
    """(x0, share) at x [B, C, ...] and node, both like x: `model.predict`, and the share of the larger variance.

    share: 0 for the posterior's variance, 1 for that of the forward step; a network says 2 share - 1, which it may let
        run beyond. In guidance it is that of cond, as in the code of DiT (Peebles and Xie 2022, arXiv:2212.09748).
    Raises ValueError where the network predicts no variance, TypeError where there is no `Denoiser` below the wrappers.
    """
    heard: list[Tensor] = []
    x0 = hearing(model, heard).predict(x, node, **condition)
    return x0, share_of(heard, x)


def hearing(model: Model, heard: list[Tensor]) -> Model:
    """A copy of the model that appends to `heard` what its network says of the variance, call by call."""
    if isinstance(model, Denoiser):
        return _Hearing(model, heard)
    inner = getattr(model, "model", None)
    if inner is None:
        raise TypeError(
            f"{type(model).__name__} is no Denoiser around a network, so there is no predicted variance to hear; use a "
            f"solver with a fixed one, such as ddpm"
        )
    copied: Model = altered(cast(Any, model), model=hearing(inner, heard))
    return copied


def share_of(heard: list[Tensor], x: Tensor) -> Tensor:
    """The share for x, of what was heard in one evaluation: wrappers ask for cond first, or in the first rows."""
    return (torch.cat(heard)[: len(x)].to(x.dtype) + 1) / 2


class _Hearing(Denoiser):
    def __init__(self, model: Denoiser, heard: list[Tensor]):
        vars(self).update(vars(model))  # its network, its schedule and its count are those of the model
        self.heard = heard

    def _mean(self, output: Tensor, x: Tensor) -> Tensor:
        if output.shape == x.shape:
            raise ValueError(
                f"the network returned {output.shape[1]} channels for x of as many: it predicts no variance; use a "
                f"solver with a fixed one, such as ddpm"
            )
        mean = super()._mean(output, x)
        self.heard.append(output[:, x.shape[1] :])
        return mean
