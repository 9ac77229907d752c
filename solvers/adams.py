"""Adams-Bashforth and its kin: multistep solvers in eps, in the frame y = x / alpha where dy / d(sigma / alpha) = eps.

They cannot start at alpha = 0, where sigma / alpha is infinite (ValueError). Their general form is in multistep.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastsample.grid import Grid, Node, node

from .forms import EPS, check_order, eps_of, level_step
from .multistep import multistep
from .types import Predictor

Start = Callable[[Predictor, Tensor, Tensor, Grid, Node, Node], Tensor]

# Adams-Bashforth on equal steps, newest first: Liu et al. 2022, arXiv:2202.09778, Eq. 9 and App. B
EQUAL_STEPS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def deis(model: Predictor, x: Tensor, grid: Grid, *, order: int = 3) -> Tensor:
    """tAB-DEIS. Order 1 to 4, as asked; one evaluation a step. Zhang and Chen 2022, arXiv:2204.13902, Sec. 3.3.

    `multistep` of eps in the schedule's t. order: the paper's tAB-r, a polynomial of degree r, has order r + 1.
    """
    return multistep(model, x, grid, predicts="eps", variable="t", order=order)


def lms(model: Predictor, x: Tensor, grid: Grid, *, order: int = 4) -> Tensor:
    """Adams-Bashforth on the steps as they are: `multistep` of eps in sigma / alpha. One evaluation a step.

    Order 1 to 4, as asked.

    "lms" of k-diffusion, LMSDiscreteScheduler of diffusers. Hairer, Norsett and Wanner 1993, Solving Ordinary
    Differential Equations I, Sec. III.5.
    """
    return multistep(model, x, grid, predicts="eps", variable="sigma", order=order)


def ipndm_v(model: Predictor, x: Tensor, grid: Grid, *, order: int = 4) -> Tensor:
    """iPNDM with weights for the steps as they are, which is `lms`. Order 1 to 4, as asked; one evaluation a step.

    Zhang and Chen 2022, arXiv:2204.13902, App. B. Named in diff-sampler, whose weights for orders 3 and 4 are right on
    equal steps alone.
    """
    return lms(model, x, grid, order=order)


def ipndm(model: Predictor, x: Tensor, grid: Grid, *, order: int = 4) -> Tensor:
    """iPNDM: Adams-Bashforth's weights for equal steps on any steps; the order rises from 1 over the first steps.

    One evaluation a step. Zhang and Chen 2022, arXiv:2204.13902, App. B. Order 2, or 1 with order=1: only where the
    steps are equal in sigma / alpha is it 3 or 4. At few steps often better than `ipndm_v` all the same.
    order: 1 to 4, how many evaluations are used.
    """
    check_order(order, 4, "ipndm")
    EPS.check(grid, "ipndm")
    known: list[Tensor] = []  # newest first
    for k, (s, t) in enumerate(grid.steps()):
        known = [eps_of(x, model.predict(x, s), s), *known][: grid.order(k, order)]
        x = level_step(x, _mean(known), s, t)
    return x


def plms(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """PNDM with a short start: a pseudo Heun step, then `ipndm` of order 4. Order 2, N + 1 evaluations for N steps.

    Liu et al. 2022, arXiv:2202.09778, Sec. 3.3, their S-PNDM at the start and F-PNDM after it: "PLMS", the sampler
    that Stable Diffusion came with. diffusers' PNDMScheduler with `skip_prk_steps`, where N of it are N - 1 steps here.
    One step to sigma = 0 takes one evaluation.
    """
    return _pndm(model, x, grid, "plms", 1, _heun)


def pndm(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """F-PNDM: three pseudo Runge-Kutta steps, then `ipndm` of order 4. Liu et al. 2022, arXiv:2202.09778, Alg. 2.

    Order 2. Four evaluations a step over the first three steps, then one: N + 9 for N >= 3 steps, as the paper and
    diffusers' PNDMScheduler count without `skip_prk_steps`; a step to sigma = 0 among the first takes one. The middle
    of a step is in t. Its plan remembers many evaluations, since four lie between two that are used.
    From an alpha near 0 (`fs.VP.cosine()` starts at 5e-5) few steps go far astray, those of `plms` too: start lower.
    """
    return _pndm(model, x, grid, "pndm", 3, _runge_kutta)


def _pndm(model: Predictor, x: Tensor, grid: Grid, name: str, first: int, start: Start) -> Tensor:
    EPS.check(grid, name)
    known: list[Tensor] = []  # newest first
    for k, (s, t) in enumerate(grid.steps()):
        eps = eps_of(x, model.predict(x, s), s)
        known = [eps, *known][:4]
        if k < first:
            mean = start(model, x, eps, grid, s, t) if t.sigma > 0 else eps
        else:
            mean = _mean(known[: grid.order(k, 4)])
        x = level_step(x, mean, s, t)
    return x


def _heun(model: Predictor, x: Tensor, eps: Tensor, grid: Grid, s: Node, t: Node) -> Tensor:
    """The mean of eps over the step from s to t, by the trapezoidal rule."""
    there = level_step(x, eps, s, t)
    return 0.5 * (eps + eps_of(there, model.predict(there, t), t))


def _runge_kutta(model: Predictor, x: Tensor, eps: Tensor, grid: Grid, s: Node, t: Node) -> Tensor:
    """The mean of eps over the step from s to t, by its classical fourth-order weights."""
    middle = node(grid.schedule, (s.t + t.t) / 2)
    total, last = eps, eps
    for share, at in ((2, middle), (2, middle), (1, t)):
        there = level_step(x, last, s, at)
        last = eps_of(there, model.predict(there, at), at)
        total = total + share * last
    return total / 6


def _mean(known: list[Tensor]) -> Tensor:
    newest, *others = known
    mean = EQUAL_STEPS[len(others)][0] * newest
    for weight, eps in zip(EQUAL_STEPS[len(others)][1:], others):
        mean = mean + weight * eps
    return mean
