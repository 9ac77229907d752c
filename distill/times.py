"""Where training asks a network: random times, and data made noisy there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastsample.grid import Nodes, nodes, per_sample
from fastsample.schedule import EDM, VP, Schedule

from . import draws


def _check_normal(mean: float, std: float) -> None:
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(f"a normal distribution needs a finite mean and a std above 0, got {mean:g} and {std:g}")


@dataclass(frozen=True)
class Times:
    """A distribution of times, given by its quantiles: uniform numbers in, times out.

    stratified: the i-th of a batch of B draws from the i-th of B equal shares of the distribution, so every batch
        covers it evenly; the loss has the same mean and less noise. Kingma et al. 2021, arXiv:2107.00630, App. I.1, has
        one common offset where each sample has its own here.
    """

    stratified: bool = field(default=False, kw_only=True)

    def quantile(self, schedule: Schedule, share: Tensor) -> Tensor:
        """The times below which these shares of all lie, [B], float64, share in [0, 1)."""
        raise NotImplementedError(f"{type(self).__name__} must define quantile(schedule, share)")

    def shares(self, size: int, device: torch.device) -> Tensor:
        """Uniform numbers in [0, 1) for a batch, [B], float64."""
        drawn = draws.rand(size, device=device, dtype=torch.float64)
        if not self.stratified:
            return drawn
        first, total = draws.place(size)
        return (torch.arange(first, first + size, device=device) + drawn) / total


@dataclass(frozen=True)
class UniformTimes(Times):
    """Uniform over the indices of VP (Ho et al. 2020, arXiv:2006.11239, Alg. 1), else from t_min to t_max."""

    def quantile(self, schedule: Schedule, share: Tensor) -> Tensor:
        return _along(schedule, share)


@dataclass(frozen=True)
class LogNormalTimes(Times):
    """ln(sigma / alpha) is normal. Karras et al. 2022, arXiv:2206.00364, Table 1: -1.2 and 1.2.

    Times beyond the schedule's own move to its ends; those of VP are rounded to indices.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _check_normal(self.mean, self.std)

    def quantile(self, schedule: Schedule, share: Tensor) -> Tensor:
        lam = -(self.mean + self.std * torch.special.ndtri(share))
        t = schedule.time(lam).clamp(schedule.t_min, schedule.t_max)
        return t.round() if isinstance(schedule, VP) else t


@dataclass(frozen=True)
class LogitNormalTimes(Times):
    """ln(u / (1 - u)) is normal, u from 0 at t_min to 1 at t_max. Esser et al. 2024, arXiv:2403.03206, Eq. 19."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_normal(self.mean, self.std)

    def quantile(self, schedule: Schedule, share: Tensor) -> Tensor:
        _check_ends(self, schedule)
        return _along(schedule, torch.sigmoid(self.mean + self.std * torch.special.ndtri(share)))


@dataclass(frozen=True)
class CosMapTimes(Times):
    """For a flow, ln(alpha / sigma) as in the cosine schedule. Esser et al. 2024, arXiv:2403.03206, Eq. 21."""

    def quantile(self, schedule: Schedule, share: Tensor) -> Tensor:
        _check_ends(self, schedule)
        return _along(schedule, 1 - 1 / (torch.tan(math.pi / 2 * share) + 1))


DISTRIBUTIONS: dict[str, Times] = {
    "uniform": UniformTimes(),
    "lognormal": LogNormalTimes(),
    "logit_normal": LogitNormalTimes(),
    "cosmap": CosMapTimes(),
}


def distribution(times: str | Times | None, schedule: Schedule) -> Times:
    """The distribution of this name; None: that of `random_nodes`. Raises ValueError where it does not fit."""
    if times is None:
        return LogNormalTimes() if isinstance(schedule, EDM) else UniformTimes()
    if isinstance(times, str):
        if times not in DISTRIBUTIONS:
            raise ValueError(
                f"unknown times {times!r}; choose one of {', '.join(DISTRIBUTIONS)} or give a distribution, such as "
                f"distill.LogNormalTimes(-0.8, 1.6)"
            )
        times = DISTRIBUTIONS[times]
    times.quantile(schedule, torch.tensor([0.5], dtype=torch.float64))
    return times


def random_nodes(schedule: Schedule, size: int, device: torch.device) -> Nodes:
    """One random time for each sample: uniform over the indices of VP (Ho et al. 2020, arXiv:2006.11239, Alg. 1),
    ln(t) normal for EDM (Karras et al. 2022, arXiv:2206.00364, Table 1), else uniform from t_min to t_max.
    """
    if isinstance(schedule, VP):
        return nodes(schedule, draws.randint(len(schedule.betas), size, device=device))
    if isinstance(schedule, EDM):
        t = (1.2 * draws.randn(size, device=device, dtype=torch.float64) - 1.2).exp()
        return nodes(schedule, t.clamp(schedule.t_min, schedule.t_max))
    share = draws.rand(size, device=device, dtype=torch.float64)
    return nodes(schedule, schedule.t_min + share * (schedule.t_max - schedule.t_min))


def ddim_step(x: Tensor, x0: Tensor, s: Nodes, t: Nodes) -> Tensor:
    """Move x from nodes s to nodes t with x0 held constant. Song et al. 2021, arXiv:2010.02502, Eq. 12."""
    keep = t.sigma / s.sigma
    moved: Tensor = per_sample(keep, x) * x + per_sample(t.alpha - s.alpha * keep, x) * x0
    return moved


def noisy(x0: Tensor, eps: Tensor, at: Nodes) -> Tensor:
    """alpha x0 + sigma eps. Ho et al. 2020, arXiv:2006.11239, Eq. 4."""
    x: Tensor = per_sample(at.alpha, x0) * x0 + per_sample(at.sigma, x0) * eps
    return x


def _along(schedule: Schedule, share: Tensor) -> Tensor:
    """The times at these shares of the way from t_min to t_max; of VP, the indices they fall on."""
    if isinstance(schedule, VP):
        count = len(schedule.betas)
        return (share * count).floor().clamp(max=count - 1)
    return schedule.t_min + share * (schedule.t_max - schedule.t_min)


def _check_ends(times: Times, schedule: Schedule) -> None:
    if isinstance(schedule, EDM):
        raise ValueError(
            f"{times!r} is of times from 0 to 1, and those of {schedule!r} reach over many orders of magnitude; take "
            f"distill.LogNormalTimes()"
        )
