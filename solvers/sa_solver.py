"""SA-Solver: stochastic Adams, a predictor and a corrector for the SDE. Xue et al. 2023, arXiv:2309.05019."""

from __future__ import annotations

import math
from numbers import Integral

import numpy as np
from torch import Tensor

from fastsample.grid import Grid, Node

from .exponential import moments
from .forms import check_levels, check_number
from .stochastic import reverse
from .types import Predictor


def sa_solver(
    model: Predictor,
    x: Tensor,
    grid: Grid,
    *,
    tau: float = 1.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    predictor: int = 3,
    corrector: int = 4,
) -> Tensor:
    """SA-Predictor and SA-Corrector. One evaluation a step. Xue et al. 2023, arXiv:2309.05019, Alg. 1.

    tau: how much noise: 0 follows the probability-flow ODE, 1 is the reverse SDE (tau^2 is the eta of
        `sde_dpmpp_1`); noise alone where the level sigma / alpha of the step's start is within [s_tmin, s_tmax].
    predictor, corrector: through how many x0 their polynomials in lam go, that at the end of the step included in
        the corrector's (diffusers' `predictor_order` and `corrector_order`; the paper counts one less for the
        corrector). corrector = 0 leaves it out. With tau = 0 the order is the larger of both, at most one above
        the predictor's; with noise the distribution's error falls as 1 / steps^2 at best.

    As the paper's, without diffusers' change to polynomials through two. The corrector repeats a step, with its noise,
    once the evaluation at its end is there; the last step is not corrected. The step to sigma = 0 is of first order.
    """
    check_number("tau", tau, 0, 1e100)  # its square must be finite
    for name, count, least in (("predictor", predictor, 1), ("corrector", corrector, 0)):
        if not (isinstance(count, Integral) and count >= least):
            raise ValueError(f"{name} of sa_solver goes through a whole number of x0, at least {least}, got {count!r}")
    check_levels(s_tmin, s_tmax)
    known: list[tuple[Tensor, Node]] = []  # (x0, node), newest first
    mean, eta = x, 0.0  # of the step before: its mean of x0, its tau^2
    for k, (s, t) in enumerate(grid.steps()):
        x0 = model.predict(x, s)
        if known and corrector:  # the same step again, noise and all, but for its mean of x0
            start = known[0][1]
            better = _mean([(x0, s), *known][: grid.order(k - 1, corrector)], start, s, eta)
            x = x + reverse(start, s, eta)[1] * (better - mean)
        known = [(x0, s), *known][: max(predictor, corrector - 1)]
        eta = tau**2 if s_tmin <= math.exp(-s.lam) <= s_tmax else 0.0
        mean = _mean(known[: grid.order(k, predictor)] if t.sigma > 0 else known[:1], s, t, eta)
        keep, gain, std = reverse(s, t, eta)
        x = keep * x + gain * mean
        if std > 0:
            x = x + std * model.noise()
    return x


def _mean(known: list[tuple[Tensor, Node]], s: Node, t: Node, eta: float) -> Tensor:
    """The mean of x0 from s to t under e^((1 + eta) lam), with x0 a polynomial in lam through `known`."""
    weights = _weights([node for _, node in known], s, t, eta)
    mean = weights[0] * known[0][0]
    for (x0, _), weight in zip(known[1:], weights[1:]):
        mean = mean + weight * x0
    return mean


def _weights(nodes: list[Node], s: Node, t: Node, eta: float) -> list[float]:
    """The weight of each x0 in that mean; they sum to 1.

    A node at alpha = 0 is infinitely far away and counts nothing, unless it is the only one.
    """
    if len(nodes) == 1:
        return [1.0]
    h = t.lam - s.lam
    if not math.isfinite(h):
        return [1.0 if node == (t if t.sigma > 0 else s) else 0.0 for node in nodes]
    u = np.array([(node.lam - s.lam) / h for node in nodes])
    near = np.isfinite(u)
    powers = np.vander(u[near], increasing=True).T
    weights = np.zeros_like(u)
    weights[near] = np.linalg.solve(powers, [1.0, *moments((1 + eta) * h, len(powers) - 1)])
    return list(weights.tolist())
