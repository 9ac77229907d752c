"""Euler and Heun with churn, in the frame y = x / alpha with noise level sigma / alpha. Karras et al. 2022.

dy / d(sigma / alpha) = eps, whatever the schedule: an Euler step is `exponential_step`, and Heun's correction
adds half the change of eps.
"""

from __future__ import annotations

import math

from torch import Tensor

from fastsample.grid import Grid, Node, exponential_step

from .forms import check_levels, check_number
from .types import Predictor


def euler(
    model: Predictor,
    x: Tensor,
    grid: Grid,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler. Order 1, one evaluation a step. Karras et al. 2022, arXiv:2206.00364, Alg. 2 without its lines 9 to 11.

    s_churn, s_tmin, s_tmax, s_noise: as for `heun`. Without churn it equals `ddim`, also at alpha = 0.
    """
    _check_churn(s_churn, s_tmin, s_tmax, s_noise)
    for s, t in grid.steps():
        gamma = _gamma(s, s_churn / len(grid), s_tmin, s_tmax)
        if gamma > 0:
            x, s = _churned(model, x, s, grid, gamma, s_noise)
        x = exponential_step(x, model.predict(x, s), s, t)
    return x


def heun(
    model: Predictor,
    x: Tensor,
    grid: Grid,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun. Order 2, two evaluations a step, one to sigma = 0. Karras et al. 2022, arXiv:2206.00364, Alg. 1 and 2.

    s_churn: noise added over the whole run, as a multiple of the level (0: none, Alg. 1); at most sqrt(2) - 1 a step.
    s_tmin, s_tmax: churn only where the level sigma / alpha lies between them. The noisiest steps may reach beyond
        the schedule's t_max, as in the paper: s_tmax below the largest level prevents it.
    s_noise: the standard deviation of the added noise, slightly above 1 against a network that removes too much.
    Raises ValueError where the grid starts at alpha = 0, where sigma / alpha is infinite; where it is in the thousands
    (`fs.VP.cosine()` starts at 20 000) few steps from there go far astray: start lower.
    """
    _check_start(grid)
    _check_churn(s_churn, s_tmin, s_tmax, s_noise)
    for s, t in grid.steps():
        gamma = _gamma(s, s_churn / len(grid), s_tmin, s_tmax)
        if gamma > 0:
            x, s = _churned(model, x, s, grid, gamma, s_noise)
        x0 = model.predict(x, s)
        eps = (x - s.alpha * x0) / s.sigma
        x = exponential_step(x, x0, s, t)
        if t.sigma > 0:
            change = (x - t.alpha * model.predict(x, t)) / t.sigma - eps
            x = x + 0.5 * (t.sigma - t.alpha * s.sigma / s.alpha) * change
    return x


def _check_churn(s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> None:
    for name, value in (("s_churn", s_churn), ("s_noise", s_noise)):
        check_number(name, value)
    check_levels(s_tmin, s_tmax)


def _gamma(s: Node, churn: float, s_tmin: float, s_tmax: float) -> float:
    level = math.exp(-s.lam)
    return min(churn, math.sqrt(2) - 1) if s_tmin <= level <= s_tmax else 0.0


def _churned(model: Predictor, x: Tensor, s: Node, grid: Grid, gamma: float, s_noise: float) -> tuple[Tensor, Node]:
    """Raise the level sigma / alpha by the factor 1 + gamma and add the noise due; finite also at alpha = 0."""
    raised = grid.node(s.lam - math.log1p(gamma))
    kept = 1 / (1 + gamma)
    fresh = raised.sigma * math.sqrt(1 - kept**2)
    return (raised.sigma / s.sigma * kept) * x + (s_noise * fresh) * model.noise(), raised


def _check_start(grid: Grid) -> None:
    first = grid.nodes[0]
    if first.alpha == 0:
        raise ValueError(
            f"heun moves x / alpha, and the grid starts at alpha = 0 (t = {first.t:g}); start it at "
            f"t < {first.t:g}, or use a solver that moves x itself, such as dpmpp_2m"
        )
