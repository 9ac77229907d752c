"""Restart: from a low noise level back up to a high one, and down again, as often as wanted. Xu et al. 2023."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fastsample.grid import Grid, Node, Spacing, karras
from fastsample.grid import grid as spaced
from fastsample.tracing import Solver

from .ddim import noised
from .heun import heun
from .types import Predictor


@dataclass(frozen=True)
class Interval:
    """Restarts from the level sigma / alpha = low up to high, `repeats` of them, each down again in `steps` steps."""

    low: float
    high: float
    repeats: int = 1
    steps: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(
                f"an interval goes up from low to high, two levels sigma / alpha, got {self.low:g} to {self.high:g}"
            )
        if self.repeats < 1 or self.steps < 1:
            raise ValueError(f"repeats and steps must be at least 1, got {self.repeats} and {self.steps}")


def restart(
    model: Predictor,
    x: Tensor,
    grid: Grid,
    *,
    intervals: Sequence[Interval],
    base: Solver = heun,
    spacing: Spacing = karras,
    s_noise: float = 1.0,
) -> Tensor:
    """Restart sampling: the base solver, and forward noise in between. Xu et al. 2023, arXiv:2306.14878, Alg. 1 and 2.

    What noise corrects in an SDE, without its error of every step. An interval costs repeats * steps more intervals of
    the base solver; the plan's `nfe` is the honest count.

    intervals: `Interval`s. Each starts at the inner node of the grid whose level is nearest to its low, in lam.
    base: the solver that walks the grid's parts and the restarts, with its history fresh in each. It must end without
        noise, so that there is one noise for each evaluation: `heun` (the paper's), `dpmpp_2m`, `unipc_3` ...
    spacing: of the steps of a restart. s_noise: the standard deviation of the forward noise.
    """
    places = _places(grid, intervals)
    done = 0
    for k, interval in places:
        x = base(model, x, replace(grid, nodes=grid.nodes[done : k + 1]))
        low, high = grid.nodes[k], grid.node(-math.log(interval.high))
        again = spaced(grid.schedule, interval.steps, spacing, high.t, low.t, lower_order_final=grid.lower_order_final)
        for _ in range(interval.repeats):
            x = base(model, noised(model, x, low, high, s_noise), again)
        done = k
    return base(model, x, replace(grid, nodes=grid.nodes[done:]))


def _places(grid: Grid, intervals: Sequence[Interval]) -> list[tuple[int, Interval]]:
    """The intervals in the order of the run, each with the index of the node it starts at."""
    inner: list[tuple[int, Node]] = list(enumerate(grid.nodes))[1:-1]
    if not intervals or not inner:
        raise ValueError(
            f"restart needs at least one interval and a grid of at least 2 steps, got {len(intervals)} and {len(grid)}"
        )
    places = []
    for interval in intervals:
        k = min(inner, key=lambda place: abs(place[1].lam + math.log(interval.low)))[0]
        low, top = math.exp(-grid.nodes[k].lam), math.exp(-grid.nodes[0].lam)
        if not low < interval.high <= top:
            raise ValueError(
                f"the restart from {interval.low:g} to {interval.high:g} begins at the grid's nearest level {low:.4g}, "
                f"below which or above whose start {top:.4g} it cannot go; choose another high, or more steps"
            )
        places.append((k, interval))
    places.sort(key=lambda place: place[0])
    if len({k for k, _ in places}) < len(places):
        raise ValueError("two intervals begin at the same node of the grid; use more steps, or repeats of one interval")
    return places
