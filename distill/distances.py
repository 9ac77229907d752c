"""How far two predictions are apart: a distance is a function (a, b) -> [B] of batches [B, ...]."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PseudoHuber:
    """sqrt(|a - b|^2 + c^2) - c of each sample, over all its d numbers.

    Song and Dhariwal 2023, arXiv:2310.14189, Sec. 3.3.
    c: None is their 0.00054 sqrt(d). One c for the whole sample, not for each number.
    """

    c: float | None = None

    def __post_init__(self) -> None:
        if self.c is not None and not 0 < self.c < math.inf:
            raise ValueError(f"c of the pseudo-Huber distance must be positive and finite, got {self.c:g}")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        difference = _difference(a, b)
        c = 0.00054 * math.sqrt(difference.shape[1]) if self.c is None else self.c
        square = max(c * c, torch.finfo(difference.dtype).tiny)  # at 0 its root would have no gradient
        return (difference.square().sum(1) + square).sqrt() - c


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """`PseudoHuber` with the c of its paper, [B]."""
    return PseudoHuber()(a, b)


def l2(a: Tensor, b: Tensor) -> Tensor:
    """The mean of (a - b)^2 over the numbers of each sample, [B]."""
    return _difference(a, b).square().mean(1)


def l1(a: Tensor, b: Tensor) -> Tensor:
    """The mean of |a - b| over the numbers of each sample, [B]."""
    return _difference(a, b).abs().mean(1)


DISTANCES: dict[str, Distance] = {"pseudo_huber": PseudoHuber(), "l2": l2, "l1": l1}


def distance(given: str | Distance) -> Distance:
    """A distance by name, or a function of your own (LPIPS, for example). Raises ValueError for another name."""
    if callable(given):
        return given
    if given not in DISTANCES:
        raise ValueError(f"unknown distance {given!r}; choose one of {', '.join(DISTANCES)} or pass (a, b) -> [B]")
    return DISTANCES[given]


def measured(how: Distance, a: Tensor, b: Tensor) -> Tensor:
    """The distance of each sample, [B]. Raises ValueError where it is a mean over the batch, or another shape."""
    found = how(a, b)
    if found.shape != (len(a),):  # LPIPS gives [B, 1, 1, 1]
        if found.numel() != len(a) or found.shape[:1] != (len(a),):
            raise ValueError(
                f"a distance gives one number for each sample, shape [{len(a)}], got {list(found.shape)}; take means "
                f"over the numbers of a sample alone"
            )
        found = found.flatten()
    return found


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """[B, numbers], in float32 at least: in half precision small differences and their squares are lost."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(dtype) - b.to(dtype)).flatten(1)
