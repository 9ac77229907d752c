"""Sampling for models that were distilled to jump to x0 from any noise level."""

from __future__ import annotations

from torch import Tensor

from fastsample.grid import Grid

from .types import Predictor


def consistency(model: Predictor, x: Tensor, grid: Grid) -> Tensor:
    """Multistep consistency sampling: x0, then noise again. One evaluation a step.

    Song et al. 2023, arXiv:2303.01469, Alg. 1, which takes the model's x0 for data at its smallest noise level and
    adds the noise missing from there; here x0 is clean data, as in Luo et al. 2023, arXiv:2310.04378 (LCM).
    """
    for s, t in grid.steps():
        x = t.alpha * model.predict(x, s)
        if t.sigma > 0:
            x = x + t.sigma * model.noise()
    return x
