"""DPM-Solver++: exponential integrators for x0 in lam = log(alpha / sigma). Lu et al. 2022, arXiv:2211.01095.

At sigma = 0, h is infinite and only the constant term of x0 stays finite: that step is of first order. At alpha = 0
it is infinite too, and the difference to the first evaluation, infinitely far away, counts nothing.
"""

from __future__ import annotations

import math

from torch import Tensor

from fastsample.grid import Grid, Node, exponential_step

from .exponential import moments
from .types import Predictor


def dpmpp_1(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """DPM-Solver++(1). Order 1, one evaluation a step; equals `ddim`. Lu et al. 2022, arXiv:2211.01095, Sec. 4.1."""
    for s, t in grid.steps():
        x = exponential_step(x, model.predict(x, s), s, t)
    return x


def dpmpp_2m(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """DPM-Solver++(2M). Order 2, one evaluation a step. Lu et al. 2022, arXiv:2211.01095, Alg. 2."""
    old: tuple[Tensor, Node] | None = None
    for s, t in grid.steps():
        x0 = model.predict(x, s)
        slope = 0.0 * x0
        if old and t.sigma > 0:
            slope = (x0 - old[0]) * ((t.lam - s.lam) / (s.lam - old[1].lam))
        x = exponential_step(x, x0 + 0.5 * slope, s, t)
        old = x0, s
    return x


def dpmpp_3m(model: Predictor, x: Tensor, grid: Grid, *, curvature: float = 1.0) -> Tensor:
    """DPM-Solver++(3M). Order 3, one evaluation a step. Lu et al. 2022, arXiv:2211.01095, Sec. 4, with k = 3.

    curvature: the share of the second difference of x0 to use. 1 has order 3. The official code, diffusers and
        k-diffusion halve it (0.5), which has order 2 and is at times the better one at very few steps.
    """
    old: list[tuple[Tensor, Node]] = []  # newest first
    for s, t in grid.steps():
        x0 = mean = model.predict(x, s)
        if old and t.sigma > 0:
            (x1, n1), h = old[0], t.lam - s.lam
            u, u2 = moments(h, 2)
            slope = (x0 - x1) * (h / (s.lam - n1.lam))  # Newton's divided differences, in units of h
            mean = x0 + u * slope
        if len(old) == 2 and t.sigma > 0:
            x2, n2 = old[1]
            bend = (slope - (x1 - x2) * (h / (n1.lam - n2.lam))) * (h / (s.lam - n2.lam))
            mean = mean + (u * (s.lam - n1.lam) / h + curvature * u2) * bend
        x = exponential_step(x, mean, s, t)
        old = [(x0, s), *old[:1]]
    return x


def dpmpp_2s(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """DPM-Solver++(2S). Order 2. Lu et al. 2022, arXiv:2211.01095, Alg. 1 with r = 1/2.

    Two evaluations a step, the second in the middle in lam; one where the step is infinite in lam (from alpha = 0 or
    to sigma = 0), which the paper does not treat.
    """
    for s, t in grid.steps():
        x0 = model.predict(x, s)
        if math.isfinite(t.lam - s.lam):
            middle = grid.node((s.lam + t.lam) / 2)
            x0 = model.predict(exponential_step(x, x0, s, middle), middle)
        x = exponential_step(x, x0, s, t)
    return x
