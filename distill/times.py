"""Where training asks a network: random times, and data made noisy there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.grid import Nodes, nodes, per_sample
from fastsample.schedule import EDM, VP, Schedule

from . import draws


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
