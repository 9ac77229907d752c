"""Solvers in the flow eps - x0, for rectified flow and any other schedule; all start at alpha = 0 as they are.

In the frame y = x / (alpha + sigma) with tau = sigma / (alpha + sigma), dy / dtau = eps - x0: for `fs.Flow` y = x and
tau is the network's own time. Euler there is `euler`, whatever the shift.
"""

from __future__ import annotations

from torch import Tensor

from fastsample.grid import Grid

from .forms import FLOW
from .multistep import multistep
from .types import Predictor


def flow_heun(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """Heun on dx / dtau = flow. Order 2, two evaluations a step, one to sigma = 0.

    Liu et al. 2022, arXiv:2209.03003, Sec. 2, solve their ODE with Runge-Kutta methods; this is that of order 2.
    """
    for s, t in grid.steps():
        start = flow = FLOW.value(x, model.predict(x, s), s)
        if t.sigma > 0:
            end = FLOW.step(x, start, s, t)
            flow = 0.5 * (start + FLOW.value(end, model.predict(end, t), t))
        x = FLOW.step(x, flow, s, t)
    return x


def flow_2m(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """Adams-Bashforth on dx / dtau = flow, on the steps as they are. Order 2, one evaluation a step.

    `multistep` of the flow in tau. Hairer, Norsett and Wanner 1993, Solving Ordinary Differential Equations I, III.5.
    """
    return multistep(model, x, grid, predicts="flow", variable="tau", order=2)
