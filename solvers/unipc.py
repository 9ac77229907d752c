"""UniPC: a predictor and a corrector of one form, for x0, with B(h) = B_2(h). Zhao et al. 2023, arXiv:2302.04867."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastsample.grid import Grid, Node, exponential_step

from .exponential import moments
from .types import Predictor


def unipc_2(model: Predictor, x: Tensor, grid: Grid, *, lower_order_final: bool = False) -> Tensor:
    """`unipc` of order 2, with its corrector of order 3. Zhao et al. 2023, arXiv:2302.04867."""
    return unipc(model, x, grid, order=2, lower_order_final=lower_order_final)


def unipc_3(model: Predictor, x: Tensor, grid: Grid, *, lower_order_final: bool = False) -> Tensor:
    """`unipc` of order 3, with its corrector of order 4. Zhao et al. 2023, arXiv:2302.04867."""
    return unipc(model, x, grid, order=3, lower_order_final=lower_order_final)


def unipc(model: Predictor, x: Tensor, grid: Grid, *, order: int, lower_order_final: bool = False) -> Tensor:
    """UniP-p then UniC-p. Order p + 1, one evaluation a step. Zhao et al. 2023, arXiv:2302.04867, Alg. 1 and 2.

    The corrector repeats a step once the evaluation at its end is there; that evaluation is not repeated. The last
    step is not corrected. The order rises from 1 over the first steps.
    lower_order_final: let it fall to 1 again over the last steps, as the official code does. Much better where the
        last steps are long in lam (quadratic_t) and few; with many steps the last one leaves the whole at order 2.
    """
    known: list[tuple[Tensor, Node]] = []  # (x0, node), newest first
    before = x  # the corrected state at known[0]
    for k, (s, t) in enumerate(grid.steps()):
        x0 = model.predict(x, s)
        if known:
            x = unified_step(before, [*known, (x0, s)], s)
        before = x
        known = [(x0, s), *known][: min(order, len(grid) - k) if lower_order_final else order]
        x = unified_step(x, known if t.sigma > 0 else known[:1], t)
    return x


def unified_step(x: Tensor, known: list[tuple[Tensor, Node]], t: Node) -> Tensor:
    """Move x from the node of known[0] to t, with x0 a polynomial in lam through all of `known`.

    B_2(h) is the factor of x0 in `exponential_step` itself, so the weights a_m / r_m of the differences are all that
    remains of the paper's formula. B has an effect only where there is one difference: there the paper sets a_1 = 1/2.
    """
    (x0, s), *others = known
    h = t.lam - s.lam
    r = np.array([1.0 if node == t else (node.lam - s.lam) / h for _, node in others])
    mean = x0
    for (other, _), weight in zip(others, _weights(r, h)):
        mean = mean + weight * (other - x0)
    return exponential_step(x, mean, s, t)


def _weights(r: NDArray[np.float64], h: float) -> list[float]:
    """a / r, where sum_m a_m r_m^(i-1) = the i-th moment; 0 for a point at r = -inf, which is alpha = 0."""
    if len(r) < 2:
        return [0.5 / value for value in r.tolist()]
    near = np.isfinite(r)
    weights = np.zeros_like(r)
    powers = np.vander(r[near], increasing=True).T
    weights[near] = np.linalg.solve(powers, moments(h, len(powers))) / r[near]
    return list(weights.tolist())
