"""Exponential integrators in lam = log(alpha / sigma): what DPM-Solver, DPM-Solver++ and UniPC share.

x_t = (sigma_t / sigma_s) x_s + sigma_t * integral of e^lam x0(lam) from lam_s to lam_t: the linear part is exact, and a
step is `exponential_step` with the mean of x0 under the weight e^lam. Written in eps the weight is e^-lam.
"""

from __future__ import annotations

import math

from .forms import Form


def moments(h: float, count: int) -> list[float]:
    """The means of u, u^2, ..., u^count over u in [0, 1] under the weight e^(h u), h not 0.

    u is the place in a step of size |h| in lam. The i-th is i! phi_{i+1}(-h) / phi_1(-h) with the phi functions of
    Hochbruck and Ostermann 2010, Acta Numerica 19, Sec. 2; integration by parts gives each from the one before.
    """
    total = -1 / math.expm1(-h) if h > -700 else 0.0  # e^700 is near the end of float64
    if abs(h) < 1:  # upwards, each mean would lose the digits of 1 / h; downwards, an error shrinks by h / i
        means = [0.0]
        for i in range(count + 16, 1, -1):
            means.append((total - means[-1]) * h / i)
        return means[: -count - 1 : -1]
    means = [1.0]
    for i in range(1, count + 1):
        means.append(total - i / h * means[-1])
    return means[1:]


def means(form: Form, h: float, count: int) -> list[float]:
    """`moments` over a step of size h in lam under the weight of x0 or eps."""
    return moments(h if form.name == "x0" else -h, count)
