"""Batches whose samples each stand at a time of their own: t is [B], float64, in the schedule's units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsample.denoiser import TIMES, Denoiser
from fastsample.grid import node
from fastsample.schedule import EDM, VP, Schedule


def random_times(schedule: Schedule, size: int, device: torch.device) -> Tensor:
    """Times to train at: uniform over the indices of VP (Ho et al. 2020, arXiv:2006.11239, Alg. 1), ln(t) normal for
    EDM (Karras et al. 2022, arXiv:2206.00364, Table 1), else uniform from t_min to t_max.
    """
    if isinstance(schedule, VP):
        return torch.randint(len(schedule.betas), (size,), device=device).double()
    if isinstance(schedule, EDM):
        t = (1.2 * torch.randn(size, device=device, dtype=torch.float64) - 1.2).exp()
        return t.clamp(schedule.t_min, schedule.t_max)
    share: Tensor = torch.rand(size, device=device, dtype=torch.float64)
    return schedule.t_min + share * (schedule.t_max - schedule.t_min)


def noisy(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """alpha x0 + sigma eps. Ho et al. 2020, arXiv:2006.11239, Eq. 4."""
    return column(schedule.alpha(t), x0) * x0 + column(schedule.sigma(t), x0) * eps


def output_at(model: Denoiser, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
    """What the network itself says at x and t, in float32."""
    return model.output(x, _network_time(model, t).to(x.dtype), **condition)


def x0_at(model: Denoiser, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
    """The model's x0 at x and t, in float32: `Denoiser.predict` for samples at different times."""
    u, w = model.prediction.x0(model.schedule.alpha(t), model.schedule.sigma(t))
    return column(u, x) * x + column(w, x) * output_at(model, x, t, **condition)


def column(number: Tensor, x: Tensor) -> Tensor:
    """One number a sample, [B], shaped to multiply x [B, ...]."""
    return number.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def _network_time(model: Denoiser, t: Tensor) -> Tensor:
    """t in the units of the network; `Denoiser.time` is made for one node, so the usual units are written again."""
    schedule = model.schedule
    if model.time is TIMES["t"]:
        return t
    if model.time is TIMES["index"]:
        return schedule.index(t)
    if model.time is TIMES["unit"]:
        return schedule.unit(t)
    if model.time is TIMES["sigma"]:
        return (-schedule.lam(t)).exp()
    if model.time is TIMES["log_sigma"]:
        return -schedule.lam(t) / 4
    times = [model.time(schedule, node(schedule, moment)) for moment in t.tolist()]
    return torch.tensor(times, dtype=torch.float64, device=t.device)
