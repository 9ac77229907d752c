"""Weights of the squared error at each time.

All are written for the error of x0, whatever the network predicts: its output is p x + q x0 at the same x, so the
squared error of the output is q^2 times that of x0, and one weight serves eps, x0, v and flow alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsample.denoiser import Denoiser
from fastsample.grid import Nodes, nodes
from fastsample.prediction import Prediction

Weight = Callable[[Nodes], Tensor]  # of the squared error of x0, or of a distance, at these nodes, [B]
LEAST = 1e-8  # of alpha: at 0 an eps network says nothing of x0, and weights over q^2 have their limits only


def snr(at: Nodes) -> Tensor:
    """(alpha / sigma)^2, [B]."""
    return (at.alpha / at.sigma).square()


def truncated_snr(at: Nodes) -> Tensor:
    """max(SNR, 1): the larger of the squared errors of x0 and eps. Salimans and Ho 2022, arXiv:2202.00512, Sec. 4."""
    return snr(at).clamp(min=1)


def snr_plus_one(at: Nodes) -> Tensor:
    """SNR + 1: the squared error of v where alpha^2 + sigma^2 = 1. Salimans and Ho 2022, arXiv:2202.00512, Sec. 4."""
    return snr(at) + 1


def _check_positive(name: str, number: float) -> None:
    if not number > 0:
        raise ValueError(f"{name} must be above 0, got {number:g}")


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma): of eps min(SNR, gamma) / SNR, of v min(SNR, gamma) / (SNR + 1).

    Hang et al. 2023, arXiv:2303.09556, Sec. 3.4; of eps and v, Sec. 4.2.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _check_positive("gamma", self.gamma)

    def __call__(self, at: Nodes) -> Tensor:
        return snr(at).clamp(max=self.gamma)


@dataclass(frozen=True)
class P2:
    """Of eps 1 / (k + SNR)^gamma. Choi et al. 2022, arXiv:2204.00227."""

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("k", self.k)

    def __call__(self, at: Nodes) -> Tensor:
        return snr(at) / (self.k + snr(at)) ** self.gamma


@dataclass(frozen=True)
class EDMWeight:
    """(sigma^2 + sd^2) / (sigma sd)^2 = SNR + 1 / sd^2, sd the deviation of the data: the error of a preconditioned
    network's own output then weighs 1. Karras et al. 2022, arXiv:2206.00364, Table 1.
    """

    sd: float = 0.5

    def __post_init__(self) -> None:
        _check_positive("sd", self.sd)

    def __call__(self, at: Nodes) -> Tensor:
        return snr(at) + 1 / self.sd**2


WEIGHTS: dict[str, Weight] = {
    "truncated_snr": truncated_snr,
    "snr+1": snr_plus_one,
    "min_snr": MinSNR(),
    "p2": P2(),
    "edm": EDMWeight(),
}


def weight_of(weight: str | Weight) -> Weight:
    """The weight of this name, or the function itself."""
    if not isinstance(weight, str):
        return weight
    if weight not in WEIGHTS:
        raise ValueError(f"unknown weight {weight!r}; choose one of {', '.join(WEIGHTS)} or pass a function of Nodes")
    return WEIGHTS[weight]


def of_output(weight: Weight, prediction: Prediction, at: Nodes) -> Tensor:
    """The factor of the squared error of what a network says that gives the error of x0 this weight, [B], float64."""
    at = Nodes(at.t, at.alpha.clamp(min=LEAST), at.sigma)
    q = torch.as_tensor(prediction.output(at.alpha, at.sigma)[1])
    return weight(at) / q.square()


def check_weight(weight: Weight, model: Denoiser) -> None:
    """Raises ValueError for a weight of another shape, and where it is negative, not finite or beyond all measure."""
    schedule = model.schedule
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    found = of_output(weight, model.prediction, nodes(schedule, ends))
    if found.shape != ends.shape:
        raise ValueError(f"a weight gives a number for each of the nodes [2], got shape {list(found.shape)}")
    for t, number in zip(ends.tolist(), found.tolist()):
        if not 0 <= number < 1e8:
            raise ValueError(
                f"at t = {t:g} this weight makes {number:.3g} of the squared error of {model.prediction.name}: take "
                f"another weight, a network that predicts v, or a schedule that ends at a larger alpha"
            )
