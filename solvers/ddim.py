"""DDPM and DDIM: predict x0, then draw the next state from q(x_t | x_s, x0) or from a narrower kin of it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastsample.grid import Grid, Node

from .forms import check_number
from .types import Predictor


def ddpm(model: Predictor, x: Tensor, grid: Grid, *, large: float = 0.0) -> Tensor:
    """Ancestral sampling. Weak order 1, one evaluation a step. Ho et al. 2020, arXiv:2006.11239, Eq. 7 and Alg. 2.

    large: 0 takes the posterior's variance ("fixed small"), 1 that of the forward step from t to s ("fixed
        large"), between them their geometric mean: Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 15.

    Any grid and schedule, where the paper visits every index of its own table.
    """
    check_number("large", large, 0, 1)
    for s, t in grid.steps():
        x = _posterior_mean(x, model.predict(x, s), s, t)
        if t.sigma > 0:
            std = s.sigma**large * t.sigma ** (1 - large) * math.sqrt(gained(s, t))
            x = x + std * model.noise()
    return x


def ddpm_learned(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """`ddpm` with the variance that the network predicts ("learned_range"). In `fs.solve` only: it is no plan.

    The network's second half of channels places each number's variance between those of large=0 and large=1, on a
    logarithmic scale: Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 15. Raises ValueError where a model has none.
    """
    predict: Any = getattr(model, "predict_with_variance", None)
    if predict is None:
        raise ValueError(
            "ddpm_learned adds noise whose size the network predicts, which no table of numbers holds; run it with "
            "fs.solve, or trace ddpm, whose variance is fixed"
        )
    for s, t in grid.steps():
        x0, share = predict(x, s)
        x = _posterior_mean(x, x0, s, t)
        if t.sigma > 0:
            smallest = t.sigma * math.sqrt(gained(s, t))
            x = x + smallest * (s.sigma / t.sigma) ** share * model.noise()
    return x


def ddim(model: Predictor, x: Tensor, grid: Grid, *, eta: float = 0.0) -> Tensor:
    """DDIM. Order 1, one evaluation a step. Song et al. 2021, arXiv:2010.02502, Eq. 12 and 16.

    eta: how much of the noise is new, in [0, 1]: 0 follows the probability-flow ODE, 1 equals `ddpm`.
    """
    check_number("eta", eta, 0, 1, "; for more noise use ddpm with large=1")
    for s, t in grid.steps():
        x0 = model.predict(x, s)
        eps = (x - s.alpha * x0) / s.sigma
        fresh = eta * t.sigma * math.sqrt(gained(s, t))
        x = t.alpha * x0 + math.sqrt(t.sigma**2 - fresh**2) * eps
        if fresh > 0:
            x = x + fresh * model.noise()
    return x


def _posterior_mean(x: Tensor, x0: Tensor, s: Node, t: Node) -> Tensor:
    """The mean of q(x_t | x_s, x0). Ho et al. 2020, arXiv:2006.11239, Eq. 7, for any schedule."""
    return (s.alpha / t.alpha * (t.sigma / s.sigma) ** 2) * x + t.alpha * gained(s, t) * x0


def noised(model: Predictor, x: Tensor, s: Node, t: Node, s_noise: float = 1.0) -> Tensor:
    """A draw from q(x_t | x_s): x forward from node s to a noisier node t, with noise of standard deviation s_noise."""
    return (t.alpha / s.alpha) * x + (s_noise * t.sigma * math.sqrt(gained(t, s))) * model.noise()


def gained(s: Node, t: Node) -> float:
    """1 - SNR_s / SNR_t: the share of what x_t knows of x0 that x_s did not know; 1 at alpha_s = 0 and at sigma_t = 0.

    The variance of q(x_t | x_s, x0) is sigma_t^2 gained and that of q(x_s | x_t) is sigma_s^2 gained, for every
    schedule; for DDPM these are its beta tilde and beta.
    """
    return -math.expm1(2 * (s.lam - t.lam))
