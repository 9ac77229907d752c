"""DPM-Solver and DPM-Solver++: exponential integrators in lam = log(alpha / sigma), for eps and for x0.

Lu et al. 2022, arXiv:2206.00927 (eps) and arXiv:2211.01095 (x0). Where both have a solver it is one function in two
forms, see forms.py; the names of those for eps begin with dpm_solver, and they cannot start at alpha = 0 (ValueError).

At sigma = 0, h is infinite and only the constant term stays finite: that step is of first order. At alpha = 0
it is infinite too, and the difference to the first evaluation, infinitely far away, counts nothing.

On a grid with `lower_order_final` the singlestep solvers too fall to order 1 over the last steps, with as few
evaluations.
"""

from __future__ import annotations

import math

from torch import Tensor

from fastsample.grid import Grid, Node

from .exponential import means
from .forms import EPS, X0, Form, check_number
from .types import Predictor


def dpmpp_1(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """DPM-Solver++(1). Order 1, one evaluation a step; equals `ddim`. Lu et al. 2022, arXiv:2211.01095, Sec. 4.1."""
    return _singlestep(model, x, grid, X0, 1)


def dpmpp_2m(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """DPM-Solver++(2M). Order 2, one evaluation a step. Lu et al. 2022, arXiv:2211.01095, Alg. 2."""
    return _two_step(model, x, grid, X0)


def dpmpp_3m(model: Predictor, x: Tensor, grid: Grid, *, curvature: float = 1.0) -> Tensor:
    """DPM-Solver++(3M). Order 3, one evaluation a step. Lu et al. 2022, arXiv:2211.01095, Sec. 4, with k = 3.

    curvature: the share of the second difference of x0 to use. 1 has order 3. The official code, diffusers and
        k-diffusion halve it (0.5), which has order 2 and is at times the better one at very few steps.
    """
    return _three_step(model, x, grid, X0, curvature)


def dpmpp_2s(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """DPM-Solver++(2S). Order 2. Lu et al. 2022, arXiv:2211.01095, Alg. 1 with r = 1/2.

    Two evaluations a step, the second in the middle in lam; one where the step is infinite in lam (from alpha = 0 or
    to sigma = 0), which the paper does not treat.
    """
    return _singlestep(model, x, grid, X0, 2)


def dpmpp_3s(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """DPM-Solver++(3S). Order 3, three evaluations a step, one where it is infinite in lam. The authors' code of
    Lu et al. 2022, arXiv:2211.01095: `dpm_solver_3` written for x0.
    """
    return _singlestep(model, x, grid, X0, 3)


def dpm_solver_1(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """DPM-Solver-1. Order 1, one evaluation a step; equals `ddim`. Lu et al. 2022, arXiv:2206.00927, Eq. 3.7."""
    return _singlestep(model, x, grid, EPS, 1)


def dpm_solver_2(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """DPM-Solver-2. Order 2. Lu et al. 2022, arXiv:2206.00927, Alg. 1 (r = 1/2); "dpm_2" of k-diffusion.

    Two evaluations a step, one to sigma = 0. Also the second-order solver of Karras et al. 2022, arXiv:2206.00364,
    Alg. 3 (App. D.2) with alpha = 1/2, with the middle placed in lam.
    """
    return _singlestep(model, x, grid, EPS, 2)


def dpm_solver_3(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """DPM-Solver-3. Order 3, three evaluations a step, one to sigma = 0. Lu et al. 2022, arXiv:2206.00927, Alg. 2."""
    return _singlestep(model, x, grid, EPS, 3)


def dpm_solver_2m(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """DPM-Solver(2M): `dpmpp_2m` for eps. Order 2, one evaluation a step. The authors' code of arXiv:2206.00927."""
    return _two_step(model, x, grid, EPS)


def dpm_solver_3m(model: Predictor, x: Tensor, grid: Grid, *, curvature: float = 1.0) -> Tensor:
    """DPM-Solver(3M): `dpmpp_3m` for eps. Order 3, one evaluation a step. The authors' code of arXiv:2206.00927.

    curvature: as for `dpmpp_3m`; the authors' code halves it.
    """
    return _three_step(model, x, grid, EPS, curvature)


def _two_step(model: Predictor, x: Tensor, grid: Grid, form: Form) -> Tensor:
    form.check(grid, "dpm_solver_2m")
    old: tuple[Tensor, Node] | None = None
    for k, (s, t) in enumerate(grid.steps()):
        value = mean = form.value(x, model.predict(x, s), s)
        if old and t.sigma > 0 and grid.order(k, 2) == 2:
            mean = value + 0.5 * ((t.lam - s.lam) / (s.lam - old[1].lam)) * (value - old[0])
        x = form.step(x, mean, s, t)
        old = value, s
    return x


def _three_step(model: Predictor, x: Tensor, grid: Grid, form: Form, curvature: float) -> Tensor:
    form.check(grid, "dpm_solver_3m")
    check_number("curvature", curvature, -math.inf)
    old: list[tuple[Tensor, Node]] = []  # newest first
    for k, (s, t) in enumerate(grid.steps()):
        value = mean = form.value(x, model.predict(x, s), s)
        order = min(grid.order(k, 3), len(old) + 1) if t.sigma > 0 else 1
        if order >= 2:
            (v1, n1), h = old[0], t.lam - s.lam
            u, u2 = means(form, h, 2)
            slope = (value - v1) * (h / (s.lam - n1.lam))  # Newton's divided differences, in units of h
            mean = value + u * slope
        if order == 3:
            v2, n2 = old[1]
            bend = (slope - (v1 - v2) * (h / (n1.lam - n2.lam))) * (h / (s.lam - n2.lam))
            mean = mean + (u * (s.lam - n1.lam) / h + curvature * u2) * bend
        x = form.step(x, mean, s, t)
        old = [(value, s), *old[:1]]
    return x


def _singlestep(model: Predictor, x: Tensor, grid: Grid, form: Form, order: int) -> Tensor:
    form.check(grid, f"dpm_solver_{order}")
    for k, (s, t) in enumerate(grid.steps()):
        h = t.lam - s.lam
        value = mean = latest = form.value(x, model.predict(x, s), s)
        stages = grid.order(k, order) if math.isfinite(h) else 1
        for stage in range(1, stages):  # each takes the slope from s to the one before
            r = stage / stages
            middle = grid.node(s.lam + r * h)
            if stage == 2:
                mean = value + (means(form, r * h, 1)[0] * stages * r) * (latest - value)
            at = form.step(x, mean, s, middle)
            latest = form.value(at, model.predict(at, middle), middle)
        if stages == 2:
            mean = latest
        elif stages == 3:
            mean = value + means(form, h, 1)[0] / r * (latest - value)
        x = form.step(x, mean, s, t)
    return x
