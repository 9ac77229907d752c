"""The solver to begin with, where nothing is measured yet."""

from __future__ import annotations

from torch import Tensor

from fastsample.grid import Grid

from .multistep import Angle, Level, multistep
from .types import Predictor

# The variable, by how many steps there are at the least.
VARIABLES = ((16, Level(6.0)), (10, Angle(5.0)), (0, Level(3.0)))


def default(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """`multistep` of x0, order 3 with its corrector, so 4, on `fs.grid(..., fs.default_t, lower_order_final=True)`.

    One evaluation a step. The variable is (sigma / alpha)^(1 / 3) below 10 steps, atan((sigma / alpha) / 5) from there
    and (sigma / alpha)^(1 / 6) from 16: of those tried, the most even over data, guidance and number of steps
    (docs/solvers.md).
    """
    variable = next(variable for least, variable in VARIABLES if len(grid) >= least)
    return multistep(model, x, grid, predicts="x0", variable=variable, order=3, corrector=True)
