"""Multistep solvers in a free variable: a polynomial through the last values of eps (x0, flow), integrated.

Of one family are DPM-Solver++ (x0 in lam; Lu et al. 2022, arXiv:2211.01095), DPM-Solver (eps in lam; arXiv:2206.00927),
DEIS-tAB (eps in t; Zhang and Chen 2022, arXiv:2204.13902) and Adams-Bashforth (eps in sigma / alpha; Liu et al. 2022,
arXiv:2202.09778, and k-diffusion's `lms`). Which variable makes a given model's values most like a polynomial is a
matter of measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsample.grid import Grid, Node
from fastsample.schedule import Schedule

from .forms import Array, Form, check_number, check_order, form_of
from .types import Predictor

GAUSS = np.polynomial.legendre.leggauss(16)  # points in [-1, 1] and weights
SMALLEST = 1e-3  # of the constants of a variable: below, one evaluation's place is all places in float64

Variable = Callable[[Schedule, Array], Array]  # the variable at log(alpha / sigma) = lam
Known = list[tuple[Tensor, Node]]  # values and where they were taken, newest first
Weights = Callable[[Sequence[Node], Node, Node], Sequence[float]]  # (where the values are, s, t) -> the share of each


@dataclass(frozen=True)
class Lam:
    """log(alpha / sigma). Infinite at sigma = 0: the step to it is of order 1."""

    def __call__(self, schedule: Schedule, lam: Array) -> Array:
        return lam


@dataclass(frozen=True)
class Level:
    """(sigma / alpha)^(1 / rho)."""

    rho: float = 1.0

    def __post_init__(self) -> None:
        check_number("rho of Level", self.rho, SMALLEST)

    def __call__(self, schedule: Schedule, lam: Array) -> Array:
        return np.exp(-lam / self.rho)


@dataclass(frozen=True)
class Time:
    """The schedule's own t."""

    def __call__(self, schedule: Schedule, lam: Array) -> Array:
        return np.asarray(schedule.time(torch.from_numpy(np.atleast_1d(lam))).numpy(), dtype=np.float64)


@dataclass(frozen=True)
class Tau:
    """sigma / (alpha + sigma), in [0, 1]: the time of rectified flow."""

    def __call__(self, schedule: Schedule, lam: Array) -> Array:
        return np.exp(-np.logaddexp(0, lam))


@dataclass(frozen=True)
class Angle:
    """atan((sigma / alpha) / sigma_data), finite from noise to data; sigma_data: the data's standard deviation."""

    sigma_data: float = 0.75

    def __post_init__(self) -> None:
        check_number("sigma_data of Angle", self.sigma_data, SMALLEST)

    def __call__(self, schedule: Schedule, lam: Array) -> Array:
        return np.arctan2(np.exp(-lam), self.sigma_data)


VARIABLES: dict[str, Variable] = {
    "lam": Lam(),
    "sigma": Level(),
    "root": Level(7.0),  # Karras et al. 2022 space their levels evenly in it
    "t": Time(),
    "tau": Tau(),
    "angle": Angle(),
}


def multistep(
    model: Predictor,
    x: Tensor,
    grid: Grid,
    *,
    predicts: str = "eps",
    variable: str | Variable = "angle",
    order: int = 3,
    corrector: bool = False,
) -> Tensor:
    """Multistep with a polynomial in a free variable. Order `order`, one evaluation a step. Sources: see the module.

    predicts: what the polynomial stands for, "eps", "x0" or "flow", whatever the network itself predicts. eps
        cannot start at alpha = 0 (ValueError).
    variable: of the polynomial: "lam", "sigma" (sigma / alpha), "root" (its 7th root), "t", "tau" (sigma over alpha +
        sigma), "angle" (atan of sigma / alpha over 0.75); or `Angle(0.5)`, `Level(rho)`, or a function (schedule, lam).
    order: 1 to 4, reached over the first steps. The step to sigma = 0 has order 1 where the variable is infinite there.
    corrector: repeat each step, but the last, once the evaluation at its end is there; that evaluation is not repeated.
        One order more; Zhao et al. 2023, arXiv:2302.04867, Alg. 1, with these polynomials.
    """
    check_order(order, 4, "multistep")
    form, g = form_of(predicts), variable_of(variable)
    form.check(grid, "multistep")
    return run(model, x, grid, form, order, corrector, lambda nodes, s, t: weights(form, g, grid.schedule, nodes, s, t))


def variable_of(variable: str | Variable) -> Variable:
    """The variable of this name, or the function itself."""
    if callable(variable):
        return variable
    if not isinstance(variable, str) or variable not in VARIABLES:
        raise ValueError(f"unknown variable {variable!r}; choose one of {', '.join(VARIABLES)}, or pass a function")
    return VARIABLES[variable]


def run(model: Predictor, x: Tensor, grid: Grid, form: Form, order: int, corrector: bool, shares: Weights) -> Tensor:
    """The loop of every multistep solver with a corrector or without: predict a step, then correct it at its end."""
    known: Known = []
    before = x  # the corrected state at known[0]
    for k, (s, t) in enumerate(grid.steps()):
        value = form.value(x, model.predict(x, s), s)
        if corrector and known:
            x = advance(form, shares, before, [*known, (value, s)], s)
        before = x
        known = [(value, s), *known][: grid.order(k, order)]
        x = advance(form, shares, x, known, t)
    return x


def advance(form: Form, shares: Weights, x: Tensor, known: Known, t: Node) -> Tensor:
    """Move x from the node of known[0] to t by the weighted mean of all that is known."""
    (newest, s), *others = known
    mean = newest
    for (value, _), share in zip(others, shares([node for _, node in known], s, t)[1:]):
        if share:
            mean = mean + share * (value - newest)
    return form.step(x, mean, s, t)


def weights(form: Form, g: Variable, schedule: Schedule, nodes: Sequence[Node], s: Node, t: Node) -> list[float]:
    """The means over the step from s to t of the Lagrange polynomials in g through `nodes`; they add up to 1.

    A node where g is infinite counts nothing, which is the limit. Where g is infinite at t the newest alone counts.
    """
    if len(nodes) == 1:
        return [1.0]
    places = g(schedule, np.array([node.lam for node in (*nodes, t)]))
    near = np.isfinite(places[:-1])
    shares = np.zeros(len(nodes))
    if not np.isfinite(places[-1]) or not near.any():
        shares[0] = 1.0
    elif near.sum() == 1:
        shares[near] = 1.0
    elif form.name == "x0" and t.sigma == 0:  # q is infinite there: all but the end counts nothing
        shares[near] = lagrange(places[:-1][near], places[-1:])[:, 0]
    else:
        lam, share = quadrature(form, s.lam, t.lam)
        shares[near] = lagrange(places[:-1][near], g(schedule, lam)) @ share
    return [float(share) for share in shares]


def quadrature(form: Form, start: float, end: float) -> tuple[Array, Array]:
    """Points in lam and their weights for a mean over q from lam = start to end, either may be infinite.

    Gauss-Legendre with 16 points on pieces of at most 1 in lam, where every integrand here is smooth; 40 from where
    the weight is greatest nothing is left of it in float64.
    """
    low = max(start, min(end, form.peak) - 40)
    high = min(end, max(start, form.peak) + 40)
    pieces = np.linspace(low, high, max(1, math.ceil(high - low)) + 1)
    points, share = GAUSS
    lam = (pieces[:-1, None] + (pieces[1] - pieces[0]) * (points + 1) / 2).ravel()
    log_weight = form.log_density(lam)
    weight = np.tile(share, len(pieces) - 1) * np.exp(log_weight - log_weight.max())
    return lam, weight / weight.sum()


def lagrange(places: Array, points: Array) -> Array:
    """The Lagrange polynomials through `places` at `points`: [places, points]."""
    found = np.ones((len(places), len(points)))
    for j, own in enumerate(places):
        for i, other in enumerate(places):
            if i != j:
                found[j] *= (points - other) / (own - other)
    return found
