"""UniPC: a predictor and a corrector of one form, polynomials in lam. Zhao et al. 2023, arXiv:2302.04867."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastsample.grid import Grid, Node

from .exponential import means
from .forms import Form, check_order, form_of
from .multistep import run
from .types import Predictor

VARIANTS = ("bh1", "bh2")


def unipc_1(
    model: Predictor, x: Tensor, grid: Grid, *, predicts: str = "x0", variant: str = "bh2", corrector: bool = True
) -> Tensor:
    """`unipc` of order 1, with its corrector of order 2. Zhao et al. 2023, arXiv:2302.04867."""
    return unipc(model, x, grid, order=1, predicts=predicts, variant=variant, corrector=corrector)


def unipc_2(
    model: Predictor, x: Tensor, grid: Grid, *, predicts: str = "x0", variant: str = "bh2", corrector: bool = True
) -> Tensor:
    """`unipc` of order 2, with its corrector of order 3. Zhao et al. 2023, arXiv:2302.04867."""
    return unipc(model, x, grid, order=2, predicts=predicts, variant=variant, corrector=corrector)


def unipc_3(
    model: Predictor, x: Tensor, grid: Grid, *, predicts: str = "x0", variant: str = "bh2", corrector: bool = True
) -> Tensor:
    """`unipc` of order 3, with its corrector of order 4. Zhao et al. 2023, arXiv:2302.04867."""
    return unipc(model, x, grid, order=3, predicts=predicts, variant=variant, corrector=corrector)


def unipc(
    model: Predictor,
    x: Tensor,
    grid: Grid,
    *,
    order: int,
    predicts: str = "x0",
    variant: str = "bh2",
    corrector: bool = True,
) -> Tensor:
    """UniP-p then UniC-p. Order p + 1, one evaluation a step. Zhao et al. 2023, arXiv:2302.04867, Alg. 1 and 2.

    The corrector repeats a step once the evaluation at its end is there; that evaluation is not repeated. The last
    step is not corrected. The order rises from 1 over the first steps.
    order: p, 1 to 3.
    predicts: "x0" or "eps", what the polynomial stands for; eps cannot start at alpha = 0 (ValueError).
    variant: B(h) = h ("bh1", published for eps and few steps; infinite at alpha = 0, ValueError) or e^h - 1 ("bh2").
        It has an effect where there is one difference alone, that is on order 2 and on the first steps.
    corrector: False leaves UniP-p alone, of order p; with bh2 and order 2 that is `dpmpp_2m`, or `dpm_solver_2m`.
    """
    check_order(order, 3, "unipc")
    form = form_of(predicts)
    if form.name not in ("x0", "eps"):
        raise ValueError(f"unipc integrates x0 or eps in lam, got predicts={predicts!r}; multistep takes the others")
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} of unipc; choose one of {', '.join(VARIANTS)}")
    if variant == "bh1" and grid.nodes[0].alpha == 0:
        raise ValueError(
            f"B(h) = h of unipc is infinite where the grid starts, at alpha = 0 (t = {grid.nodes[0].t:g}); use "
            f"variant='bh2', or start below it"
        )
    form.check(grid, "unipc")
    return run(model, x, grid, form, order, corrector, lambda nodes, s, t: unified(form, variant, nodes, s, t))


def unified(form: Form, variant: str, nodes: Sequence[Node], s: Node, t: Node) -> list[float]:
    """The share of each value: of the polynomial in lam through all, or with a_1 = 1/2 where there are two.

    B_2(h) is the factor of the value in `form.step` itself, so the weights a_m / r_m of the differences are all that
    remains of the paper's formula. A point at r = -inf, which is alpha = 0, counts nothing.
    """
    h = t.lam - s.lam
    if t.sigma == 0:
        return [1.0, *[0.0] * (len(nodes) - 1)]
    r = np.array([1.0 if node == t else (node.lam - s.lam) / h for node in nodes[1:]])
    shares = np.zeros_like(r)
    near = np.isfinite(r)
    if len(r) == 1:
        shares = 0.5 / r * (_ratio(form, h) if variant == "bh1" else 1.0)
    elif len(r):
        powers = np.vander(r[near], increasing=True).T
        shares[near] = np.linalg.solve(powers, means(form, h, len(powers))) / r[near]
    return [1 - float(shares.sum()), *(float(share) for share in shares)]


def _ratio(form: Form, h: float) -> float:
    """B_1 / B_2."""
    return h / math.expm1(h) if form.name == "eps" else -h / math.expm1(-h)
