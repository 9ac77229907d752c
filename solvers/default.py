"""The solver to begin with, where nothing is measured yet."""

from __future__ import annotations

from torch import Tensor

from fastsample.grid import Grid

from .multistep import Angle, Level, multistep
from .types import Predictor

MANY = 12  # steps from which the angle is the better variable


def default(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """`multistep` of x0, order 3 with its corrector, so 4, on `fs.grid(..., fs.default_t, lower_order_final=True)`.

    One evaluation a step. The variable is (sigma / alpha)^(1 / 3) below 12 steps and atan((sigma / alpha) / 6) from
    there: of those tried, the most even over data, guidance and number of steps (docs/solvers.md).
    """
    variable = Level(3.0) if len(grid) < MANY else Angle(6.0)
    return multistep(model, x, grid, predicts="x0", variable=variable, order=3, corrector=True)
