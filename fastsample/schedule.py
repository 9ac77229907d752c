"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps.   lam = log(alpha / sigma), half the log-SNR.

Every method takes a number or a tensor of times and returns a float64 tensor; `index` and `unit`, which the
sampling loop asks at every step, return a number for a number. Time runs from `t_max` (noise) down to
`t_min` (the least noisy time that networks of this schedule are trained at); sigma is 0 at `t_zero`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Times = float | Tensor
T = TypeVar("T", float, Tensor)


class Schedule:
    """What a grid, a denoiser and a trainer need of a schedule; subclasses give alpha, sigma and `time`."""

    t_min: float
    t_max: float
    t_zero: float = 0.0
    default_time: str = "t"  # how networks of this schedule are usually told the time, see denoiser.TIMES

    def alpha(self, t: Times) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define alpha(t)")

    def sigma(self, t: Times) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define sigma(t)")

    def lam(self, t: Times) -> Tensor:
        return self.alpha(t).log() - self.sigma(t).log()

    def time(self, lam: Times) -> Tensor:
        """The time at which log(alpha / sigma) = lam: the exact inverse of `lam`."""
        raise NotImplementedError(f"{type(self).__name__} must define time(lam)")

    def index(self, t: T) -> T:
        """The time as an index 0..999, for networks trained with one."""
        raise ValueError(f"{type(self).__name__} has no time index; give the Denoiser another `time=`")

    def unit(self, t: T) -> T:
        """The time in [0, 1], for networks trained with one."""
        raise ValueError(f"{type(self).__name__} has no time in [0, 1]; give the Denoiser another `time=`")


class VariancePreserving(Schedule):
    """Schedules with alpha^2 + sigma^2 = 1, given by log(alpha) alone, which keeps lam exact at both ends."""

    def log_alpha(self, t: Times) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define log_alpha(t)")

    def alpha(self, t: Times) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Times) -> Tensor:
        return torch.expm1(2 * self.log_alpha(t)).abs().sqrt()  # abs: sigma(t_zero) is 0, not -0

    def lam(self, t: Times) -> Tensor:
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * (-torch.expm1(2 * log_alpha)).log()


def _log_alpha_at(lam: Times) -> Tensor:
    lam = _float64(lam)
    return -0.5 * torch.logaddexp(torch.zeros_like(lam), -2 * lam)


@dataclass(frozen=True)
class VP(VariancePreserving):
    """Variance preserving, from a table of betas; t is the index 0 .. len(betas) - 1.

    Between indices log(alpha) is interpolated linearly, as in the code of DPM-Solver (Lu et al. 2022,
    arXiv:2206.00927), and alpha itself where log(alpha) falls to -inf (zero terminal SNR). t = -1 is the clean end,
    sigma = 0.
    Ho et al. 2020, arXiv:2006.11239, Eq. 4.
    """

    betas: tuple[float, ...]
    t_min = 0.0
    t_zero = -1.0
    default_time = "index"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(float(beta) for beta in self.betas))
        if len(self.betas) < 2:
            raise ValueError(f"a VP schedule needs at least 2 betas, got {len(self.betas)}")
        wrong = [beta for beta in self.betas[:-1] if not 0 < beta < 1]
        if wrong or not 0 < self.betas[-1] <= 1:
            wrong = wrong or [self.betas[-1]]
            raise ValueError(f"betas must lie in (0, 1) (the last may be 1: zero terminal SNR), got {wrong[0]:g}")

    def __repr__(self) -> str:  # a thousand betas help nobody
        return f"VP({len(self.betas)} betas, {self.betas[0]:g} .. {self.betas[-1]:g})"

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return len(self.betas) - 1.0

    @classmethod
    def linear(cls, start: float = 1e-4, end: float = 0.02, steps: int = 1000) -> VP:
        """Ho et al. 2020, arXiv:2006.11239, Sec. 4."""
        return cls(tuple(np.linspace(start, end, steps)))

    @classmethod
    def scaled_linear(cls, start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> VP:
        """Linear in sqrt(beta). Rombach et al. 2022, arXiv:2112.10752 (Stable Diffusion)."""
        return cls(tuple(np.linspace(start**0.5, end**0.5, steps) ** 2))

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> VP:
        """Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 17."""
        bar = np.cos((np.arange(steps + 1) / steps + offset) / (1 + offset) * np.pi / 2) ** 2
        return cls(tuple(np.minimum(1 - bar[1:] / bar[:-1], max_beta)))

    @classmethod
    def sigmoid(cls, start: float = 1e-4, end: float = 0.02, steps: int = 1000) -> VP:
        """Betas along a sigmoid from -6 to 6. Xu et al. 2022, arXiv:2203.02923 (GeoDiff)."""
        return cls(tuple(start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps)))))

    def zero_terminal_snr(self) -> VP:
        """The same schedule with alpha shifted and scaled to end at 0. Lin et al. 2023, arXiv:2305.08891, Alg. 1."""
        alpha = np.sqrt(np.cumprod(1 - np.asarray(self.betas)))
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        bar = np.concatenate([[1.0], alpha**2])
        return VP(tuple(1 - bar[1:] / bar[:-1]))

    @cached_property
    def _table(self) -> Tensor:  # log(alpha) at t = -1, 0, 1, ...
        steps = torch.log1p(-torch.tensor(self.betas, dtype=torch.float64))
        return torch.cat([steps.new_zeros(1), 0.5 * steps.cumsum(0)])

    def log_alpha(self, t: Times) -> Tensor:
        u = _float64(t) + 1
        table = self._table.to(u.device)
        i = u.long().clamp(0, len(self.betas) - 1)
        low, high = table[i], table[i + 1]
        log_alpha = torch.lerp(low, high, u - i)
        return log_alpha if self.betas[-1] < 1 else torch.where(high.isinf(), low + torch.log1p(i - u), log_alpha)

    def time(self, lam: Times) -> Tensor:
        log_alpha = _log_alpha_at(lam)
        table = self._table.to(log_alpha.device)
        i = torch.searchsorted(-table, -log_alpha, right=True).sub(1).clamp(0, len(self.betas) - 1)
        low, high = table[i], table[i + 1]
        w = torch.where(high.isinf(), -torch.expm1(log_alpha - low), (log_alpha - low) / (high - low))
        return i + w - 1

    def index(self, t: T) -> T:
        return _exact(t)

    def unit(self, t: T) -> T:
        return (_exact(t) + 1) / len(self.betas)


@dataclass(frozen=True)
class VPContinuous(VariancePreserving):
    """beta(t) = beta_min + t (beta_max - beta_min), t in [0, 1]. Song et al. 2021, arXiv:2011.13456, Eq. 32."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0
    default_time = "unit"

    def __post_init__(self) -> None:
        if not 0 < self.beta_min < self.beta_max < math.inf:
            raise ValueError(f"need 0 < beta_min < beta_max, both finite, got {self.beta_min:g} and {self.beta_max:g}")
        _check_range(self.t_min, self.t_max)

    def log_alpha(self, t: Times) -> Tensor:
        t = _float64(t)
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def time(self, lam: Times) -> Tensor:
        loss = -_log_alpha_at(lam)  # the root of a quadratic, in the form that does not cancel for small t
        half = 0.5 * self.beta_min
        return 2 * loss / (half + (half**2 + (self.beta_max - self.beta_min) * loss).sqrt())

    def index(self, t: T) -> T:
        return 999 * _exact(t)

    def unit(self, t: T) -> T:
        return _exact(t)


@dataclass(frozen=True)
class EDM(Schedule):
    """alpha = 1, sigma = t (variance exploding). Karras et al. 2022, arXiv:2206.00364, Table 1."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    default_time = "sigma"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"need 0 < sigma_min < sigma_max, both finite, got {self.sigma_min:g} and {self.sigma_max:g}"
            )

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return self.sigma_min

    @property
    def t_max(self) -> float:  # type: ignore[override]
        return self.sigma_max

    def alpha(self, t: Times) -> Tensor:
        return torch.ones_like(_float64(t))

    def sigma(self, t: Times) -> Tensor:
        return _float64(t)

    def time(self, lam: Times) -> Tensor:
        return (-_float64(lam)).exp()


@dataclass(frozen=True)
class Flow(Schedule):
    """Rectified flow: alpha = 1 - sigma, sigma = shift t / (1 + (shift - 1) t), t in [0, 1].

    Liu et al. 2022, arXiv:2209.03003; the shift of Esser et al. 2024, arXiv:2403.03206, Eq. 23.
    """

    shift: float = 1.0
    t_min: float = 1e-3
    t_max: float = 1.0
    default_time = "unit"

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"the shift of a flow must be positive and finite, got {self.shift:g}")
        _check_range(self.t_min, self.t_max)

    def alpha(self, t: Times) -> Tensor:
        t = _float64(t)
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Times) -> Tensor:
        return self.unit(_float64(t))

    def time(self, lam: Times) -> Tensor:
        return torch.sigmoid(-_float64(lam) - np.log(self.shift))  # sigma / alpha = shift t / (1 - t)

    def index(self, t: T) -> T:
        return 1000 * self.unit(t)

    def unit(self, t: T) -> T:  # these networks are told sigma
        t = _exact(t)
        return self.shift * t / (1 + (self.shift - 1) * t)


@dataclass(frozen=True)
class TrigFlow(Schedule):
    """alpha = cos(t), sigma = sin(t), for t in [0, pi/2]. Lu and Song 2024, arXiv:2410.11081, Sec. 3.1.

    Their noise has the standard deviation of the data, sigma_data; with unit noise, as here, the data is to be divided
    by it. Training by `distill.ContinuousConsistency` needs neither: it goes over from any schedule by itself.
    t_max: theirs, arctan(80 / 0.5), where sampling starts; at pi/2 alpha is 0.
    """

    t_min: float = 1e-3
    t_max: float = math.atan(160.0)

    def __post_init__(self) -> None:
        if not 0 < self.t_min < self.t_max <= math.pi / 2:
            raise ValueError(f"need 0 < t_min < t_max <= pi/2, got {self.t_min:g} and {self.t_max:g}")

    def alpha(self, t: Times) -> Tensor:
        return (math.pi / 2 - _float64(t)).sin()  # exactly 0 at pi/2, where the cosine is 6e-17

    def sigma(self, t: Times) -> Tensor:
        return _float64(t).sin()

    def time(self, lam: Times) -> Tensor:
        return (-_float64(lam)).exp().atan()


def _check_range(t_min: float, t_max: float) -> None:
    if not 0 < t_min < t_max <= 1:
        raise ValueError(f"need 0 < t_min < t_max <= 1, got {t_min:g} and {t_max:g}")


def _float64(t: Times | Sequence[float]) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)


def _exact(t: T) -> T:
    return t.double() if isinstance(t, Tensor) else t
