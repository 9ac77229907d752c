"""Sampling for models that were distilled to jump to x0, or down to any noise level, from any noise level."""

from __future__ import annotations

from torch import Tensor

from fastsample.grid import Grid, exponential_step, node

from .ddim import noised
from .forms import check_number
from .types import Predictor


def consistency(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """Multistep consistency sampling: x0, then noise again. One evaluation a step.

    Song et al. 2023, arXiv:2303.01469, Alg. 1, which takes the model's x0 for data at its smallest noise level and
    adds the noise missing from there; here x0 is clean data, as in Luo et al. 2023, arXiv:2310.04378 (LCM).

    It is the LCM scheduler of diffusers as well. The boundary condition there, c_skip x + c_out x0 in place of x0 with
    c_skip = 1 / (1 + (10 index / 0.5)^2), below 0.0025 from index 1 on, belongs to the model that was trained with it.
    """
    for s, t in grid.steps():
        x = t.alpha * model.predict(x, s)
        if t.sigma > 0:
            x = x + t.sigma * model.noise()
    return x


def tcd(model: Predictor, x: Tensor, grid: Grid, *, gamma: float = 0.3) -> Tensor:
    """Strategic stochastic sampling of trajectory consistency: to below t, then noise up to t. One evaluation a step.

    Zheng et al. 2024, arXiv:2402.19159, Alg. 4 ("eta" of diffusers' TCD scheduler).
    gamma: how much noise, in [0, 1]. The jump goes to time t_min + (1 - gamma) (t - t_min): with 0 this is `ddim`, with
        1 `consistency` but for the noise at t_min. For a VP table these are indices, which diffusers rounds down.
    """
    check_number("gamma", gamma, 0, 1, ": 0 adds no noise, 1 the most")
    least = grid.schedule.t_min
    for s, t in grid.steps():
        below = node(grid.schedule, least + (1 - gamma) * (t.t - least)) if gamma > 0 and t.t > least else t
        x = exponential_step(x, model.predict(x, s), s, below)
        if below is not t:
            x = noised(model, x, below, t)
    return x
