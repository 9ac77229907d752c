"""The frames in which the probability-flow ODE is an integral: y = x / scale, dy / dq = value, for every schedule.

    value   scale                    q                          finite at
    eps     alpha                    sigma / alpha              sigma = 0
    x0      sigma                    alpha / sigma              alpha = 0, and at sigma = 0 in the limit
    flow    alpha + sigma            sigma / (alpha + sigma)    both

Held constant, each of the three makes the DDIM step, for x0 and eps are then constant too. (v = alpha eps - sigma x0
over the angle would not: its one step to sigma = 0 misses x0.)

A solver holds the value over a step, or a polynomial through its last ones, and integrates over q. With x0 and eps
and polynomials in lam these are DPM-Solver++ and DPM-Solver: Lu et al. 2022, arXiv:2206.00927, Prop. 3.1, and
arXiv:2211.01095, Prop. 4.1. With flow they are methods for rectified flow: Liu et al. 2022, arXiv:2209.03003.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastsample.grid import Grid, Node, exponential_step

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Form:
    """One row of the table above.

    value(x, x0, node): what is integrated. step(x, mean, s, t): x at t, from x at s and the mean of the value over q.
    log_density(lam): log |dq / dlam| up to a constant; peak: the lam where it is greatest.
    """

    name: str
    value: Callable[[Tensor, Tensor, Node], Tensor]
    step: Callable[[Tensor, Tensor, Node, Node], Tensor]
    log_density: Callable[[Array], Array]
    peak: float

    def check(self, grid: Grid, solver: str) -> None:
        """Raise ValueError where the grid starts at alpha = 0 and the value is eps, which says nothing of x0 there."""
        first = grid.nodes[0]
        if first.alpha == 0 and self.name == "eps":
            raise ValueError(
                f"{solver} moves x / alpha by eps, and the grid starts at alpha = 0 (t = {first.t:g}); start it at "
                f"t < {first.t:g}, or use a solver for x0 or flow, such as dpmpp_2m or flow_2m"
            )


def eps_of(x: Tensor, x0: Tensor, node: Node) -> Tensor:
    """The noise prediction that belongs to x0."""
    return (x - node.alpha * x0) / node.sigma


def level_step(x: Tensor, eps: Tensor, s: Node, t: Node) -> Tensor:
    """Move x from node s to node t with eps held constant: the DDIM step, written in eps. Finite at sigma_t = 0."""
    scale = t.alpha / s.alpha
    return scale * x + scale * s.sigma * math.expm1(s.lam - t.lam) * eps


def _flow_step(x: Tensor, flow: Tensor, s: Node, t: Node) -> Tensor:
    before, after = s.alpha + s.sigma, t.alpha + t.sigma
    return after / before * x + after * (t.sigma / after - s.sigma / before) * flow


EPS = Form("eps", eps_of, level_step, lambda lam: -lam, -math.inf)
X0 = Form("x0", lambda x, x0, node: x0, exponential_step, lambda lam: lam, math.inf)
FLOW = Form(
    "flow", lambda x, x0, node: eps_of(x, x0, node) - x0, _flow_step, lambda lam: -lam - 2 * np.logaddexp(0, -lam), 0.0
)

FORMS = {form.name: form for form in (EPS, X0, FLOW)}


def form_of(name: str) -> Form:
    """The form of this name: 'eps', 'x0' or 'flow'."""
    if name not in FORMS:
        raise ValueError(f"predicts must be what the solver integrates, one of {', '.join(FORMS)}, got {name!r}")
    return FORMS[name]


def check_order(order: int, most: int, solver: str) -> None:
    """Raise ValueError where a solver has no such order."""
    if not isinstance(order, Integral) or order not in range(1, most + 1):
        raise ValueError(f"{solver} has orders 1 to {most}, got {order!r}")


def check_number(name: str, value: float, low: float = 0.0, high: float = math.inf, hint: str = "") -> None:
    """Raise ValueError where an option is no finite number from low to high."""
    if not (isinstance(value, Real) and math.isfinite(value) and low <= value <= high):
        within = f"lie in [{low:g}, {high:g}]" if math.isfinite(high) else f"be a number of at least {low:g}"
        within = within if math.isfinite(low) else "be a finite number"
        raise ValueError(f"{name} must {within}, got {value!r}{hint}")


def check_levels(s_tmin: float, s_tmax: float) -> None:
    """Raise ValueError where these are no two levels sigma / alpha with one below the other; s_tmax may be infinite."""
    numbers = isinstance(s_tmin, Real) and isinstance(s_tmax, Real)
    if not (numbers and 0 <= s_tmin <= s_tmax):
        raise ValueError(f"s_tmin and s_tmax are levels sigma / alpha, 0 <= s_tmin <= s_tmax, got {s_tmin!r} and "
                         f"{s_tmax!r}")  # fmt: skip
